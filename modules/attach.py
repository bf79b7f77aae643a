"""Attach SuperGlobal's modules to a trained network: images -> unit descriptors, without training."""

import warnings
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .activation import RELUP_THRESHOLD, children_in_words, replace_rectifiers
from .checks import check_tensor
from .descriptor import GEMP, RGEM, SCALES, SGEM, SuperGlobal, name_of

# torchvision's networks whose forward calls their children in order; the feature map is the input of `avgpool`.
_IN_ORDER = ("ResNet", "ConvNeXt", "EfficientNet", "RegNet", "VGG", "AlexNet", "MobileNetV3", "SwinTransformer")

_Part = TypeVar("_Part")
_OF_THE_BATCH = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


def attach(
    model: Callable[[Tensor], Tensor],
    features: str | Sequence[str] | None = None,
    pooling: nn.Module = GEMP,
    rgem: nn.Module | None = RGEM,
    sgem: nn.Module | None = SGEM,
    scales: Sequence[float] = SCALES,
    projection: "nn.Module | str | Tensor | tuple[Tensor, Tensor] | None" = None,
    relup: str | Sequence[str] = (),
    relup_ends: str | Sequence[str] = (),
    relup_threshold: float = RELUP_THRESHOLD,
) -> SuperGlobal:
    """Attaches SuperGlobal's modules to a trained network. The result maps (N, 3, H, W) to unit descriptors (N, D).

    The result expects images that are already normalised as the network was trained. The network is not
    copied: its weights, mode (training or evaluation), device and state dict stay as they are. Only the
    rectifiers named in `relup` and `relup_ends` are changed, until :meth:`SuperGlobal.detach` is called or a
    ``with`` block ends; ``repr`` lists them. Results of one network share them: to compare several, attach to copies
    (``copy.deepcopy``). Wrap the result (``DataParallel(attach(network))``,
    ``torch.compile``), not the network.

    Shao et al., "Global Features are All You Need for Image Retrieval and Reranking", ICCV 2023, sec. 3.

    Args:
        model: a network, or any callable that returns a feature map (N, C, H, W). For torchvision's ResNet,
            ResNeXt, ConvNeXt, EfficientNet, RegNet, VGG, MobileNetV3 and Swin the feature map is the input
            of `avgpool`; for timm's convolutional networks it is the result of `forward_features`.
        features: for other networks, the name of the method or submodule that is called with the images and
            returns the feature map, or the names of several that are called one after the other.
        pooling: (N, C, H, W) -> (N, C) or (N, C, 1, 1); it may be a submodule of the network.
        rgem: Regional-GeM, (N, C, H, W) -> (N, C, H, W); None leaves it out.
        sgem: Scale-GeM, (S, N, D) -> (N, D); None takes the mean over the scales.
        scales: factors by which the images are resized (bilinear, without antialiasing); (1.0,) for
            networks that accept one size only.
        projection: the step after the pooling: a module (N, C) -> (N, D); the name of a submodule of the
            network, for example ``"fc"``; a matrix P (D, C); or whitening, (P, m) with m (C,): P (x - m), which was
            learnt for the vectors of single scales. A Whitening of whole descriptors is applied to the result.
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
    if (relup or relup_ends) and isinstance(model, torch.jit.ScriptModule):
        raise ValueError("relup: the layers of a TorchScript network cannot be changed; attach the original network")
    path = way_to_map(model) if features is None else _names(features)
    for name in path:
        if not callable(_attribute(model, name)):
            raise ValueError(
                f"features: {name_of(model)} has no method or submodule {name!r}{children_in_words(model)}"
            )
    if isinstance(projection, str) and not callable(_attribute(model, projection)):
        raise ValueError(f"projection: {name_of(model)} has no submodule {projection!r}{children_in_words(model)}")
    projection = _own(model, _matrix(projection, model))
    attached = SuperGlobal(model, path, _own(model, pooling), rgem, sgem, scales, projection)
    if attached.training and any(isinstance(layer, _OF_THE_BATCH) for layer in attached.modules()):
        warnings.warn("in training mode, a descriptor depends on its batch; call .eval()", stacklevel=2)
    attached.changes = replace_rectifiers(model, _names(relup), _names(relup_ends), relup_threshold)
    return attached


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _given(x: Any) -> str:
    """Names the type of an argument, for an error message."""
    return f"the class {x.__name__}" if isinstance(x, type) else type(x).__name__


def _attribute(model: Any, name: str) -> Any:
    try:
        return attrgetter(name)(model)
    except AttributeError:
        return None


def way_to_map(model: Any) -> tuple[str, ...]:
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
    parts = [torch.as_tensor(part) for part in (projection if isinstance(projection, (tuple, list)) else (projection,))]
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
