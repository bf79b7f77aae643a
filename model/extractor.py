"""What turns pixels into descriptors: the protocol, and the usual case, a network with its normalisation."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Extractor(Protocol):
    """Whatever turns images into unit rows; model.extract extracts with any such thing.

    Attributes:
        dim: D, dimensions of a descriptor.
        device: where it wants the pixels, and leaves the descriptors.
    """

    dim: int

    @property
    def device(self) -> torch.device: ...

    def __call__(self, pixels: Tensor) -> Tensor:
        """Returns the descriptors of images of equal size. (N, H, W, 3) uint8 RGB -> (N, D) unit rows.

        A descriptor must not depend on the other images of its batch.
        """
        ...


def limit_side(normalise: Callable[[Tensor], Tensor], side: int | None) -> Callable[[Tensor], Tensor]:
    """Returns the normalisation of images that are first made smaller, bilinear with antialiasing, to this longer side.

    Args:
        normalise: as of NetworkExtractor.
        side: in pixels; None leaves images as they are.
    """
    if side is None:
        return normalise

    def limited(pixels: Tensor) -> Tensor:
        height, width = pixels.shape[1:3]
        factor = side / max(height, width)
        if factor >= 1:
            return normalise(pixels)
        x = pixels.permute(0, 3, 1, 2)
        x = x.float().div(255) if pixels.dtype == torch.uint8 else x
        sides = [max(1, round(length * factor)) for length in (height, width)]
        x = F.interpolate(x, sides, mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)
        return normalise(x.permute(0, 2, 3, 1))

    return limited


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
