"""Extractors turn pixels into descriptors: the protocol, and its usual form, a network with its normalisation."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Extractor(Protocol):
    """The interface that extraction.extract uses to compute the descriptors of images.

    Attributes:
        dim: D, dimensions of a descriptor.
        device: the device of the input pixels and of the returned descriptors.
    """

    dim: int

    @property
    def device(self) -> torch.device: ...

    def __call__(self, pixels: Tensor) -> Tensor:
        """Returns the descriptors of images of equal size. (N, H, W, 3) uint8 RGB -> (N, D) unit descriptors.

        A descriptor must not depend on the other images of its batch.
        """
        ...


def limit_side(normalise: Callable[[Tensor], Tensor], side: int | None) -> Callable[[Tensor], Tensor]:
    """Returns a normalisation that first reduces the longer side of images to this length (bilinear, antialiased).

    Args:
        normalise: as in NetworkExtractor.
        side: the longer side in pixels; None leaves images as they are.
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
    """An Extractor that consists of a network and the normalisation with which it was trained.

    Args:
        network: normalised images (N, 3, H, W) -> unit descriptors (N, D).
        normalise: (N, H, W, 3), uint8 RGB or floating-point RGB in 0..1 -> (N, 3, H, W).
        dim: D.
        scales: factors by which the network resizes images, to estimate the memory of a batch.
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
