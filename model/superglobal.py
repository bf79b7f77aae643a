"""SuperGlobal: CVNet's encoder and the pooling modules at several scales -> one unit descriptor."""

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.device import is_out_of_memory
from model.folding import FoldedResNet
from model.resnet import Head, ResNet
from modules.descriptor import multi_scale_descriptor
from modules.pooling import SAFE_POWER, GeM, GeMPlus, RegionalGeM, ScaleGeM

log = logging.getLogger(__name__)

# Matrix products with another number of rows may add in another order.
_PROJECTED_TOGETHER = 16


class SuperGlobal(nn.Module):
    """The paper's network. (N, 3, H, W) images, normalised by images.to_network_input -> (N, D) unit descriptors.

    For each scale: encoder -> Regional-GeM -> GeM+ -> L2-normalise -> head.fc; then Scale-GeM over the
    scales and L2-normalise. A module that is None is left out: instead of GeM+, GeM with the trained
    power is used; instead of Scale-GeM, the mean over the scales.

    Shao et al., "Global Features are All You Need for Image Retrieval and Reranking", ICCV 2023.

    Args:
        encoder: the encoder with its head, trainable or folded; ReLU+ is the encoder's own argument.
        scales: factors by which the images are resized.
        gemp, rgem, sgem: the pooling modules.
    """

    def __init__(
        self,
        encoder: ResNet | FoldedResNet,
        scales: Sequence[float],
        gemp: GeMPlus | None,
        rgem: RegionalGeM | None,
        sgem: ScaleGeM | None,
    ):
        super().__init__()
        self.encoder, self.scales = encoder, tuple(scales)
        self.pooling = GeM(self._head.pool["p"].item()) if gemp is None else gemp
        self.rgem, self.sgem = rgem, sgem
        self.fused_pooling = rgem is not None and max(rgem.p, self.pooling.p) <= SAFE_POWER

    @property
    def _head(self) -> Head:
        if self.encoder.head is None:
            raise ValueError(f"an encoder that stops in an earlier stage has no head: {self.encoder!r}")
        return self.encoder.head

    def forward(self, x: Tensor) -> Tensor:
        return multi_scale_descriptor(x, self.encoder, self.pool, None, self.project, self.sgem, self.scales)

    def pool(self, feature_map: Tensor) -> Tensor:
        """Returns the pooled map: Regional-GeM and GeM+, on a GPU in one kernel. (N, C, h, w) -> (N, C)."""
        if self.fused_pooling and self.rgem is not None and feature_map.is_cuda and not feature_map.requires_grad:
            try:
                # Imported here, because without a GPU Triton would take 0.2 s and 7 MB of each process.
                from modules.fused_pooling import regional_gem

                return regional_gem(feature_map, self.rgem.p, self.rgem.window, self.pooling.p, self.pooling.eps)
            except Exception as error:  # Triton is missing, or raises any exception, as without a compiler
                if is_out_of_memory(error):
                    raise
                log.debug("Regional-GeM and GeM+ in two passes: %s", error)
                self.fused_pooling = False
        return self.pooling(feature_map if self.rgem is None else self.rgem(feature_map))

    def project(self, rows: Tensor) -> Tensor:
        """Projects rows with the same kernel for any R, so that no row depends on the others. (R, C) -> (R, D)."""
        padded = F.pad(rows, (0, 0, 0, -len(rows) % _PROJECTED_TOGETHER))
        return torch.cat([self._head(part) for part in padded.split(_PROJECTED_TOGETHER)])[: len(rows)]

    def extra_repr(self) -> str:
        return f"scales={self.scales}"
