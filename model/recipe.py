"""The recipe of a descriptor: everything it depends on except its image."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from cvnet_rerank.network import CVNetRerank, load_cvnet_rerank
from extraction.images import to_network_input
from model.checkpoint import load_encoder, sha256
from model.extractor import NetworkExtractor, limit_side
from model.folding import FoldedResNet
from model.resnet import ResNet
from model.superglobal import SuperGlobal
from modules.activation import RELUP_THRESHOLD
from modules.descriptor import SCALES
from modules.pooling import GEMP_P, RGEM_P, RGEM_WINDOW, SGEM_P, GeMPlus, RegionalGeM, ScaleGeM


@dataclass(frozen=True)
class Recipe:
    """The settings of the paper's descriptors: the weights, the network and the parameters of each module.

    A recipe creates the network, and the provenance that is saved beside descriptors and compared before
    they are reused. The defaults are the paper's.

    Attributes:
        checkpoint: the file of the weights, in CVNet's or DELG-pytorch's format.
        depth: number of layers of the ResNet, 50 or 101.
        dim: D, dimensions of the descriptor, as in the checkpoint.
        scales: factors by which images are resized.
        relup: threshold of ReLU+; None for the plain ReLU everywhere.
        gemp: power of GeM+; None for GeM with the trained power of the checkpoint.
        rgem: power of Regional-GeM; None leaves it out.
        rgem_window: side of its window, in positions of the feature map.
        sgem: power of Scale-GeM, infinity for the maximum; None for the mean over the scales.
        precision: precision of the encoder, fp32, bf16 or fp16; poolings, norms and projection are in fp32.
        max_side: images with a longer side are reduced to it; None, as in the paper, keeps their size.
    """

    checkpoint: Path
    depth: int = 50
    dim: int = 2048
    scales: tuple[float, ...] = SCALES
    relup: float | None = RELUP_THRESHOLD
    gemp: float | None = GEMP_P
    rgem: float | None = RGEM_P
    rgem_window: int = RGEM_WINDOW
    sgem: float | None = SGEM_P
    precision: str = "fp32"
    max_side: int | None = None

    @cached_property
    def checkpoint_sha256(self) -> str:
        return sha256(self.checkpoint)

    def settings(self) -> dict[str, Any]:
        """Returns all settings except the weights, as JSON."""
        return {
            "depth": self.depth,
            "reduction_dim": self.dim,
            "scales": self.scales,
            "relup": self.relup,
            "gemp": self.gemp,
            "rgem": self.rgem,
            "rgem_window": self.rgem_window,
            "sgem": self.sgem,
            "precision": self.precision,
            "max_side": self.max_side,
        }

    def provenance(self) -> dict[str, Any]:
        """Returns what descriptors depend on, to be saved with them: the settings, and the hash of the weights."""
        return {"checkpoint_sha256": self.checkpoint_sha256, **self.settings()}

    def check(self) -> None:
        """Raises InputError if the checkpoint does not fit the settings, before any long computation."""
        self._encoder()

    def _encoder(self) -> ResNet:
        """Returns the encoder with the weights of the checkpoint."""
        with torch.device("meta"):  # skips the initialisation of weights that the checkpoint replaces
            encoder = ResNet(self.depth, self.dim, self.relup)
        return load_encoder(encoder, self.checkpoint)

    def network(self, device: torch.device | str = "cpu") -> SuperGlobal:
        """Returns the network with the checkpoint's weights, folded for fast inference. (N, 3, H, W) -> (N, D).

        Raises:
            InputError: if the checkpoint cannot be used.
        """
        network = SuperGlobal(
            FoldedResNet(self._encoder(), self.precision),
            self.scales,
            None if self.gemp is None else GeMPlus(self.gemp),
            None if self.rgem is None else RegionalGeM(self.rgem, self.rgem_window),
            None if self.sgem is None else ScaleGeM(self.sgem),
        )
        return network.eval().requires_grad_(False).to(device)

    def extractor(self, device: torch.device | str = "cpu") -> NetworkExtractor:
        """Returns the network with its normalisation. (N, H, W, 3) uint8 RGB -> (N, D) unit descriptors.

        Raises:
            InputError: if the checkpoint cannot be used.
        """
        return NetworkExtractor(
            self.network(device), limit_side(to_network_input, self.max_side), self.dim, self.scales
        ).eval()

    def pair_network(self, device: torch.device | str = "cpu") -> CVNetRerank:
        """Returns the network that scores pairs of images by their local features, from the same checkpoint.

        Raises:
            InputError: if the checkpoint cannot be used, or contains no such network.
        """
        return load_cvnet_rerank(self.checkpoint, self.depth, self.dim, self.precision, device)
