"""A backbone: a trained network that gives a feature map, and what it needs of its images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.descriptor import name_of

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALLEST = 32  # shortest side in pixels: smaller images are enlarged, because most networks have a stride of 32
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Backbone:
    """A trained network, what it gives and what it needs. A user's function returns one, or just the network.

    Attributes:
        network: the network in evaluation mode.
        features: names of the methods or submodules that lead from images to the feature map, as in attach, or a
            function that returns the map (N, C, h, w); None detects them.
        mean, std: of RGB in 0..1, in the channel order of the network.
        channels: the channel order, "RGB" or "BGR".
        tokens: whether the feature map consists of a transformer's tokens, which have both signs.
        smallest: at each scale, images with a shorter side than this are enlarged.
        multiple: at each scale, sides are enlarged to multiples of this many pixels.
        size: (height, width), if the network accepts no other; images are then resized to it.
        class_token: a function from images to the class token (N, C), if there is one.
        projection: the name of the submodule to apply after the pooling, or None.
        gem_p: the power of GeM with which the network was trained; None if it is unknown.
        relup_stages, relup_ends: where ReLU+ goes by default, as in attach; None for the paper's choice in a ResNet
            with layer1, layer2 and layer3, and for nowhere in any other network.
        provenance: what the network depends on beside its weights.
        unfilled: names of the parameters that came from no file.
    """

    network: nn.Module
    features: str | Sequence[str] | Callable[[Tensor], Tensor] | None = None
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    channels: str = "RGB"
    tokens: bool = False
    smallest: int = SMALLEST
    multiple: int = 1
    size: tuple[int, int] | None = None
    class_token: Callable[[Tensor], Tensor] | None = None
    projection: str | None = None
    gem_p: float | None = None
    relup_stages: Sequence[str] | None = None
    relup_ends: Sequence[str] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    unfilled: Sequence[str] = ()

    def image_requirements(self) -> dict[str, Any]:
        """Returns what the network needs of its images, as JSON."""
        names = ("mean", "std", "channels", "smallest", "multiple", "size")
        return {name: getattr(self, name) for name in names}

    def normalise(self, pixels: Tensor) -> Tensor:
        """Normalises images. (N, H, W, 3) RGB, uint8 or floating-point in 0..1 -> (N, 3, H, W), of a supported size."""
        x = pixels.permute(0, 3, 1, 2).contiguous()
        if self.channels == "BGR":
            x = x.flip(1)
        x = x.float().div_(255) if x.dtype == torch.uint8 else x.float()
        if self.size is not None and self.size != x.shape[2:]:
            x = F.interpolate(x, self.size, mode="bilinear", align_corners=False, antialias=True).clamp_(0, 1)
        return (x - per_channel(self.mean, x.device)).div_(per_channel(self.std, x.device))

    def fitted(self, x: Tensor) -> Tensor:
        """Returns images of one scale, enlarged if a side is below `smallest` or not a multiple. (N, 3, H, W)."""
        factor = max(1.0, self.smallest / min(x.shape[2:]))
        sides = [-(-round(side * factor) // self.multiple) * self.multiple for side in x.shape[2:]]
        return x if sides == [*x.shape[2:]] else F.interpolate(x, sides, mode="bilinear", align_corners=False)


class FeatureMap(nn.Module):
    """Returns the feature map of images of any size, computed in half precision (autocast) if set. (N, 3, H, W).

    Anything else that the network returns is passed through, so that the descriptor module can report it.

    Args:
        backbone: the network and its requirements.
        features: the names of the methods or submodules that lead to the map, or a function.
        precision: fp32, bf16 or fp16.
    """

    def __init__(self, backbone: Backbone, features: Sequence[str] | Callable[[Tensor], Tensor], precision: str):
        super().__init__()
        self.network, self.features, self.fitted = backbone.network, features, backbone.fitted
        self.dtype = dtype_of(precision)
        self.__name__ = name_of(backbone.network)  # for error messages

    def forward(self, x: Tensor) -> Tensor:
        x = self.fitted(x)
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if callable(self.features):
                return self.features(x)
            for name in self.features:
                x = attrgetter(name)(self.network)(x)
            return x if self.features else self.network(x)


def dtype_of(precision: str) -> torch.dtype:
    """Returns the dtype of a precision: fp32, bf16 or fp16. Raises a ValueError for any other word."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    return PRECISIONS[precision]


def per_channel(values: Sequence[float], device: torch.device) -> Tensor:
    """Returns a value per channel, (C, 1, 1), filled on the device: a copy to it would wait for all queued work."""
    return torch.stack([torch.full((1, 1), float(value), device=device) for value in values])
