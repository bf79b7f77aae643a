"""CVNet-Rerank: the likelihood that two images show the same object, from correlations of their local features.

The expensive alternative to SuperGlobal's reranking. An image is represented by its stage-3 feature map; a
pair of images is scored by 4D convolutions over the correlations of all positions of one with all positions
of the other, at three scales each. The score is not symmetric: one image is the query, the other the key.

Lee et al., "Correlation Verification for Image Retrieval", CVPR 2022.

Shapes: K keys; query map of hq x wq positions, key map of hk x wk. A 4D tensor is stored as
(K, hk, wk, hq, wq, C), so that for a convolution over the query's axes the images are contiguous,
channels last; a convolution over the key's axes uses a transposed copy.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backbone import PRECISIONS
from model.checkpoint import load_encoder, load_strictly, reranker_state
from model.cvnet import FEATURE_DIM, ResNet, cvnet_backbone
from model.device import is_out_of_memory
from model.errors import InputError
from model.folding import FoldedResNet

MAP_DIM, LOCAL_DIM = 1024, 256
MAP_SCALES = (0.25, 0.5, 1.0)  # relative to the area of a feature map

# The convolutions of each block: output channels, kernel, stride.
_BLOCKS = (
    ((16, 5, 2),),
    ((16, 3, 1), (32, 3, 2)),
    ((32, 3, 1), (32, 3, 1), (64, 3, 2)),
    ((64, 3, 1), (64, 3, 1), (128, 3, 1)),
)
_GROUPS = 4
_NO_NORM = 1e-8  # below this norm a position is empty and correlates with nothing

# Bytes of correlations computed at a time, on a CPU chosen for its caches (on two cores with 1024x768, a pair
# takes 1.0 s with parts of 4 MB and 1.3 s with 1 MB), and the largest size of a batch of keys.
_PART_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
_BATCH_BYTES = {"cpu": 64 << 20, "cuda": 4 << 30}
_LIVE_TENSORS = 6  # number of tensors of the first block's size


class CenterPivotConv4d(nn.Module):
    """A 4D convolution as the sum of two 2D convolutions, one over the query's axes and one over the key's.

    (K, hk, wk, hq, wq, C) -> (K, hk', wk', hq', wq', C'). Each is computed at every stride-th position of
    the other's axes, padded by half the kernel.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2)
        self.conv2 = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        s = self.stride
        over_query = _over_inner(self.conv1, x[:, ::s, ::s])
        over_key = _over_inner(self.conv2, _swap(x[:, :, :, ::s, ::s]))
        return over_query.add_(_swap(over_key))

    def of_correlations(self, query: Tensor, keys: Tensor) -> Tensor:
        """Applies the convolution to the clamped correlations of two maps, computing only those needed, in parts.

        (3, c, hq, wq), (K, 3, c, hk, wk) -> (K, hk', wk', hq', wq', C')
        """
        s = self.stride
        # Correlations have the axes (positions of one, its scale, scale of the other, map of the other), the
        # input of a 2D convolution. The channels are ordered by query scale, then key scale.
        weight = self.conv1.weight.unflatten(1, (len(MAP_SCALES), len(MAP_SCALES))).transpose(1, 2).flatten(1, 2)
        some_keys = keys[..., ::s, ::s].permute(0, 3, 4, 1, 2)  # (K, hk', wk', 3, c)
        over_query = self._of_parts(some_keys.flatten(0, 2)[None], query[None], weight, self.conv1.bias)
        some_queries = query[..., ::s, ::s].permute(2, 3, 0, 1)  # (hq', wq', 3, c)
        over_key = self._of_parts(some_queries.flatten(0, 1)[None], keys, self.conv2.weight, self.conv2.bias)
        over_query = over_query.view(*some_keys.shape[:3], *over_query.shape[2:])
        over_key = over_key.view(len(keys), *some_queries.shape[:2], *over_key.shape[2:])
        return over_query.add_(_swap(over_key))

    def _of_parts(self, some: Tensor, maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolves over h and w for each of P positions. (1, P, 3, c), (B, 3, c, h, w) -> (B, P, h', w', C')."""
        h, w = maps.shape[-2:]
        columns = maps.transpose(1, 2).flatten(2)  # (B, c, 3 h w)
        out = maps.new_empty(len(maps), some.shape[1], _strided(h, self.stride), _strided(w, self.stride), len(weight))
        weight = weight.contiguous()  # not channels last: the correlations are not
        bytes_each = len(maps) * len(MAP_SCALES) * columns[0, 0].numel() * maps.element_size()
        step = max(1, _PART_BYTES[_kind(maps)] // bytes_each)
        for start in range(0, some.shape[1], step):
            part = some[:, start : start + step]
            correlations = (part.flatten(1, 2) @ columns).relu_().view(-1, len(MAP_SCALES) ** 2, h, w)
            convolved = F.conv2d(correlations, weight, bias, self.stride, weight.shape[-1] // 2)
            out[:, start : start + step] = convolved.permute(0, 2, 3, 1).unflatten(0, (len(maps), -1))
        return out


class CVLearner(nn.Module):
    """Scores query and key maps: four blocks of 4D convolutions, the mean over all positions, and an MLP."""

    block1: nn.Sequential
    block2: nn.Sequential
    block3: nn.Sequential
    block4: nn.Sequential

    def __init__(self) -> None:
        super().__init__()
        c_in = len(MAP_SCALES) ** 2
        for number, convolutions in enumerate(_BLOCKS, start=1):
            block = nn.Sequential()
            for c_out, kernel, stride in convolutions:
                block.extend([CenterPivotConv4d(c_in, c_out, kernel, stride), nn.GroupNorm(_GROUPS, c_out), nn.ReLU()])
                c_in = c_out
            self.add_module(f"block{number}", block)
        self.mlp = nn.Sequential(nn.Linear(c_in, c_in), nn.ReLU(), nn.Linear(c_in, 2))

    @property
    def first(self) -> CenterPivotConv4d:
        """The layer that takes the correlations."""
        return cast("CenterPivotConv4d", self.block1[0])

    def forward(self, query: Tensor, keys: Tensor) -> Tensor:
        """(3, c, hq, wq), (K, 3, c, hk, wk) -> (K,)."""
        x = self.first.of_correlations(query, keys)
        for layer in (*self.block1[1:], *self.block2, *self.block3, *self.block4):
            if isinstance(layer, CenterPivotConv4d):
                x = layer(x)
            elif isinstance(layer, nn.GroupNorm):
                x = _normalised(layer, x)
            else:
                x = F.relu_(x)
        return self.mlp(x.mean(dim=(1, 2, 3, 4), dtype=torch.float32)).softmax(dim=1)[:, 1]


class CVNetLayers(nn.Module):
    """The layers of CVNet-Rerank outside the encoder, with the names of the published checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2ds = nn.ModuleList(nn.Conv2d(MAP_DIM, LOCAL_DIM, 3, padding=1, bias=False) for _ in MAP_SCALES)
        self.cv_learner = CVLearner()


class CVNetRerank(nn.Module):
    """Scores pairs of images, for inference only; created by :func:`load_cvnet_rerank`.

    ::

        query = network.query_inputs(network.feature_map(network.normalise(pixels)))
        scores = network.score(query, network.feature_map(network.normalise(more_pixels)))

    Args:
        encoder: computes the stage-3 feature map.
        layers: the layers with their trained weights, which are converted to the encoder's precision.
        normalise: prepares images for the encoder. (N, H, W, 3) RGB -> (N, 3, H, W).
    """

    def __init__(self, encoder: FoldedResNet, layers: CVNetLayers, normalise: Callable[[Tensor], Tensor]):
        super().__init__()
        self.normalise = normalise
        self.encoder, self.conv2ds, self.cv_learner = encoder, layers.conv2ds, layers.cv_learner
        self.dtype = PRECISIONS[encoder.precision]
        layers.to(self.dtype).to(memory_format=torch.channels_last)
        self.cv_learner.mlp.float()

    def feature_map(self, x: Tensor) -> Tensor:
        """Returns the feature maps of normalised images. (N, 3, H, W) -> (N, 1024, ~H/16, ~W/16) float32."""
        return self.encoder(x)

    def query_inputs(self, feature_map: Tensor) -> Tensor:
        """Prepares a query for scoring, once for all keys. (1, 1024, h, w) -> (3, 256, h, w)."""
        _check("a query's feature map", feature_map, (1, MAP_DIM))
        return self._inputs(feature_map)[0]

    def score(self, query: Tensor, key_maps: Tensor) -> Tensor:
        """Returns the scores of a query with keys of equal size, from 0 to 1, in batches that bound the memory.

        (3, 256, hq, wq) from query_inputs, (K, 1024, hk, wk) from feature_map, in any precision -> (K,) float32

        Raises:
            ValueError: if a shape does not fit.
            InputError: if the memory is too small for a single pair.
        """
        _check("a query's inputs", query, (len(MAP_SCALES), LOCAL_DIM))
        _check("keys' feature maps", key_maps, (None, MAP_DIM))
        parts = key_maps.split(self.keys_per_batch(query, key_maps)) if len(key_maps) else ()
        try:
            scores = [self.cv_learner(query, self._inputs(part)) for part in parts]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            sizes = " and ".join(f"{x.shape[-1]} x {x.shape[-2]}" for x in (query, key_maps))
            raise InputError(
                f"the memory of the device is too small for CVNet-Rerank with maps of {sizes} positions; "
                "use smaller images, half precision, or the CPU"
            ) from None
        return torch.cat(scores) if scores else query.new_empty(0, dtype=torch.float32)

    def keys_per_batch(self, query: Tensor, key_maps: Tensor) -> int:
        """Returns how many keys of this size are scored together, at least 1; the size of the 4D tensors limits it."""
        stride = self.cv_learner.first.stride
        positions = math.prod(_strided(side, stride) for x in (query, key_maps) for side in x.shape[-2:])
        each = self.dtype.itemsize * positions * _BLOCKS[0][0][0] * _LIVE_TENSORS
        each += 4 * key_maps[0, 0].numel() * (2 * MAP_DIM + 2 * len(MAP_SCALES) * LOCAL_DIM)
        return max(1, _BATCH_BYTES[_kind(query)] // each)

    def _inputs(self, maps: Tensor) -> Tensor:
        """Returns unit vectors at three scales, all resized to the map's size. (N, 1024, h, w) -> (N, 3, 256, h, w).

        Resizing the correlations of unit vectors is equivalent to correlating resized unit vectors, because
        bilinear interpolation is linear in the query's and the key's vectors. No 4D tensor is ever resized.
        """
        maps = maps.to(self.dtype).contiguous(memory_format=torch.channels_last)
        sides = maps.shape[-2:]
        out = maps.new_empty(len(maps), len(MAP_SCALES), LOCAL_DIM, *sides)
        for number, (scale, conv) in enumerate(zip(MAP_SCALES, self.conv2ds, strict=True)):
            # round() rounds halves to the even number, as for the published scores.
            size = tuple(max(1, round(side * math.sqrt(scale))) for side in sides)
            local = F.normalize(conv(_resized(maps, size)).float(), dim=1, eps=_NO_NORM)
            out[:, number] = _resized(local, sides)
        return out


def load_cvnet_rerank(
    checkpoint: Path,
    depth: int,
    reduction_dim: int = FEATURE_DIM,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
) -> CVNetRerank:
    """Returns CVNet-Rerank with the weights of a checkpoint, on the encoder with plain ReLU.

    Args:
        checkpoint, depth, reduction_dim: the file, and the depth and dimensions of its network.
        precision: precision of the convolutions, fp32, bf16 or fp16; norms and the MLP are in fp32.
        device: the device of the network.

    Raises:
        InputError: if a key of the encoder or of the reranker is missing, unknown or of another shape.
    """
    with torch.device("meta"):  # skips the initialisation of weights that the checkpoint replaces
        encoder, layers = ResNet(depth, reduction_dim), CVNetLayers()
    load_encoder(encoder, checkpoint)
    load_strictly(layers, reranker_state(checkpoint), checkpoint, "CVNet-Rerank")
    network = CVNetRerank(FoldedResNet(encoder, precision, stop_in=3), layers, cvnet_backbone(encoder).normalise)
    return network.eval().requires_grad_(False).to(device)


def _over_inner(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Convolves over the inner two axes. (K, a, b, h, w, C) -> (K, a, b, h', w', C')."""
    out = conv(x.flatten(0, 2).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return out.unflatten(0, x.shape[:3])


def _swap(x: Tensor) -> Tensor:
    """Moves the axes of the other image inside. (K, a, b, h, w, C) -> (K, h, w, a, b, C), a view."""
    return x.permute(0, 3, 4, 1, 2, 5)


def _normalised(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Applies the norm over groups of channels, (K, hk, wk, hq, wq, C)."""
    flat = x.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
    return norm(flat).permute(0, 2, 3, 1).reshape(x.shape)


def _resized(x: Tensor, size: tuple[int, ...]) -> Tensor:
    same = tuple(x.shape[-2:]) == tuple(size)
    return x if same else F.interpolate(x, size, mode="bilinear", align_corners=True)


def _strided(side: int, stride: int) -> int:
    return -(-side // stride)


def _kind(x: Tensor) -> str:
    return "cuda" if x.device.type == "cuda" else "cpu"


def _check(name: str, x: Tensor, first: tuple[int | None, int]) -> None:
    expected = ", ".join("K" if side is None else str(side) for side in first)
    if x.ndim != 4 or x.shape[1] != first[1] or first[0] not in (None, len(x)) or 0 in x.shape[2:]:
        raise ValueError(f"{name} must have shape ({expected}, h, w), got {tuple(x.shape)}")
