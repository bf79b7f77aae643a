"""Attach SuperGlobal's modules to a trained network: images -> unit descriptors, without training."""

import math
import warnings
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .activation import RELUP_THRESHOLD, ReLUPlus, relu_plus
from .checks import check_tensor, values_can_be_seen
from .descriptor import SCALES, multi_scale_descriptor
from .pooling import GeMPlus, RegionalGeM, ScaleGeM

# These have no state, so that all networks can share them.
_GEMP, _RGEM, _SGEM = GeMPlus(), RegionalGeM(), ScaleGeM()

# torchvision's networks whose forward calls their children in order; the feature map is the input of `avgpool`.
_IN_ORDER = ("ResNet", "ConvNeXt", "EfficientNet", "RegNet", "VGG", "AlexNet", "MobileNetV3", "SwinTransformer")
# Attributes under which other networks usually provide their feature map.
_USUAL = ("forward_features", "extract_features", "features", "backbone", "encoder", "trunk")

_Part = TypeVar("_Part")
_RELU = (nn.ReLU, nn.ReLU6)
_OF_THE_BATCH = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


class Change(NamedTuple):
    """A change that attach made to one layer of the network."""

    layer: str
    original: nn.Module | None  # the layer that was replaced, if one was
    hook: Any  # the handle of the hook, if one was added
    meaning: str


class Attached(nn.Module):
    """A network with SuperGlobal's modules, created by :func:`attach`. (N, 3, H, W) -> (N, D), unit descriptors.

    See :func:`multi_scale_descriptor` for what it computes.

    Args: see :func:`attach`. `path` names the attributes of `model` that are called one after the other
    to compute the feature map; it is empty if calling the model itself returns the map.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        path: Sequence[str] = (),
        pooling: nn.Module | str = _GEMP,
        rgem: nn.Module | None = _RGEM,
        sgem: nn.Module | None = _SGEM,
        scales: Sequence[float] = SCALES,
        projection: nn.Module | str | None = None,
    ):
        super().__init__()
        self.model: Any = model  # a network, or a function
        self.path = tuple(path)
        self.pooling, self.rgem, self.sgem, self.projection = pooling, rgem, sgem, projection
        if not isinstance(scales, Sequence) or not scales or not all(0 < factor < math.inf for factor in scales):
            raise ValueError(f"scales must be one or more positive factors such as {SCALES}, got {scales!r}")
        self.scales = tuple(float(factor) for factor in scales)
        self.changes: list[Change] = []
        self.detached = False

    def forward(self, x: Tensor) -> Tensor:
        if self.detached:
            raise RuntimeError("the network was detached; attach it again")
        project = None if self.projection is None else self.project
        return multi_scale_descriptor(x, self.feature_map, self.pool, self.rgem, project, self.sgem, self.scales)

    def feature_map(self, x: Tensor) -> Tensor:
        """Returns the network's feature map at one scale. (N, 3, H, W) -> (N, C, h, w), float32 or float64."""
        for name in self.path:
            x = attrgetter(name)(self.model)(x)
        if not self.path:
            x = self.model(x)
        if not isinstance(x, Tensor) or x.ndim != 4:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            there = [name for name in _USUAL if hasattr(self.model, name) and name not in self.path]
            raise ValueError(
                f"{_name(self.model)}{''.join('.' + name for name in self.path[-1:])} returns {got}, not a feature map "
                "(N, C, H, W); name the method or submodule that returns one, features="
                f"{' or '.join(map(repr, there)) or '...'}, or attach a function that does (see attach for a ViT)"
            )
        width = getattr(self.model, "num_features", None)
        if width is not None and x.shape[1] != width == x.shape[-1]:
            raise ValueError(
                f"{_name(self.model)} returns (N, H, W, C), shape {tuple(x.shape)}; attach a function that returns "
                "(N, C, H, W): lambda x: model.forward_features(x).permute(0, 3, 1, 2)"
            )
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x  # powers overflow half precision

    def pool(self, x: Tensor) -> Tensor:
        """Returns the pooled vector of one scale, before the projection. (N, C, h, w) -> (N, C)."""
        pooled = self._part(self.pooling)(x)
        if pooled.ndim == 4 and pooled.shape[2:] == (1, 1):
            pooled = pooled.flatten(1)
        if pooled.ndim != 2:
            raise ValueError(f"the pooling returns shape {tuple(pooled.shape)} for a map {tuple(x.shape)}, not (N, C)")
        return pooled

    def project(self, rows: Tensor) -> Tensor:
        """Applies the projection, if there is one. (R, C) -> (R, D)."""
        if self.projection is None:
            return rows
        projection = self._part(self.projection)
        width = getattr(projection, "in_features", rows.shape[1])
        if width != rows.shape[1]:
            raise ValueError(f"the projection takes (N, {width}), the pooled vectors are {tuple(rows.shape)}")
        weight = next(projection.parameters(), rows)
        return projection(rows.to(weight.dtype)).to(rows.dtype)

    def _part(self, part: nn.Module | str) -> nn.Module:
        return attrgetter(part)(self.model) if isinstance(part, str) else part

    def detach(self) -> nn.Module:
        """Undoes the changes that attach made to the network and returns it; this module cannot be used afterwards."""
        for change in self.changes:
            if change.original is not None:
                _replace(self.model, change.layer, change.original)
            else:
                change.hook.remove()
        self.changes.clear()
        self.detached = True
        return self.model

    def __enter__(self) -> "Attached":
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        """Lists the modules, and every layer of the network that was changed."""
        path = f", feature map from {' > '.join(self.path)}" if self.path else ""
        projection = self.projection
        if isinstance(projection, str):
            projection = f"{projection} of the network, {self._part(projection)!r}"
        pooling = f"{self.pooling} of the network" if isinstance(self.pooling, str) else self.pooling
        lines = [
            f"network: {_name(self.model)}{path}",
            f"rgem: {self.rgem}",
            f"pooling: {pooling}",
            f"projection: {projection}",
            f"sgem: {self.sgem}, scales {', '.join(f'{factor:g}' for factor in self.scales)}",
            f"changed layers: {'' if self.changes else 'none'}",
            *(f"  {change.layer}: {change.meaning}" for change in self.changes),
        ]
        return "Attached(\n" + "".join(f"  {line.rstrip()}\n" for line in lines) + ")"


def attach(
    model: Callable[[Tensor], Tensor],
    features: str | Sequence[str] | None = None,
    pooling: nn.Module = _GEMP,
    rgem: nn.Module | None = _RGEM,
    sgem: nn.Module | None = _SGEM,
    scales: Sequence[float] = SCALES,
    projection: "nn.Module | str | Tensor | tuple[Tensor, Tensor] | None" = None,
    relup: str | Sequence[str] = (),
    relup_ends: str | Sequence[str] = (),
    relup_threshold: float = RELUP_THRESHOLD,
) -> Attached:
    """Attaches SuperGlobal's modules to a trained network. The result maps (N, 3, H, W) to unit descriptors (N, D).

    The result expects images that are already normalised as the network was trained. The network is not
    copied: its weights, mode (training or evaluation), device and state dict stay as they are. Only the
    rectifiers named in `relup` and `relup_ends` are changed, until :meth:`Attached.detach` is called or a
    ``with`` block ends; ``repr`` lists them. Wrap the result (``DataParallel(attach(network))``,
    ``torch.compile``), not the network.

    Shao et al., "Global Features are All You Need for Image Retrieval and Reranking", ICCV 2023, sec. 3.

    Args:
        model: a network, or any callable that returns a feature map (N, C, H, W). For torchvision's ResNet,
            ResNeXt, ConvNeXt, EfficientNet, RegNet, VGG, MobileNetV3 and Swin the feature map is the input
            of `avgpool`; for timm's convolutional networks it is the result of `forward_features`.
        features: for other networks, the name of the method or submodule that returns the feature map, or
            the names of several that are called one after the other.
        pooling: (N, C, H, W) -> (N, C) or (N, C, 1, 1); it may be a submodule of the network.
        rgem: Regional-GeM, (N, C, H, W) -> (N, C, H, W); None leaves it out.
        sgem: Scale-GeM, (S, N, D) -> (N, D); None takes the mean over the scales.
        scales: factors by which the images are resized (bilinear, without antialiasing); (1.0,) for
            networks that accept one size only.
        projection: the step after the pooling: a module (N, C) -> (N, D); the name of a submodule of the
            network, for example ``"fc"``; a matrix P (D, C); or whitening, (P, m) with m (C,): P (x - m).
        relup: names of the submodules, stages or layers in which every ReLU (or ReLU6) becomes ReLU+.
        relup_ends: names of the stages whose blocks end in ReLU+, while the ReLUs inside stay. The
            paper's choice for a ResNet is ``relup="layer1", relup_ends=("layer2", "layer3")``.
        relup_threshold: the threshold of ReLU+.

    Raises:
        ValueError: if a name does not fit the network, or a stage has no ReLU. The result raises it if the
            network returns no feature map, or the shapes of map, pooling and projection do not fit.

    The feature map may contain negative values, as ConvNeXt's does; GeM raises them to its lower bound, near 0.

    Token maps: four lines turn the tokens of a ViT into a feature map (`vit` is timm's, created with
    dynamic_img_size=True and dynamic_img_pad=True). Tokens have both signs, so they are averaged, without
    Regional-GeM. A function does not register the weights that it uses: move the ViT to its device yourself. ::

        def token_map(x):
            tokens = vit.forward_features(x)[:, vit.num_prefix_tokens :]
            return tokens.mT.unflatten(2, vit.patch_embed.dynamic_feat_size(x.shape[2:]))
        extract = attach(token_map, pooling=torch.nn.AdaptiveAvgPool2d(1), rgem=None)

    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> attach(network, relup="1")(torch.rand(2, 3, 32, 48)).shape
    torch.Size([2, 8])
    """
    if not callable(model) or isinstance(model, type):
        raise ValueError(f"attach takes a network, or a callable that returns a feature map, got {_given(model)}")
    for name, part in {"pooling": pooling, "rgem": rgem, "sgem": sgem}.items():
        if not isinstance(part, nn.Module) and not (part is None and name != "pooling"):
            raise ValueError(f"{name} must be a module{'' if name == 'pooling' else ' or None'}, got {_given(part)}")
    for name, names in {"features": features or (), "relup": relup, "relup_ends": relup_ends}.items():
        if not isinstance(names, Sequence) or not all(isinstance(each, str) and each for each in _names(names)):
            raise ValueError(f"{name} must be the name of a submodule, or several names, got {names!r}")
    path = _way_to_map(model) if features is None else _names(features)
    for name in path:
        if not callable(_attribute(model, name)):
            raise ValueError(f"features: {_name(model)} has no method or submodule {name!r}{_children(model)}")
    if isinstance(projection, str) and not callable(_attribute(model, projection)):
        raise ValueError(f"projection: {_name(model)} has no submodule {projection!r}{_children(model)}")
    attached = Attached(model, path, _own(model, pooling), rgem, sgem, scales, _own(model, _matrix(projection, model)))
    attached.training = getattr(model, "training", False)  # not train(): parts of the network may be frozen
    if attached.training and any(isinstance(layer, _OF_THE_BATCH) for layer in attached.modules()):
        warnings.warn("in training mode, a descriptor depends on its batch; call .eval()", stacklevel=2)
    rectifier = ReLUPlus(relup_threshold)
    layers = [layer for stage in _names(relup) for layer in _rectifiers(model, stage)]
    blocks = [block for stage in _names(relup_ends) for block in _blocks(model, stage)]
    for layer in layers:
        original = _stage(model, "relup", layer)
        replacement = rectifier if isinstance(original, nn.ReLU) else nn.Sequential(original, rectifier)
        _replace(model, layer, replacement)
        attached.changes.append(Change(layer, original, None, f"{original} -> {rectifier}"))
    for block in blocks:
        handle = _stage(model, "relup_ends", block).register_forward_hook(_End(block, relup_threshold))
        attached.changes.append(Change(block, None, handle, f"ends in {rectifier}"))
    return attached


class _End:
    """A forward hook that applies ReLU+ to the output of a block."""

    def __init__(self, block: str, threshold: float):
        self.block, self.threshold, self.checked = block, threshold, False

    def __call__(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        if not self.checked and values_can_be_seen(output):
            if (output < 0).any():
                raise ValueError(
                    f"relup_ends: {self.block} ({_name(module)}) returns negative values: it does not end in a ReLU"
                )
            self.checked = True
        return relu_plus(output, self.threshold)


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _name(model: Any) -> str:
    return getattr(model, "__name__", type(model).__name__)


def _given(x: Any) -> str:
    """Names the type of an argument, for an error message."""
    return f"the class {x.__name__}" if isinstance(x, type) else type(x).__name__


def _attribute(model: Any, name: str) -> Any:
    try:
        return attrgetter(name)(model)
    except AttributeError:
        return None


def _children(model: Any) -> str:
    """Lists the submodules, as the end of an error message about a name."""
    return f"; it has {', '.join(name for name, _ in model.named_children())}" if isinstance(model, nn.Module) else ""


def _way_to_map(model: Any) -> tuple[str, ...]:
    """Returns the attributes that lead to the feature map, or none if the kind of network is unknown."""
    if not isinstance(model, nn.Module):
        return ()
    if callable(getattr(model, "forward_features", None)):
        return ("forward_features",)
    family = [base for base in type(model).__mro__ if base.__module__.startswith("torchvision.models.")]
    own = [getattr(type(model), name).__module__ for name in ("forward", "_forward_impl") if hasattr(type(model), name)]
    if any(base.__name__ in _IN_ORDER for base in family) and all(name.startswith("torchvision.") for name in own):
        names = [name for name, _ in model.named_children()]
        return tuple(names[: names.index("avgpool")])
    return ()


def _own(model: Any, part: _Part) -> _Part | str:
    """Returns the name of a part that belongs to the network, so that it is not registered twice; else the part."""
    if isinstance(part, nn.Module) and isinstance(model, nn.Module):
        return next((name for name, module in model.named_modules() if module is part), part)
    return part


def _matrix(projection: Any, model: Any) -> nn.Module | str | None:
    """Returns a matrix, or a matrix and a mean, as a linear layer; anything else is returned unchanged."""
    if projection is None or isinstance(projection, (nn.Module, str)):
        return projection
    parts = [torch.as_tensor(part) for part in (projection if isinstance(projection, tuple) else (projection,))]
    check_tensor(parts[0], "projection", "D, C")
    d, c = parts[0].shape
    if len(parts) > 2 or any(part.numel() != c for part in parts[1:]):
        raise ValueError(f"whitening must be P (D, C) and m (C,), got shapes {[tuple(part.shape) for part in parts]}")
    linear = nn.Linear(c, d, bias=len(parts) == 2, dtype=parts[0].dtype).requires_grad_(False)
    linear.weight.copy_(parts[0])
    if len(parts) == 2:
        check_tensor(parts[1].flatten(), "whitening", "C")
        linear.bias.copy_(-parts[0] @ parts[1].to(parts[0]).flatten())
    weight = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return linear if weight is None else linear.to(weight.device)


def _stage(model: Any, option: str, stage: str) -> nn.Module:
    try:
        return model.get_submodule(stage)
    except AttributeError:
        raise ValueError(f"{option}: {_name(model)} has no submodule {stage!r}{_children(model)}") from None


def _rectifiers(model: Any, stage: str) -> list[str]:
    """Returns the names of the ReLUs in a stage."""
    modules = dict(_stage(model, "relup", stage).named_modules(prefix=stage, remove_duplicate=False))
    names = [name for name, module in modules.items() if isinstance(module, _RELU)]
    if not names:
        kinds = dict.fromkeys(_name(each) for each in modules.values() if "activation" in type(each).__module__)
        there = ", ".join(kinds) or "no activation module; functional ones cannot be changed"
        if any(isinstance(each, ReLUPlus) for each in modules.values()):
            there = "ReLUPlus: it is attached already; call detach() on the first result of attach"
        raise ValueError(f"relup: {stage!r} has no ReLU, but {there}")
    return names


def _blocks(model: Any, stage: str) -> list[str]:
    """Returns the names of the blocks of a stage, each of which has a ReLU of its own."""
    blocks = dict(_stage(model, "relup_ends", stage).named_children())
    for name, block in blocks.items():
        if not any(isinstance(child, _RELU) for child in block.children()):
            raise ValueError(f"relup_ends: {stage}.{name} ({_name(block)}) has no ReLU of its own to end in")
    if not blocks:
        raise ValueError(f"relup_ends: {stage!r} has no blocks; it is {_name(_stage(model, 'relup_ends', stage))}")
    return [f"{stage}.{name}" for name in blocks]


def _replace(model: Any, layer: str, module: nn.Module) -> None:
    parent, _, name = layer.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
