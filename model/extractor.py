"""Extractors turn pixels into descriptors: the protocol, and its usual form, a network with its normalisation."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model.errors import InputError
from modules.matching import Match, match_maps


class Extractor(Protocol):
    """The interface that the room extraction/ uses to compute the descriptors of images.

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

    def match(self, first: Tensor, second: Tensor) -> Match:
        """Returns where two images match, see modules.matching.match_maps. (H, W, 3) RGB each, as in forward.

        Raises:
            InputError: if the parts of this network do not sum to the cosine.
        """
        parts: Any = self.network if isinstance(self.network, nn.Sequential) else [self.network]
        network, *whitening = parts
        a, b = (self.normalise(pixels[None].to(self.device)) for pixels in (first, second))
        try:
            return match_maps(network, a, b, *whitening)
        except ValueError as error:
            raise InputError(f"where the images match cannot be shown: {error}") from None
