"""Backbones by name: CVNet's, timm's, torchvision's, those of PyTorch Hub, and of a user's own function."""

import ast
import hashlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backbone import Backbone
from model.checkpoint import load_encoder, load_strictly, network_state, sha256
from model.cvnet import ResNet, cvnet_backbone
from model.errors import InputError, nearest, reason_of, short_list
from modules.attach import way_to_map

PRETRAINED, UNTRAINED = "pretrained", "untrained"
CVNET = "cvnet"

# Classifiers, which descriptors do not use.
_CLASSIFIERS = ("fc.", "head.", "heads.", "classifier.")


def build_backbone(
    name: str, weights: str | Path, depth: int = 50, reduction_dim: int = 2048, whole: bool = False
) -> Backbone:
    """Returns the backbone with this name, with its weights, in evaluation mode.

    Args:
        name: cvnet, timm:NAME, torchvision:NAME, hub:OWNER/REPO[:BRANCH]:ENTRY[:KEY=VALUE,...] or the path of a local
            clone instead of OWNER/REPO, or FILE.py:FUNCTION. The code of a hub's repository is executed.
        weights: a file with a state dict; "pretrained" for the weights that the library downloads; or
            "untrained" for random ones with a fixed seed. A user's function, or a hub's, returns its network with
            weights, so that both words leave them as they are. CVNet's network needs a checkpoint.
        depth, reduction_dim: the layers of CVNet's ResNet, and the dimensions of its descriptor.
        whole: whether the descriptor is what the network returns, and uses its classifier, too.

    Raises:
        InputError: if the name is unknown (the message suggests the closest), the library is not installed, a
            function is missing or fails, or weights do not fit or cannot be downloaded.
    """
    if name == CVNET:
        with torch.device("meta"):  # skips the initialisation of weights that the checkpoint replaces
            network = ResNet(depth, reduction_dim)
        return cvnet_backbone(load_encoder(network, Path(weights)))
    library, _, rest = name.partition(":")
    makers = {"timm": _timm, "torchvision": _torchvision}
    if library in makers and rest:
        backbone = makers[library](rest, str(weights) == PRETRAINED)
    elif is_user_file(name):
        file, _, function = name.rpartition(":")
        backbone = _own(file, function)
    elif library == "hub" and rest:
        backbone = _hub(rest)
    else:
        raise InputError(
            f"unknown network {name!r}: it must be cvnet, timm:NAME, torchvision:NAME, hub:OWNER/REPO:ENTRY or "
            "FILE.py:FUNCTION"
        )
    if str(weights) not in (PRETRAINED, UNTRAINED):
        backbone = replace(backbone, unfilled=_load(backbone, Path(weights), name, whole))
    elif str(weights) == UNTRAINED and not comes_with_weights(name):
        backbone = replace(backbone, unfilled=["all, which are random"])
    for parameter in backbone.network.eval().parameters():  # TorchScript has no requires_grad_ of a whole network
        parameter.requires_grad_(False)
    return backbone


def is_user_file(name: str) -> bool:
    """Returns whether a network's name is that of a user's function, FILE.py:FUNCTION."""
    return name.rpartition(":")[0].endswith(".py")


def comes_with_weights(name: str) -> bool:
    """Returns whether a network's name is that of a function, a user's or a hub's, that returns it with weights."""
    return is_user_file(name) or name.startswith("hub:")


def short_name(name: str) -> str:
    """Returns the name without the folders of a user's file or a local clone, such as mine.py:build."""
    if name.startswith("hub:"):
        place, colon, entry = name.removeprefix("hub:").partition(":")
        return f"hub:{Path(place).name if Path(place).is_dir() else place}{colon}{entry}"
    return Path(name).name if is_user_file(name) else name


def weights_digest(network: nn.Module) -> str:
    """Returns the SHA-256 of the network's weights and their names, independent of their file."""
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _timm(name: str, pretrained: bool) -> Backbone:
    try:
        import timm
    except ImportError:
        raise InputError(f"timm:{name} needs the package timm; pip install timm") from None
    known = timm.list_models() + timm.list_pretrained()
    if name not in known:
        raise InputError(f"timm has no network {name!r}; {nearest(name, known) or 'timm.list_models() lists all'}")
    torch.manual_seed(0)  # makes random weights reproducible
    with _hub_answers_at_once() if pretrained else nullcontext():
        try:
            network: Any = timm.create_model(
                name, pretrained=pretrained, num_classes=0, dynamic_img_size=True, dynamic_img_pad=True
            )
            flexible = True
        except TypeError:  # most convolutional networks, and transformers with a fixed size
            network = _fetching(lambda: timm.create_model(name, pretrained=pretrained, num_classes=0), f"timm:{name}")
            flexible = False
        except Exception as error:
            raise _not_fetched(f"timm:{name}", error) from None
    config = timm.data.resolve_model_data_config(network)
    facts = {"timm": timm.__version__}
    common: dict[str, Any] = {"mean": tuple(config["mean"]), "std": tuple(config["std"]), "provenance": facts}
    if hasattr(network, "patch_embed") and hasattr(network, "num_prefix_tokens") and flexible:
        patch = network.patch_embed.patch_size[0]
        has_class = getattr(network, "cls_token", None) is not None

        def token_map(x: Tensor) -> Tensor:
            tokens = network.forward_features(x)[:, network.num_prefix_tokens :]
            return tokens.mT.unflatten(2, network.patch_embed.dynamic_feat_size(x.shape[2:]))

        class_token = (lambda x: network.forward_features(x)[:, 0]) if has_class else None
        return Backbone(network, token_map, **common, tokens=True, multiple=patch, class_token=class_token)

    def channels_first(x: Tensor) -> Tensor:
        features = network.forward_features(x)
        width = getattr(network, "num_features", None)
        if features.ndim == 4 and features.shape[1] != width == features.shape[-1]:
            features = features.permute(0, 3, 1, 2)
        return features

    size = tuple(config["input_size"][1:]) if network.pretrained_cfg.get("fixed_input_size") else None
    return Backbone(network, channels_first, **common, size=size)


def _torchvision(name: str, pretrained: bool) -> Backbone:
    import torchvision
    from torchvision import models

    if name not in (known := models.list_models(module=models)):
        raise InputError(f"torchvision has no network {name!r}; {nearest(name, known) or short_list(known)}")
    weights = models.get_model_weights(name).DEFAULT
    torch.manual_seed(0)  # makes random weights reproducible
    network = _fetching(lambda: models.get_model(name, weights=weights if pretrained else None), f"torchvision:{name}")
    transforms = weights.transforms()
    common: dict[str, Any] = {"mean": tuple(transforms.mean), "std": tuple(transforms.std)}
    common["provenance"] = {"torchvision": torchvision.__version__}
    if isinstance(network, models.VisionTransformer):
        grids = _TorchvisionTokens(network)
        return Backbone(
            network, grids.token_map, **common, tokens=True, multiple=network.patch_size, class_token=grids.class_token
        )
    if "swin" in name:
        return Backbone(network, **common, multiple=32)
    return Backbone(network, **common)


def _own(path: str, function: str) -> Backbone:
    """Returns the backbone from a user's function; the file is executed, since it is the user's own."""
    file = Path(path)
    if not file.is_file():
        raise InputError(f"no file {file}, in which the network should be")
    spec = importlib.util.spec_from_file_location(f"_own_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise InputError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    if (folder := str(file.resolve().parent)) not in sys.path:
        sys.path.append(folder)  # last, so that a file there does not hide a module of the project
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _failed(file, error) from None
    maker = getattr(module, function, None)
    if not callable(maker):
        functions = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        hint = nearest(function, functions) or f"it has {short_list(functions) or 'none'}"
        raise InputError(f"{file} has no function {function}; {hint}")
    torch.manual_seed(0)
    try:
        made = maker()
    except Exception as error:
        raise _failed(file, error) from None
    backbone = _as_backbone(made, f"{file}: {function}")
    backbone.provenance["file_sha256"] = sha256(file)
    return backbone


def _as_backbone(made: Any, function: str) -> Backbone:
    """Returns what a function returned as a backbone: one, its fields as a dict, or a network."""
    if isinstance(made, Backbone):
        return made
    if isinstance(made, nn.Module):
        return Backbone(made)
    if isinstance(made, dict) and isinstance(made.get("network"), nn.Module):
        try:
            return Backbone(**made)
        except TypeError as error:
            raise InputError(f"{function} returns {error}; see model.backbone.Backbone") from None
    raise InputError(f"{function} returns {type(made).__name__}, not a network (nn.Module)")


def _hub(text: str) -> Backbone:
    """Returns the backbone of an entry of PyTorch Hub, REPO[:BRANCH]:ENTRY[:KEY=VALUE,...]; its code is executed."""
    *place, last = text.split(":")
    place, settings = (place, last) if "=" in last else ([*place, last], "")
    if not 2 <= len(place) <= 3 or not all(place):
        raise InputError(f"hub:{text}: it must be hub:OWNER/REPO[:BRANCH]:ENTRY[:KEY=VALUE,...]")
    repository, *branch, entry = place
    local = Path(repository).expanduser()
    is_local = local.is_dir()
    if not is_local and not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise InputError(f"hub:{text}: there is no folder {repository}, and it is not OWNER/REPO")
    if is_local and (branch or not (local / "hubconf.py").is_file()):
        problem = "takes no branch" if branch else "has no hubconf.py"
        raise InputError(f"hub:{text}: the local clone {repository} {problem}")
    torch.manual_seed(0)
    try:
        with _modules_apart(local if is_local else Path(torch.hub.get_dir())):
            made = torch.hub.load(
                str(local.resolve()) if is_local else ":".join([repository, *branch]), entry,
                source="local" if is_local else "github", trust_repo=True, skip_validation=True, verbose=False,
                **dict(map(_setting, filter(None, settings.split(",")))),
            )  # fmt: skip
    except Exception as error:  # the code of the repository raises any exception
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        advice = "" if is_local else "; without a network connection, give the path of a clone instead of OWNER/REPO"
        raise InputError(f"hub:{text}: {reason}{advice}") from None
    return _as_backbone(made, f"hub:{text}: {entry}")


@contextmanager
def _modules_apart(folder: Path) -> Iterator[None]:
    """Keeps the modules of a repository apart from those of the project and of other repositories with equal names."""
    root, before = Path(__file__).parents[1], {*sys.modules}
    names = {path.stem for path in root.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] in names}
    for name in ours:
        del sys.modules[name]
    try:
        yield
    finally:
        for name, module in [*sys.modules.items()]:
            file = getattr(module, "__file__", None)
            if name in ours or (name not in before and file and Path(file).is_relative_to(folder.resolve())):
                del sys.modules[name]
        sys.modules.update(ours)


def _setting(text: str) -> tuple[str, Any]:
    """Returns the name and the value of KEY=VALUE; a value that is not one of Python is text."""
    key, _, value = text.partition("=")
    try:
        return key.strip(), ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key.strip(), value


class _TorchvisionTokens:
    """torchvision's VisionTransformer for any image size: position embeddings are resized to the grid (bicubic)."""

    def __init__(self, network: Any):
        self.network = network

    def _all(self, x: Tensor) -> tuple[Tensor, int, int]:
        network, patch = self.network, self.network.patch_size
        height, width = x.shape[2] // patch, x.shape[3] // patch
        patches = network.conv_proj(x).flatten(2).mT  # (N, h * w, C)
        tokens = torch.cat([network.class_token.expand(len(x), -1, -1), patches], dim=1)
        embedding = network.encoder.pos_embedding
        side = round((embedding.shape[1] - 1) ** 0.5)
        if (height, width) != (side, side):
            grid = embedding[:, 1:].mT.unflatten(2, (side, side))
            grid = F.interpolate(grid, (height, width), mode="bicubic", align_corners=False, antialias=True)
            embedding = torch.cat([embedding[:, :1], grid.flatten(2).mT], dim=1)
        encoder = network.encoder
        return encoder.ln(encoder.layers(encoder.dropout(tokens + embedding))), height, width

    def token_map(self, x: Tensor) -> Tensor:
        tokens, height, width = self._all(x)
        return tokens[:, 1:].mT.unflatten(2, (height, width))

    def class_token(self, x: Tensor) -> Tensor:
        return self._all(x)[0][:, 0]


def _fetching(make: Callable[[], nn.Module], name: str) -> nn.Module:
    try:
        return make()
    except Exception as error:
        raise _not_fetched(name, error) from None


@contextmanager
def _hub_answers_at_once() -> Iterator[None]:
    """Limits the Hugging Face Hub to its cache if it cannot be reached: otherwise it retries for a minute."""
    from huggingface_hub import constants, get_session  # timm depends on it

    before = constants.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=3)
    except Exception:  # of the HTTP library that this version uses
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _not_fetched(name: str, error: Exception) -> InputError:
    reason = reason_of(error)[:200]
    place = Path(torch.hub.get_dir()) / "checkpoints"
    return InputError(
        f"{name}: its pretrained weights cannot be downloaded ({reason}); without a network connection, put the file "
        f"that the library names into {place} (torchvision) or the Hugging Face cache (timm), or give a weights file"
    )


def _failed(file: Path, error: Exception) -> InputError:
    """Returns the error for an exception in a user's function, with its message and line."""
    return InputError(f"{place_in(file, error)}: {type(error).__name__}: {' '.join(str(error).split())}")


def place_in(file: Path, error: Exception) -> str:
    """Returns the name of a file, and the line in it from which an exception comes, if it comes from there."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve() == file.resolve()
    ]
    lines = lines or [getattr(error, "lineno", None)]
    return f"{file}, line {lines[-1]}" if lines[-1] else str(file)


def _load(backbone: Backbone, path: Path, name: str, whole: bool) -> list[str]:
    """Loads a file's weights, and returns the names of the classifier's, which may be missing or of another size.

    There is one only beside submodules that lead to the feature map: a network that is called as a whole, or by a
    user's own function or method, may use all its weights. A classifier that the network lacks may be in the file.
    """
    network, features = backbone.network, backbone.features
    way: Sequence[str] = ()
    if not callable(features):
        way = (features,) if isinstance(features, str) else features or ()
    submodules = bool(way) and all(isinstance(attrgetter(each)(network), nn.Module) for each in way)
    on_the_way = submodules or bool(features is None and way_to_map(network)) or not comes_with_weights(name)
    has_classifier = on_the_way and not whole
    expected = network.state_dict()
    used = tuple(f"{each}." for each in (*way, backbone.projection))

    def unused(key: str) -> bool:
        return key.startswith(_CLASSIFIERS) and not key.startswith(used) and (has_classifier or key not in expected)

    state = network_state(path, expected.__contains__)
    state = {key: value for key, value in state.items() if not unused(key)}
    classifier = {key: value for key, value in expected.items() if unused(key)}
    load_strictly(network, state | classifier, path, name)
    return list(classifier)
