"""SuperGlobal: the encoder and the pooling modules over several scales -> one unit descriptor."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import resize

from model.checkpoint import load_encoder
from model.folding import FoldedResNet
from model.resnet import ResNet
from modules.activation import RELUP_THRESHOLD
from modules.pooling import (
    GEMP_P,
    RGEM_P,
    RGEM_WINDOW,
    SGEM_P,
    GeMPlus,
    RegionalGeM,
    ScaleGeM,
    generalized_mean,
)

SCALES = {1: (1.0,), 3: (0.7071, 1.0, 1.4142), 5: (0.5, 0.7071, 1.0, 1.4142, 2.0)}

# Matrix products of another number of rows may sum in another order.
_PROJECTED_TOGETHER = 16


class SuperGlobal(nn.Module):
    """Pictures -> unit descriptors. (N, 3, H, W) -> (N, D); see images.to_network_input for the input.

    Per scale: encoder -> Regional-GeM -> GeM+ -> L2-normalise -> head.fc; then Scale-GeM over the
    scales and L2-normalise. A module that is None is left out: without GeM+, GeM with the trained
    power; without Scale-GeM, the mean over the scales.

    Shao et al., "Global Features are All You Need for Image Retrieval and Reranking", ICCV 2023.

    Args:
        encoder: the encoder with its head, trainable or folded; ReLU+ is the encoder's own argument.
        scales: factors by which the input is resized.
        gemp, rgem, sgem: the pooling modules.
    """

    def __init__(
        self,
        encoder: ResNet | FoldedResNet,
        scales: tuple[float, ...],
        gemp: GeMPlus | None,
        rgem: RegionalGeM | None,
        sgem: ScaleGeM | None,
    ):
        super().__init__()
        self.encoder = encoder
        self.scales = tuple(scales)
        self.gemp, self.rgem, self.sgem = gemp, rgem, sgem

    @property
    def dim(self) -> int:
        return self.encoder.head.fc.out_features

    @property
    def device(self) -> torch.device:
        return self.encoder.head.fc.weight.device

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.stack([self.pool(self.encoder(rescale(x, factor))) for factor in self.scales])
        vectors = self.project(F.normalize(pooled, dim=-1).flatten(0, 1)).unflatten(0, pooled.shape[:2])  # (S, N, D)
        return F.normalize(vectors.mean(dim=0) if self.sgem is None else self.sgem(vectors), dim=-1)

    def pool(self, x: Tensor) -> Tensor:
        """The vector of one scale, before the projection. (N, C, H, W) -> (N, C)."""
        if self.rgem is not None:
            x = self.rgem(x)
        return generalized_mean(x, self.encoder.head.pool["p"]) if self.gemp is None else self.gemp(x)

    def project(self, rows: Tensor) -> Tensor:
        """(R, C) -> (R, D), by the same kernel for any R: a row's result does not depend on the others, to the bit."""
        padded = F.pad(rows, (0, 0, 0, -len(rows) % _PROJECTED_TOGETHER))
        return torch.cat([self.encoder.head(part) for part in padded.split(_PROJECTED_TOGETHER)])[: len(rows)]

    def extra_repr(self) -> str:
        return f"scales={self.scales}"


def rescale(x: Tensor, factor: float) -> Tensor:
    """Bilinear resize by a factor, each side cut to a whole number and at least 1.

    The paper's numbers were made without antialiasing; torchvision has it on by default since 0.17.
    """
    size = [max(1, int(side * factor)) for side in x.shape[-2:]]
    return resize(x, size, antialias=False)


def build_model(
    checkpoint: Path,
    depth: int,
    reduction_dim: int = 2048,
    scales: tuple[float, ...] = SCALES[3],
    relup: float | None = RELUP_THRESHOLD,
    gemp: float | None = GEMP_P,
    rgem: float | None = RGEM_P,
    rgem_window: int = RGEM_WINDOW,
    sgem: float | None = SGEM_P,
    precision: str = "fp32",
) -> SuperGlobal:
    """The network with a checkpoint's weights, folded for fast inference, on the CPU.

    Args:
        checkpoint, depth, reduction_dim: the file, and what it holds.
        scales: factors by which a picture is resized.
        relup: threshold of ReLU+; gemp, rgem, sgem: powers of the pooling modules. None leaves one out.
        rgem_window: side of Regional-GeM's window.
        precision: of the encoder, fp32, bf16 or fp16; poolings, norms and projection are in fp32.

    Raises:
        InputError: where the checkpoint cannot be used.
    """
    with torch.device("meta"):  # nothing is initialised that the checkpoint would then overwrite
        encoder = ResNet(depth, reduction_dim, relup)
    return (
        SuperGlobal(
            FoldedResNet(load_encoder(encoder, checkpoint), precision),
            scales,
            None if gemp is None else GeMPlus(gemp),
            None if rgem is None else RegionalGeM(rgem, rgem_window),
            None if sgem is None else ScaleGeM(sgem),
        )
        .eval()
        .requires_grad_(False)
    )
