"""The recipe of a descriptor: everything that it depends on except its image."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backbone import Backbone, FeatureMap
from model.checkpoint import sha256
from model.cvnet import ResNet
from model.errors import InputError, nearest, short_list
from model.extractor import NetworkExtractor
from model.folding import FoldedResNet
from model.libraries import (
    CVNET,
    build_backbone,
    comes_with_weights,
    is_user_file,
    place_in,
    short_name,
    weights_digest,
)
from model.whitening import load_whitening
from modules.activation import RECTIFIERS, RELUP_THRESHOLD, replace_rectifiers
from modules.attach import way_to_map
from modules.descriptor import SCALES, SuperGlobal
from modules.pooling import GEMP_P, RGEM_P, RGEM_WINDOW, SGEM_P, GeM, GeMPlus, RegionalGeM, ScaleGeM
from modules.whitening import Whitening

# The poolings by name, each created from the power of GeM+ (None for GeM) and the trained power of GeM.
POOLINGS: dict[str, Callable[[float | None, float], nn.Module]] = {
    "gem": lambda gemp_p, gem_p: GeM(gem_p) if gemp_p is None else GeMPlus(gemp_p),
    "average": lambda gemp_p, gem_p: nn.AdaptiveAvgPool2d(1),
    "max": lambda gemp_p, gem_p: nn.AdaptiveMaxPool2d(1),
}
CLASS_TOKEN = "class"  # a map with one position, whose average it is
WHOLE = "none"  # the network returns descriptors, which are such a map, too
# Requirements on images that replace those of the backbone.
_REQUIREMENTS = ("mean", "std", "size", "multiple")
_PLAIN_GEM = 3.0  # the power of GeM with which most retrieval networks were trained

_CHECKED_SIZE = (67, 83)  # of an image that any network should take, as images have any size

# Matrix products with another number of rows may add in another order.
_PROJECTED_TOGETHER = 16


@dataclass(frozen=True)
class Recipe:
    """All settings of a descriptor: the network, its weights, and the parameters of each module.

    A recipe creates the network, and the provenance that is saved beside descriptors and compared before
    they are reused. The defaults are the paper's.

    Attributes:
        network: cvnet, timm:NAME, torchvision:NAME, hub:... or FILE.py:FUNCTION, see model.libraries.build_backbone.
        weights: the checkpoint; for other networks than CVNet's also "pretrained" or "untrained".
        depth: number of layers of CVNet's ResNet, 50 or 101.
        reduction_dim: dimensions of the projection in CVNet's checkpoint.
        scales: factors by which images are resized.
        relup_threshold: threshold of ReLU+; None for the plain ReLU everywhere.
        relup_stages, relup_ends: where ReLU+ goes, as in attach; None for the backbone's own places.
        pooling: gem, average, max, class (the class token of a transformer) or none (the network returns descriptors).
        gemp_p: power of GeM+; None for GeM with the trained power, or 3 if the network has none.
        rgem_p: power of Regional-GeM; None leaves it out.
        rgem_window: side of its window, in positions of the feature map.
        sgem_p: power of Scale-GeM, infinity for the maximum; None for the mean over the scales.
        precision: precision of the network, fp32, bf16 or fp16; everything after the feature map is in fp32.
        max_side: images with a longer side are reduced to it when they are read; None, as in the paper, for no limit.
        whitening: a file of a learnt whitening, which shortens the descriptors; None for none.
        mean, std, size, multiple: requirements of another network than CVNet's on its images, see Backbone; None for
            what the backbone says.
    """

    network: str = CVNET
    weights: Path | str = "pretrained"
    depth: int = 50
    reduction_dim: int = 2048
    scales: tuple[float, ...] = SCALES
    relup_threshold: float | None = RELUP_THRESHOLD
    relup_stages: tuple[str, ...] | None = None
    relup_ends: tuple[str, ...] | None = None
    pooling: str = "gem"
    gemp_p: float | None = GEMP_P
    rgem_p: float | None = RGEM_P
    rgem_window: int = RGEM_WINDOW
    sgem_p: float | None = SGEM_P
    precision: str = "fp32"
    max_side: int | None = None
    whitening: Path | str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[int, int] | None = None
    multiple: int | None = None

    @property
    def is_cvnet(self) -> bool:
        return self.network == CVNET

    @property
    def weights_in_words(self) -> str:
        """The network and where its weights come from, as text."""
        if self.is_cvnet:
            return str(self.weights)
        as_built = comes_with_weights(self.network) and str(self.weights) in ("pretrained", "untrained")
        return f"{self.network}, {'weights as the function returns them' if as_built else self.weights}"

    @property
    def title(self) -> str:
        """The network in a few words."""
        return f"CVNet's ResNet-{self.depth}" if self.is_cvnet else short_name(self.network)

    @cached_property
    def backbone(self) -> Backbone:
        """The network with its weights, built once.

        Raises:
            InputError: if the network is unknown, or the weights are missing or do not fit.
        """
        built = build_backbone(self.network, self.weights, self.depth, self.reduction_dim, self.pooling == WHOLE)
        given = {name: value for name in _REQUIREMENTS if (value := getattr(self, name)) is not None}
        if given and self.is_cvnet:
            raise InputError(f"CVNet's network was trained with its own {', '.join(given)}; leave them out")
        return replace(built, **given)

    @cached_property
    def weights_sha256(self) -> str:
        """The SHA-256 of CVNet's checkpoint; of other networks that of the weights and their names."""
        return sha256(Path(self.weights)) if self.is_cvnet else weights_digest(self.backbone.network)

    @cached_property
    def relup_places(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the submodules in which every ReLU becomes ReLU+, and of the stages whose blocks end in it."""
        if self.relup_threshold is None:
            return (), ()
        backbone = self.backbone
        usual = self.pooling != WHOLE and all(hasattr(backbone.network, f"layer{number}") for number in (1, 2, 3))

        def places(choice: Sequence[str] | None, default: Sequence[str] | None, paper: tuple[str, ...]) -> tuple:
            return tuple(next((each for each in (choice, default) if each is not None), paper if usual else ()))

        return (
            places(self.relup_stages, backbone.relup_stages, ("layer1",)),
            places(self.relup_ends, backbone.relup_ends, ("layer2", "layer3")),
        )

    @property
    def rectifier_stages(self) -> list[str]:
        """The names of the network's submodules that have a ReLU."""
        children = self.backbone.network.named_children()
        return [name for name, child in children if any(isinstance(each, RECTIFIERS) for each in child.modules())]

    @property
    def idle_modules(self) -> list[str]:
        """The modules that are on but change nothing, given the network, the pooling and the scales."""
        idle = {
            "GeM+": self.gemp_p is not None and self.pooling != "gem",
            "Scale-GeM": self.sgem_p is not None and len(self.scales) == 1,
            "ReLU+": self.relup_threshold is not None and not any(self.relup_places),
        }
        return [name for name, is_idle in idle.items() if is_idle]

    @property
    def modules_in_words(self) -> str:
        """The modules after the feature map, and the scales, as text."""
        modules, scales = self.descriptor, ", ".join(f"{factor:g}" for factor in self.scales)
        parts = [modules.rgem, "the network's own descriptors" if self.pooling == WHOLE else modules.pooling]
        if len(self.scales) > 1:
            parts.append(modules.sgem or "mean over the scales")
        return f"{', '.join(str(each) for each in parts if each is not None)}, scales {scales}"

    def in_words(self) -> Iterator[str]:
        """Yields what applies, line by line: the weights, the modules, the layers that ReLU+ changed, normalisation."""
        backbone, modules = self.backbone, self.descriptor
        yield f"weights: {self.weights_in_words}, SHA-256 {self.weights_sha256}"
        if backbone.unfilled:
            yield f"parameters that came from no file: {short_list(backbone.unfilled)}"
        yield f"modules: {self.modules_in_words}"
        if self.idle_modules:
            yield f"without effect on this network at these scales: {', '.join(self.idle_modules)}"
        if modules.changes:
            places = [*self.relup_places[0], *(f"the ends of {stage}" for stage in self.relup_places[1])]
            yield f"ReLU+ ({self.relup_threshold}) in {len(modules.changes)} layers: {short_list(places)}"
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (backbone.mean, backbone.std))
        yield f"normalisation: {backbone.channels}, mean {mean}, std {std}"
        if self.whitening is not None:
            yield f"whitening: {self.whitening}"

    @cached_property
    def _learnt_whitening(self) -> tuple[Whitening, dict[str, Any]] | None:
        return None if self.whitening is None else load_whitening(Path(self.whitening))

    @property
    def whitening_provenance(self) -> dict[str, Any]:
        """What the whitening was learnt from, as recorded in its file; empty without one."""
        return self._learnt_whitening[1] if self._learnt_whitening else {}

    def settings(self) -> dict[str, Any]:
        """Returns the settings that apply, except network, weights and whitening, as JSON."""
        left_out = {"network", "weights", "whitening", *_REQUIREMENTS}  # the last are in provenance()
        left_out |= set() if self.is_cvnet else {"depth", "reduction_dim"}
        settings = {name: value for name, value in asdict(self).items() if name not in left_out}
        if not any(self.relup_places):
            settings["relup_threshold"] = None
        if self.pooling != "gem":
            settings["gemp_p"] = None
        if len(self.scales) == 1:
            settings["sgem_p"] = None
        if not self.is_cvnet:
            settings |= dict(zip(("relup_stages", "relup_ends"), self.relup_places, strict=True))
        return settings

    def provenance(self) -> dict[str, Any]:
        """Returns what descriptors depend on beside code and image: settings, weights and what images go through."""
        facts = {"network": short_name(self.network), "weights_sha256": self.weights_sha256, **self.settings()}
        if not self.is_cvnet:
            facts |= {**self.backbone.image_requirements(), **self.backbone.provenance}
        if self.whitening is not None:
            facts |= {"whitening_sha256": sha256(Path(self.whitening)), "dim": self.dim}
        return facts

    def check(self) -> None:
        """Raises InputError if network, weights, modules or whitening do not fit, before any long computation."""
        _ = self.dim

    @cached_property
    def _descriptor_dim(self) -> int:
        """D before the whitening."""
        network = self.descriptor
        if self.is_cvnet:
            return self.reduction_dim
        try:
            with torch.inference_mode():
                return network(self.backbone.normalise(torch.full((1, *_CHECKED_SIZE, 3), 0.5))).shape[1]
        except ValueError as error:
            raise InputError(f"{self.network}: {' '.join(str(error).split())}") from None
        except Exception as error:  # the code of a network raises any exception
            where = self.network
            if is_user_file(where):
                where = place_in(Path(where.rpartition(":")[0]), error)
            text = " ".join(str(error).split())[:300] or type(error).__name__
            if not self.backbone.size:
                text += "; if it takes only one size of images, or multiples of a patch, give its size or multiple"
            size = " x ".join(map(str, _CHECKED_SIZE))
            raise InputError(f"{where} fails for an image of {size} pixels: {text}") from None

    @cached_property
    def dim(self) -> int:
        """D, the dimensions of a descriptor."""
        dim = self._descriptor_dim
        if self._learnt_whitening is None:
            return dim
        whitening, learnt_from = self._learnt_whitening
        width = whitening.projection.shape[1]
        if width != dim:
            raise InputError(f"{self.whitening} takes descriptors of {width} dimensions, but these have {dim}")
        before = learnt_from.get("descriptors", {})
        now = {"weights_sha256": self.weights_sha256, "network": short_name(self.network)}
        if differing := [key for key, value in now.items() if before.get(key, value) != value]:
            raise InputError(
                f"{self.whitening} was learnt from descriptors of another network ({', '.join(differing)} differ)"
            )
        return whitening.dim

    def extractor(self, device: torch.device | str = "cpu") -> NetworkExtractor:
        """Returns the network with normalisation and whitening. (N, H, W, 3) uint8 RGB -> (N, D) unit descriptors.

        A recipe has one network: a call with another device moves it there.

        Raises:
            InputError: as check.
        """
        self.check()
        network: nn.Module = self.descriptor
        if self._learnt_whitening is not None:
            network = nn.Sequential(network, self._learnt_whitening[0].float())
        return NetworkExtractor(network.to(device), self.backbone.normalise, self.dim, self.scales).eval()

    @cached_property
    def descriptor(self) -> SuperGlobal:
        """The network with the modules, folded and fused where that is possible. (N, 3, H, W) -> (N, D)."""
        backbone = self.backbone
        self._check_modules(backbone)
        pooling = POOLINGS["average" if self.pooling in (CLASS_TOKEN, WHOLE) else self.pooling]
        try:
            changes = replace_rectifiers(backbone.network, *self.relup_places, self.relup_threshold or 0.0)
            model: nn.Module
            if isinstance(backbone.network, ResNet):
                model = FoldedResNet(backbone.network, self.precision)
            else:
                model = FeatureMap(backbone, self._features(backbone), self.precision)
            network = SuperGlobal(
                model,
                (),
                pooling(self.gemp_p, backbone.gem_p or _PLAIN_GEM),
                None if self.rgem_p is None else RegionalGeM(self.rgem_p, self.rgem_window),
                None if self.sgem_p is None or len(self.scales) == 1 else ScaleGeM(self.sgem_p),
                self.scales,
                _projection(backbone),
                changes,
            )
        except ValueError as error:
            raise InputError(f"{self.network}: {error}") from None
        return network.eval().requires_grad_(False)

    def _features(self, backbone: Backbone) -> Any:
        """Returns the names that lead to the feature map, or a function that returns it."""
        token, features = backbone.class_token, backbone.features
        if self.pooling == CLASS_TOKEN and token is not None:
            return lambda x: token(x)[:, :, None, None]  # a map with one position
        if self.pooling == WHOLE:
            return lambda x: _descriptors(backbone.network, x)[:, :, None, None]
        if features is None:
            return way_to_map(backbone.network)
        return (features,) if isinstance(features, str) else features

    def _check_modules(self, backbone: Backbone) -> None:
        """Raises InputError if the modules do not fit the feature map, or the scales the network."""
        if self.pooling not in (*POOLINGS, CLASS_TOKEN, WHOLE):
            hint = nearest(self.pooling, POOLINGS) or f"there are {', '.join(POOLINGS)}, {CLASS_TOKEN}, {WHOLE}"
            raise InputError(f"there is no pooling {self.pooling!r}; {hint}")
        signs = "needs a positive feature map, and tokens have both signs"
        if self.pooling == CLASS_TOKEN:
            if backbone.class_token is None:
                raise InputError(f"{self.network} has no class token; choose another pooling")
            if self.rgem_p is not None:
                raise InputError("Regional-GeM needs a feature map, and a class token is not one; leave it out")
        elif self.pooling == WHOLE:
            if isinstance(backbone.network, ResNet):
                raise InputError("CVNet's network returns a feature map; choose a pooling")
            if self.rgem_p is not None:
                raise InputError("Regional-GeM needs a feature map, and a descriptor is not one; leave it out")
        elif backbone.tokens and self.pooling == "gem":
            raise InputError(f"{self.network}: GeM {signs}; choose the pooling average")
        elif backbone.tokens and self.rgem_p is not None:
            raise InputError(f"{self.network}: Regional-GeM {signs}; leave it out")
        if backbone.size and self.scales != (1.0,):
            raise InputError(
                f"{self.network} only takes images of {' x '.join(map(str, backbone.size))} pixels, at a single scale"
            )


def _descriptors(network: nn.Module, x: Tensor) -> Tensor:
    """Returns what a network returns, if it is descriptors (N, D). Raises ValueError otherwise."""
    result = network(x)
    if isinstance(result, Tensor) and result.ndim == 2:
        return result
    shape = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
    raise ValueError(
        f"{type(network).__name__} returns {shape}, not descriptors (N, D); write a function that returns a network "
        "with these only"
    )


def _projection(backbone: Backbone) -> nn.Module | None:
    if backbone.projection is None:
        return None
    projection = attrgetter(backbone.projection)(backbone.network)
    return _EqualRows(projection) if isinstance(projection, nn.Linear) else projection


class _EqualRows(nn.Module):
    """A projection with one kernel for any number of rows, so that no row depends on the others. (R, C) -> (R, D)."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear, self.in_features = linear, linear.in_features

    def forward(self, rows: Tensor) -> Tensor:
        padded = F.pad(rows, (0, 0, 0, -len(rows) % _PROJECTED_TOGETHER))
        return torch.cat([self.linear(part) for part in padded.split(_PROJECTED_TOGETHER)])[: len(rows)]
