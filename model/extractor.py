"""What turns pixels into descriptors: the protocol, and the usual case, a network with its normalisation."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor, nn


class Extractor(Protocol):
    """Whatever turns images into unit rows; model.extract extracts with any such thing.

    Attributes:
        dim: D, dimensions of a descriptor.
        device: where it wants the pixels, and leaves the descriptors.
    """

    dim: int
    device: torch.device

    def __call__(self, pixels: Tensor) -> Tensor:
        """Returns the descriptors of images of equal size. (N, H, W, 3) uint8 RGB -> (N, D) unit rows.

        A descriptor must not depend on the other images of its batch.
        """
        ...


class NetworkExtractor(nn.Module):
    """An Extractor made of a network and the normalisation that it was trained with.

    Args:
        network: normalised images (N, 3, H, W) -> unit rows (N, D).
        normalise: (N, H, W, 3), uint8 RGB or floating RGB in 0..1 -> (N, 3, H, W).
        dim: D.
        scales: factors by which the network resizes images, for an estimate of the memory that a batch takes.
    """

    def __init__(
        self, network: nn.Module, normalise: Callable[[Tensor], Tensor], dim: int, scales: Sequence[float] = (1.0,)
    ):
        super().__init__()
        self.network, self.normalise, self.dim, self.scales = network, normalise, dim, tuple(scales)

    @property
    def device(self) -> torch.device:
        return next(chain(self.network.parameters(), self.network.buffers())).device

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network(self.normalise(pixels))
