"""Descriptors of any network: a backbone by its name, with SuperGlobal's modules attached."""

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
_PLAIN_GEM = 3.0  # the power of GeM that most networks of the field were trained with


@dataclass(frozen=True)
class NetworkRecipe:
    """How descriptors are made with a network other than CVNet's; it takes the place of model.recipe.Recipe.

    Attributes:
        network: timm:NAME, torchvision:NAME or FILE.py:FUNCTION, see model.networks.build_backbone.
        weights: a file, "pretrained" or "untrained".
        scales: factors by which images are resized.
        relup: threshold of ReLU+; None leaves it out.
        relup_stages, relup_ends: the submodules in which every ReLU becomes ReLU+, and the stages whose blocks end
            in it; None for the paper's in a ResNet (layer1; layer2, layer3), and none in other networks.
        pooling: gem, average, max or class (the class token of a transformer).
        gemp: power of GeM+; None for GeM with p = 3.
        rgem, rgem_window, sgem: as in Recipe.
        precision: of the network, fp32, bf16 or fp16; what follows the map is in fp32.
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
        """Where the weights are from, in words."""
        return f"{self.network}, {self.weights}"

    @cached_property
    def checkpoint_sha256(self) -> str:
        """Of the weights by their names, wherever they are from."""
        return self._first[1]

    @cached_property
    def dim(self) -> int:
        return self._first[2]

    def settings(self) -> dict[str, Any]:
        """All but the weights, as JSON can hold it."""
        names = ("scales", "relup", "relup_stages", "relup_ends", "pooling", "gemp", "rgem", "rgem_window", "sgem")
        return {name: getattr(self, name) for name in (*names, "precision", "max_side")}

    def provenance(self) -> dict[str, Any]:
        """What descriptors are made from, to be kept with them: settings, weights, and what images become."""
        backbone = self._first[0]
        return {
            "network": short_name(self.network),
            "checkpoint_sha256": self.checkpoint_sha256,
            **self.settings(),
            **{name: getattr(backbone, name) for name in ("mean", "std", "channels", "smallest", "multiple", "size")},
            **backbone.provenance,
        }

    def check(self) -> None:
        """Raises InputError if the network, its weights or the modules do not fit; for before the long work."""
        _ = self.dim

    @cached_property
    def _first(self) -> tuple[Backbone, str, int]:
        """The backbone, the hash of its weights as they came, and the dimensions of a descriptor."""
        backbone = build_backbone(self.network, self.weights)
        digest = weights_digest(backbone.network)
        attached = self._attach(backbone)
        try:
            with torch.inference_mode():
                dim = attached(backbone.normalise(torch.full((1, 64, 64, 3), 0.5))).shape[1]
        except (ValueError, RuntimeError, TypeError) as error:
            text = " ".join(str(error).replace("_Map gives", "it gives").split())
            raise InputError(f"{self.network}: {text}") from None
        return backbone, digest, dim

    def attached(self) -> Attached:
        """Returns a network of its own with the modules attached. (N, 3, H, W), normalised -> (N, D) unit rows."""
        return self._attach(build_backbone(self.network, self.weights))

    def extractor(self, device: torch.device | str = "cpu") -> NetworkExtractor:
        """Returns the network with its normalisation. (N, H, W, 3) uint8 RGB -> (N, D) unit rows."""
        backbone = build_backbone(self.network, self.weights)
        attached = self._attach(backbone).eval().to(device)
        return NetworkExtractor(attached, limit_side(backbone.normalise, self.max_side), self.dim, self.scales).eval()

    def _attach(self, backbone: Backbone) -> Attached:
        network = backbone.network
        features, projection, rgem = backbone.features, backbone.projection, self.rgem
        if self.pooling == "class":
            if backbone.class_token is None:
                raise InputError(f"{self.network} has no class token", pooling="gem")
            if rgem is not None:
                raise InputError("a class token is no map, which Regional-GeM needs", rgem=None)
            network, features = _ClassToken(network, backbone.class_token), ()
        elif backbone.tokens and self.pooling == "gem":
            raise InputError(
                f"{self.network}: its tokens have both signs, and GeM is for maps that are positive", pooling="average"
            )
        elif backbone.tokens and rgem is not None:
            raise InputError(
                f"{self.network}: its tokens have both signs, and Regional-GeM is for maps that are positive", rgem=None
            )
        if backbone.size and self.scales != (1.0,):
            raise InputError(
                f"{self.network} takes images of {' x '.join(map(str, backbone.size))} pixels alone, one scale of them",
                scales=(1.0,),
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
        """The stages of ReLU+ by their names in the backbone's network."""
        if self.relup is None:
            return [], []
        network = backbone.network
        inner = "network." if isinstance(getattr(network, "network", None), nn.Module) else ""
        usual = all(hasattr(getattr(network, "network", network), f"layer{n}") for n in (1, 2, 3))
        stages = (("layer1",) if usual else ()) if self.relup_stages is None else self.relup_stages
        ends = (("layer2", "layer3") if usual else ()) if self.relup_ends is None else self.relup_ends
        return [inner + stage for stage in stages], [inner + stage for stage in ends]


class _ClassToken(nn.Module):
    """A transformer's class token as a map of one position, (N, C, 1, 1)."""

    def __init__(self, network: nn.Module, token: Any):
        super().__init__()
        self.network, self.token = network, token

    def forward(self, x: Tensor) -> Tensor:
        return self.token(x)[:, :, None, None]


class _Map(nn.Module):
    """A network's map of images of any size, in half precision (autocast) where asked for; the map is float32.

    What the network gives instead, if that is no map, passes through, for Attached to tell.
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
