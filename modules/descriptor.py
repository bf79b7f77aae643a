"""SuperGlobal's descriptor: the feature maps of an image at several scales -> one unit vector.

Shapes: N images, S scales, C channels of the feature map, D dimensions of the descriptor.

Shao et al., "Global Features are All You Need for Image Retrieval and Reranking", ICCV 2023, sec. 3.
"""

import logging
import math
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activation import Change, layers_with_relu_plus
from .checks import check_tensor, refuse_tracing, values_can_be_seen
from .pooling import SAFE_POWER, GeM, GeMPlus, RegionalGeM, ScaleGeM

log = logging.getLogger(__name__)

SCALES = (0.7071, 1.0, 1.4142)
SCALE_SETS = {1: (1.0,), 3: SCALES, 5: (0.5, *SCALES, 2.0)}  # the paper's, by the number of scales

# These have no state, so that all networks can share them.
GEMP, RGEM, SGEM = GeMPlus(), RegionalGeM(), ScaleGeM()
# Attributes under which networks usually provide their feature map.
_USUAL = ("forward_features", "extract_features", "features", "backbone", "encoder", "trunk")

Step = Callable[[Tensor], Tensor]


def multi_scale_descriptor(
    x: Tensor,
    feature_map: Step,
    pooling: Step,
    rgem: Step | None = None,
    project: Step | None = None,
    sgem: Step | None = None,
    scales: Sequence[float] = SCALES,
) -> Tensor:
    """Returns the unit descriptors of normalised images. (N, 3, H, W) -> (N, D).

    For each scale: resize the images, compute the feature map, refine it (Regional-GeM), pool it
    (GeM+), L2-normalise, project. Then combine the vectors of the scales (Scale-GeM) and L2-normalise.

    Args:
        x: images, normalised as the network was trained.
        feature_map: the network. (N, 3, h, w) -> (N, C, h', w').
        pooling: (N, C, h', w') -> (N, C).
        rgem: (N, C, h', w') -> (N, C, h', w'); None leaves the feature map as it is.
        project: (S * N, C) -> (S * N, D), applied to the unit vectors of all scales at once; None for C = D.
        sgem: (S, N, D) -> (N, D); None takes the mean over the scales.
        scales: factors by which the images are resized.

    Raises:
        ValueError: if x is not a floating-point tensor (N, C, H, W) without NaN, or a descriptor is not finite.
    """
    refuse_tracing()
    check_tensor(x, "multi_scale_descriptor", "N, C, H, W")
    identity = nn.Identity()
    pooled = [pooling((rgem or identity)(_at_scale(feature_map, x, factor))) for factor in scales]
    vectors = F.normalize(torch.stack(pooled), dim=-1)  # (S, N, C)
    if project is not None:
        vectors = project(vectors.flatten(0, 1)).unflatten(0, vectors.shape[:2])  # (S, N, D)
    descriptors = F.normalize(vectors.mean(dim=0) if sgem is None else sgem(vectors), dim=-1)
    if values_can_be_seen(descriptors) and not descriptors.isfinite().all():
        raise ValueError(f"the descriptor of images {tuple(x.shape)} is not finite; a power is too large")
    return descriptors


def rescale(x: Tensor, factor: float) -> Tensor:
    """Returns the images resized by a factor. (N, C, H, W) -> (N, C, max(1, floor(H f)), max(1, floor(W f))).

    Bilinear and without antialiasing, as for the paper's results. (torchvision antialiases by default
    since 0.17.)
    """
    if factor == 1:
        return x
    # int() would turn the side into a constant in torch.export.
    size: list[Any] = [torch.sym_max(1, math.floor(side * factor)) for side in x.shape[-2:]]
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=False)


def _at_scale(feature_map: Step, x: Tensor, factor: float) -> Tensor:
    """Returns the feature map of resized images; an error of a network that supports one size only says so."""
    resized = rescale(x, factor)
    try:
        return feature_map(resized)
    except (AssertionError, RuntimeError) as error:
        if factor == 1 or torch.compiler.is_compiling() or isinstance(error, torch.OutOfMemoryError):
            raise
        feature_map(x)  # raises if it is not the size
        raise RuntimeError(
            f"the network supports images of {tuple(x.shape[-2:])} pixels, but not of {tuple(resized.shape[-2:])}, "
            f"resized by {factor:g} ({error}); if it needs one size, or multiples of a patch, use scales=(1.0,)"
        ) from error


class SuperGlobal(nn.Module):
    """A network with SuperGlobal's modules. (N, 3, H, W), normalised images -> (N, D), unit descriptors.

    See :func:`multi_scale_descriptor` for what it computes, and :func:`attach`, which creates it for any network.

    Args:
        model: the network, or a function.
        path: names of the attributes of `model` that are called one after the other to compute the feature map;
            empty if calling the model itself returns the map.
        pooling, rgem, sgem, scales, projection: as in :func:`attach`; the name of a submodule stands for it.
        changes: the layers of the network that were changed for ReLU+.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        path: Sequence[str] = (),
        pooling: nn.Module | str = GEMP,
        rgem: nn.Module | None = RGEM,
        sgem: nn.Module | None = SGEM,
        scales: Sequence[float] = SCALES,
        projection: nn.Module | str | None = None,
        changes: Sequence[Change] = (),
    ):
        super().__init__()
        self.model: Any = model
        self.path = tuple(path)
        self.pooling, self.rgem, self.sgem, self.projection = pooling, rgem, sgem, projection
        if not isinstance(scales, Sequence) or not scales or not all(0 < factor < math.inf for factor in scales):
            raise ValueError(f"scales must be one or more positive factors such as {SCALES}, got {scales!r}")
        self.scales = tuple(float(factor) for factor in scales)
        self.fuses = True  # until the fused kernel fails
        self.changes, self.detached = list(changes), False
        self.training = getattr(model, "training", False)  # not train(): parts of the network may be frozen

    def forward(self, x: Tensor) -> Tensor:
        project = None if self.projection is None else self.project
        return multi_scale_descriptor(x, self.feature_map, self.pool, None, project, self.sgem, self.scales)

    def feature_map(self, x: Tensor) -> Tensor:
        """Returns the network's feature map at one scale. (N, 3, H, W) -> (N, C, h, w), float32 or float64."""
        if self.detached:
            raise RuntimeError("the network was detached; attach it again")
        for name in self.path:
            x = attrgetter(name)(self.model)(x)
        if not self.path:
            x = self.model(x)
        if not isinstance(x, Tensor) or x.ndim != 4:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            usual = [name for name in _USUAL if hasattr(self.model, name) and name not in self.path]
            raise ValueError(
                f"{name_of(self.model)}{''.join('.' + name for name in self.path[-1:])} returns {got}, not a feature "
                "map (N, C, H, W); name the method or submodule that returns one, features="
                f"{' or '.join(map(repr, usual)) or '...'}, or attach a function that does (see attach for a ViT)"
            )
        width = getattr(self.model, "num_features", None)
        if width is not None and x.shape[1] != width == x.shape[-1]:
            raise ValueError(
                f"{name_of(self.model)} returns (N, H, W, C), shape {tuple(x.shape)}; attach a function that returns "
                "(N, C, H, W): lambda x: model.forward_features(x).permute(0, 3, 1, 2)"
            )
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x  # powers overflow half precision

    def pool(self, x: Tensor) -> Tensor:
        """Returns the vector of one scale before the projection: Regional-GeM and pooling. (N, C, h, w) -> (N, C)."""
        fused = self._fused(x)
        return self.pool_refined(x if self.rgem is None else self.rgem(x)) if fused is None else fused

    def pool_refined(self, x: Tensor) -> Tensor:
        """Returns the vector of a map that Regional-GeM has refined already. (N, C, h, w) -> (N, C)."""
        pooled = self.pooling_module(x)
        if pooled.ndim == 4 and pooled.shape[2:] == (1, 1):
            pooled = pooled.flatten(1)
        if pooled.ndim != 2:
            raise ValueError(f"the pooling returns shape {tuple(pooled.shape)} for a map {tuple(x.shape)}, not (N, C)")
        return pooled

    @property
    def pooling_module(self) -> Any:
        return self._part(self.pooling)

    def _fused(self, x: Tensor) -> Tensor | None:
        """Returns Regional-GeM and GeM in one kernel on a GPU; None where it does not apply."""
        pooling = self.pooling_module
        if not self.fuses or not x.is_cuda or x.dtype != torch.float32 or x.requires_grad:
            return None
        if type(self.rgem) is not RegionalGeM or type(pooling) not in (GeM, GeMPlus) or torch.compiler.is_compiling():
            return None
        if any(isinstance(p, Tensor) or p > SAFE_POWER for p in (self.rgem.p, pooling.p)):
            return None
        try:
            # Imported here, because without a GPU Triton would take 0.2 s and 7 MB of each process.
            from .fused_pooling import regional_gem

            return regional_gem(x, self.rgem.p, self.rgem.window, pooling.p, pooling.eps)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Triton is missing, or raises any exception, as without a compiler
            log.debug("Regional-GeM and GeM in two passes: %s", error)
            self.fuses = False
            return None

    def project(self, rows: Tensor) -> Tensor:
        """Applies the projection, if there is one. (R, C) -> (R, D)."""
        if self.projection is None:
            return rows
        projection = self._part(self.projection)
        width = getattr(projection, "in_features", rows.shape[1])
        if width != rows.shape[1]:
            raise ValueError(f"the projection takes (N, {width}), the pooled vectors are {tuple(rows.shape)}")
        weight = next(projection.parameters(), rows)
        return projection(rows.to(weight.dtype)).to(rows.dtype)

    def _part(self, part: nn.Module | str) -> nn.Module:
        return attrgetter(part)(self.model) if isinstance(part, str) else part

    def detach(self) -> nn.Module:
        """Undoes the changes that attach made to the network and returns it; this module cannot be used afterwards."""
        while self.changes:
            self.changes.pop().undo()
        self.detached = True
        return self.model

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(
            "TorchScript is not supported; use torch.export.export(model, (images,), dynamic_shapes=...)"
        )

    def __enter__(self) -> "SuperGlobal":
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        """Lists the modules, and every layer of the network that was changed."""
        path = f", feature map from {' > '.join(self.path)}" if self.path else ""
        projection = self.projection
        if isinstance(projection, str):
            projection = f"{projection} of the network, {self._part(projection)!r}"
        pooling = f"{self.pooling} of the network" if isinstance(self.pooling, str) else self.pooling
        shared = layers_with_relu_plus(self.model, self.changes)
        lines = [
            f"network: {name_of(self.model)}{path}",
            f"rgem: {self.rgem}",
            f"pooling: {pooling}",
            f"projection: {projection}",
            f"sgem: {self.sgem}, scales {', '.join(f'{factor:g}' for factor in self.scales)}",
            f"changed layers: {'' if self.changes or shared else 'none'}",
            *(f"  {change.layer}: {change.meaning}" for change in self.changes),
            *(f"  {layer}: has ReLU+ of another attach" for layer in shared),
        ]
        return "SuperGlobal(\n" + "".join(f"  {line.rstrip()}\n" for line in lines) + ")"


def name_of(model: Any) -> str:
    """Returns the name of a function, or of the class of a network."""
    return getattr(model, "__name__", type(model).__name__)
