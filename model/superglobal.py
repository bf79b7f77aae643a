"""SuperGlobal: the encoder and the pooling modules over several scales -> one unit descriptor."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from model.checkpoint import load_encoder
from model.folding import FoldedResNet
from model.resnet import ResNet
from modules.activation import RELUP_THRESHOLD
from modules.attach import Attached
from modules.pooling import GEMP_P, RGEM_P, RGEM_WINDOW, SGEM_P, GeM, GeMPlus, RegionalGeM, ScaleGeM

SCALES = {1: (1.0,), 3: (0.7071, 1.0, 1.4142), 5: (0.5, 0.7071, 1.0, 1.4142, 2.0)}

# Matrix products of another number of rows may sum in another order.
_PROJECTED_TOGETHER = 16


class SuperGlobal(Attached):
    """The modules attached to the encoder and its head. (N, 3, H, W) -> (N, D); see images.to_network_input.

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
        trained = GeM(encoder.head.pool["p"].item())
        super().__init__(encoder, (), trained if gemp is None else gemp, rgem, sgem, scales, "head")

    @property
    def dim(self) -> int:
        return self.model.head.fc.out_features

    @property
    def device(self) -> torch.device:
        return self.model.head.fc.weight.device

    def project(self, rows: Tensor) -> Tensor:
        """(R, C) -> (R, D), by the same kernel for any R: a row's result does not depend on the others, to the bit."""
        padded = F.pad(rows, (0, 0, 0, -len(rows) % _PROJECTED_TOGETHER))
        return torch.cat([self.model.head(part) for part in padded.split(_PROJECTED_TOGETHER)])[: len(rows)]


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
    device: torch.device | str = "cpu",
) -> SuperGlobal:
    """The network with a checkpoint's weights, folded for fast inference.

    Args:
        checkpoint, depth, reduction_dim: the file, and what it holds.
        scales: factors by which a picture is resized.
        relup: threshold of ReLU+; gemp, rgem, sgem: powers of the pooling modules. None leaves one out.
        rgem_window: side of Regional-GeM's window.
        precision: of the encoder, fp32, bf16 or fp16; poolings, norms and projection are in fp32.
        device: where it works.

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
        .to(device)
    )
