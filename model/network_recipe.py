"""Descriptors of any network: a backbone by name, with SuperGlobal's modules attached."""

from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from model.errors import InputError
from model.extractor import NetworkExtractor, limit_side
from model.networks import Backbone, build_backbone, short_name, weights_digest
from modules.activation import RELUP_THRESHOLD
from modules.attach import Attached, attach
from modules.descriptor import SCALES
from modules.pooling import GEMP_P, RGEM_P, RGEM_WINDOW, SGEM_P, GeM, GeMPlus, RegionalGeM, ScaleGeM

POOLINGS = ("gem", "average", "max", "class")
_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_PLAIN_GEM = 3.0  # the power of GeM with which most retrieval networks were trained


@dataclass(frozen=True)
class NetworkRecipe:
    """The settings for descriptors of a network other than CVNet's; a counterpart of model.recipe.Recipe.

    Attributes:
        network: timm:NAME, torchvision:NAME or FILE.py:FUNCTION, see model.networks.build_backbone.
        weights: a file, "pretrained" or "untrained".
        scales: factors by which images are resized.
        relup: threshold of ReLU+; None leaves it out.
        relup_stages, relup_ends: the submodules in which every ReLU becomes ReLU+, and the stages whose blocks end
            in it; None stands for the paper's choice in a ResNet (layer1; layer2, layer3), and for none in other
            networks.
        pooling: gem, average, max or class (the class token of a transformer).
        gemp: power of GeM+; None for GeM with p = 3.
        rgem, rgem_window, sgem: as in Recipe.
        precision: precision of the network, fp32, bf16 or fp16; everything after the feature map is in fp32.
        max_side: as in Recipe.
    """

    network: str
    weights: str = "pretrained"
    scales: tuple[float, ...] = SCALES
    relup: float | None = RELUP_THRESHOLD
    relup_stages: tuple[str, ...] | None = None
    relup_ends: tuple[str, ...] | None = None
    pooling: str = "gem"
    gemp: float | None = GEMP_P
    rgem: float | None = RGEM_P
    rgem_window: int = RGEM_WINDOW
    sgem: float | None = SGEM_P
    precision: str = "fp32"
    max_side: int | None = None

    @property
    def checkpoint(self) -> str:
        """Where the weights come from, as text."""
        return f"{self.network}, {self.weights}"

    @cached_property
    def checkpoint_sha256(self) -> str:
        """The SHA-256 of the weights and their names, independent of their file."""
        return self._first[1]

    @cached_property
    def dim(self) -> int:
        return self._first[2]

    def settings(self) -> dict[str, Any]:
        """Returns all settings except the weights, as JSON."""
        names = ("scales", "relup", "relup_stages", "relup_ends", "pooling", "gemp", "rgem", "rgem_window", "sgem")
        return {name: getattr(self, name) for name in (*names, "precision", "max_side")}

    def provenance(self) -> dict[str, Any]:
        """Returns what descriptors depend on, to be saved with them: settings, weights, and image preprocessing."""
        backbone = self._first[0]
        return {
            "network": short_name(self.network),
            "checkpoint_sha256": self.checkpoint_sha256,
            **self.settings(),
            **{name: getattr(backbone, name) for name in ("mean", "std", "channels", "smallest", "multiple", "size")},
            **backbone.provenance,
        }

    def check(self) -> None:
        """Raises InputError if the network, its weights or the modules do not fit, before any long computation."""
        _ = self.dim

    @cached_property
    def _first(self) -> tuple[Backbone, str, int]:
        """Returns the backbone, the hash of its unmodified weights, and the dimensions of a descriptor."""
        backbone = build_backbone(self.network, self.weights)
        digest = weights_digest(backbone.network)
        attached = self._attach(backbone)
        try:
            with torch.inference_mode():
                dim = attached(backbone.normalise(torch.full((1, 64, 64, 3), 0.5))).shape[1]
        except (ValueError, RuntimeError, TypeError) as error:
            text = " ".join(str(error).replace("_Map returns", "it returns").split())
            raise InputError(f"{self.network}: {text}") from None
        return backbone, digest, dim

    def attached(self) -> Attached:
        """Returns a new network with the modules attached. (N, 3, H, W), normalised -> (N, D) unit descriptors."""
        return self._attach(build_backbone(self.network, self.weights))

    def extractor(self, device: torch.device | str = "cpu") -> NetworkExtractor:
        """Returns the network with its normalisation. (N, H, W, 3) uint8 RGB -> (N, D) unit descriptors."""
        backbone = build_backbone(self.network, self.weights)
        attached = self._attach(backbone).eval().to(device)
        return NetworkExtractor(attached, limit_side(backbone.normalise, self.max_side), self.dim, self.scales).eval()

    def _attach(self, backbone: Backbone) -> Attached:
        network = backbone.network
        features, projection, rgem = backbone.features, backbone.projection, self.rgem
        if self.pooling == "class":
            if backbone.class_token is None:
                raise InputError(f"{self.network} has no class token; choose another pooling, such as gem")
            if rgem is not None:
                raise InputError(
                    "Regional-GeM needs a feature map, and a class token is not one; leave Regional-GeM out"
                )
            network, features = _ClassToken(network, backbone.class_token), ()
        elif backbone.tokens and self.pooling == "gem":
            raise InputError(
                f"{self.network}: GeM needs a positive feature map, and tokens have both signs; choose average pooling"
            )
        elif backbone.tokens and rgem is not None:
            raise InputError(
                f"{self.network}: Regional-GeM needs a positive feature map, and tokens have both signs; "
                "leave Regional-GeM out"
            )
        if backbone.size and self.scales != (1.0,):
            raise InputError(
                f"{self.network} only takes images of {' x '.join(map(str, backbone.size))} pixels, at scale 1 alone"
            )
        stages, ends = self._stages(backbone)
        poolings = {
            "gem": GeM(_PLAIN_GEM) if self.gemp is None else GeMPlus(self.gemp),
            "max": nn.AdaptiveMaxPool2d(1),
        }
        try:
            attached = attach(
                network,
                features,
                poolings.get(self.pooling, nn.AdaptiveAvgPool2d(1)),
                None if rgem is None else RegionalGeM(rgem, self.rgem_window),
                None if self.sgem is None else ScaleGeM(self.sgem),
                self.scales,
                projection,
                stages,
                ends,
                self.relup if self.relup is not None else RELUP_THRESHOLD,
            )
        except ValueError as error:
            raise InputError(f"{self.network}: {error}") from None
        if isinstance(projection, str):
            attached.projection = attrgetter(projection)(network)
        attached.model = _Map(backbone, network, attached.path, _HALVES.get(self.precision))
        attached.path = ()
        return attached

    def _stages(self, backbone: Backbone) -> tuple[list[str], list[str]]:
        """Returns the submodules and stages for ReLU+, by their names in the network of the backbone."""
        if self.relup is None:
            return [], []
        network = backbone.network
        inner = "network." if isinstance(getattr(network, "network", None), nn.Module) else ""
        usual = all(hasattr(getattr(network, "network", network), f"layer{n}") for n in (1, 2, 3))
        stages = (("layer1",) if usual else ()) if self.relup_stages is None else self.relup_stages
        ends = (("layer2", "layer3") if usual else ()) if self.relup_ends is None else self.relup_ends
        return [inner + stage for stage in stages], [inner + stage for stage in ends]


class _ClassToken(nn.Module):
    """Returns a transformer's class token as a feature map with one position, (N, C, 1, 1)."""

    def __init__(self, network: nn.Module, token: Any):
        super().__init__()
        self.network, self.token = network, token

    def forward(self, x: Tensor) -> Tensor:
        return self.token(x)[:, :, None, None]


class _Map(nn.Module):
    """Returns the feature map of images of any size, computed in half precision (autocast) if set; it is float32.

    Anything else that the network returns is passed through, so that Attached can report it.
    """

    def __init__(self, backbone: Backbone, network: nn.Module, path: tuple[str, ...], half: torch.dtype | None):
        super().__init__()
        self.network, self.path, self.dtype, self.fitted = network, path, half, backbone.fitted

    def forward(self, x: Tensor) -> Tensor:
        x = self.fitted(x)
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype is not None):
            for name in self.path:
                x = attrgetter(name)(self.network)(x)
            return x if self.path else self.network(x)
