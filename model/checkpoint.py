"""Find, read, verify and load weights. Loading is safe (tensors only) and strict (all keys, or an error).

A file is one of torch.save or safetensors. The tensors may be in state_dict, model_state, model_state_dict or model,
and their names may have prefixes of what the network was wrapped in.
"""

import hashlib
import pickle
import re
import shlex
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from model.cvnet import STAGE_DEPTHS, ResNet
from model.errors import InputError, reason_of, short_list
from model.pickles import read_in_child

Network = TypeVar("Network", bound=nn.Module)

SUFFIXES = (".pyth", ".pth", ".pt", ".safetensors")
PUBLISHED = {50: "CVPR2022_CVNet_R50.pyth", 101: "CVPR2022_CVNet_R101.pyth"}

# Where a training script keeps the tensors of the network.
_WRAPPERS = ("state_dict", "model_state", "model_state_dict", "model")
# What may precede the names of a network: DataParallel, torch.compile, Lightning modules, CVNet, DELG-pytorch.
_PREFIXES = ("module", "_orig_mod", "model", "backbone", "encoder_q", "globalmodel")
# The first bytes of files written by torch.save before PyTorch 1.6: its magic number as a pickle of protocol 2.
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_ZIP_MAGIC = b"PK\x03\x04"
_ENCODER_KEY = re.compile(r"(stem|s\d+|head)\.")
_RERANKER_KEY = re.compile(r"(conv2ds|cv_learner)\.")


def find_checkpoint(path: Path, depth: int) -> Path:
    """Returns the file itself, or the one file in a folder that contains an encoder of this depth.

    Raises:
        InputError: if there is no such path, or it is a folder in which no file fits, or several do.
    """
    where = f"python -m tools.download weights fetches {PUBLISHED[depth]} into weights/, see weights/README.md"
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"no file or folder {path}; {where}")
    fitting, others = [], []
    for file in sorted(f for f in path.iterdir() if f.suffix in SUFFIXES and f.is_file()):
        try:
            found = _depth_of(encoder_state(file))
        except InputError as error:
            others.append(str(error))
            continue
        if found == depth:
            fitting.append(file)
        else:
            others.append(f"{file.name} is a {_network_name(found)}")
    if len(fitting) > 1:
        names = short_list([file.name for file in fitting])
        raise InputError(f"{path} has several ResNet-{depth} checkpoints ({names}); name one of them")
    if not fitting:
        seen = f" ({short_list(others)})" if others else ""
        raise InputError(f"no ResNet-{depth} checkpoint in {path}{seen}; {where}")
    return fitting[0]


def encoder_state(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of the encoder under their names without prefix; other keys of the file are ignored.

    Raises:
        InputError: if the file cannot be read safely or contains no encoder.
    """
    state = network_state(path, lambda key: _ENCODER_KEY.match(key) is not None)
    encoder = {key: value for key, value in state.items() if _ENCODER_KEY.match(key)}
    if not any(key.startswith("stem.") for key in encoder):
        raise InputError(
            f"{path} holds no CVNet encoder: no key stem.* after {', '.join(_PREFIXES)} or without a prefix; "
            f"its first keys are {short_list(list(_model_state(path)), 3) or 'none'}"
        )
    return encoder


def network_state(path: Path, used: Callable[[str], bool]) -> dict[str, Tensor]:
    """Returns the tensors of a network by its own names; tensors without the prefix of the others are ignored.

    Args:
        path: the file.
        used: returns whether the network uses a name. The prefix is that after which most names are used.

    Raises:
        InputError: if the file cannot be read safely or is not a checkpoint.
    """
    content = _model_state(path)
    state = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if content and not state:
        raise InputError(f"{path} has no tensors, nor in {', '.join(_WRAPPERS)}, but {short_list([*content])}")
    counts = {"": 0}
    for key in state:
        prefix, rest = "", key
        while True:
            counts[prefix] = counts.get(prefix, 0) + used(rest)
            first, dot, after = rest.partition(".")
            if first not in _PREFIXES or not dot:
                break
            prefix, rest = f"{prefix}{first}.", after
    best = max(counts, key=counts.__getitem__)
    return {key.removeprefix(best): value for key, value in state.items() if key.startswith(best)}


def reranker_state(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of CVNet-Rerank's own layers, conv2ds.* and cv_learner.*.

    Raises:
        InputError: if the file cannot be read safely or contains none of them.
    """
    state = network_state(path, lambda key: _RERANKER_KEY.match(key) is not None)
    own = {key: value for key, value in state.items() if _RERANKER_KEY.match(key)}
    if not own:
        raise InputError(
            f"{path} holds no CVNet-Rerank: no key conv2ds.* or cv_learner.*; "
            "the checkpoints listed in weights/README.md have them"
        )
    return own


def load_encoder(encoder: ResNet, path: Path) -> ResNet:
    """Loads a file's weights into the encoder, see load_strictly; errors suggest a reason."""
    state = encoder_state(path)
    return load_strictly(encoder, state, path, f"a ResNet-{encoder.depth}", partial(_guess, state, encoder.depth))


def load_strictly(
    network: Network,
    state: dict[str, Tensor],
    path: Path,
    name: str,
    guess: Callable[[list[str]], str] = lambda wrong: "",
) -> Network:
    """Loads weights into the network, as float32, and sets it to evaluation mode.

    The network may be on the meta device: its tensors are replaced, not overwritten.

    Args:
        state: the weights, under the names that the network uses.
        path, name: the file and the name of the network, for error messages.
        guess: given the keys of wrong shape, returns the likely reason for an error about keys.

    Raises:
        InputError: if a key is missing, unknown, of the wrong shape, or not finite. The message names the
            first few. Nothing is loaded in this case.
    """
    expected = network.state_dict()
    missing = [key for key in expected if key not in state]
    unknown = [key for key in state if key not in expected]
    wrong = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    if missing or unknown or wrong:
        problems = [
            f"{len(keys)} {what} ({short_list(keys, 3)})"
            for keys, what in ((missing, "missing"), (unknown, "unknown"), (wrong, "of the wrong shape"))
            if keys
        ]
        raise InputError(f"{path} does not fit {name}: keys {'; '.join(problems)}{guess(wrong)}")
    for key, value in state.items():
        if not is_plain(value) or value.is_floating_point() != expected[key].is_floating_point():
            raise InputError(f"{path}: {key} must be a plain tensor of {expected[key].dtype}, got {_kind(value)}")
        if not (value.sum().isfinite() or value.isfinite().all()):  # a finite sum, the fast test, has finite terms
            raise InputError(f"{path}: {key} contains values that are not finite; fetch the file again")
        if key.endswith("running_var") and (value < 0).any():
            raise InputError(f"{path}: {key} is negative, which a variance cannot be; fetch the file again")
        if key.endswith("pool.p") and (value <= 0).any():
            raise InputError(
                f"{path}: {key} is {float(value.min()):g}, but GeM's power must be above 0; fetch the file again"
            )
    state = {key: v.to(torch.float32 if v.is_floating_point() else v.dtype, copy=True) for key, v in state.items()}
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def is_tensor_file(path: Path) -> bool:
    """Returns whether a file begins like one of torch.save, in today's format or that before PyTorch 1.6."""
    return _begins_with(path, _ZIP_MAGIC) or _begins_with(path, _LEGACY_MAGIC)


def load_tensors(path: Path) -> object:
    """Loads a file of safetensors, or with torch.load and weights_only, memory-mapped if the format allows.

    Raises:
        InputError: if the file is missing, not a PyTorch file, damaged, contains more than tensors, or takes too long.
    """
    if not path.is_file():
        raise InputError(f"no file {path}")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    if not is_tensor_file(path):
        raise InputError(f"{path} is not a PyTorch file" if path.stat().st_size else f"{path} is empty")
    _try_pickles(path, _version(path))
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=_begins_with(path, _ZIP_MAGIC))
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is refused: it contains more than tensors{_objects(error)} and might run code when loaded; if you "
            f"trust it, convert it: {_conversion(path)}"
        ) from None
    except Exception as error:  # damaged archives raise almost any exception
        raise InputError(f"{path} is truncated or damaged ({reason_of(error)}); fetch it again") from None


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise InputError(f"{path} needs the package safetensors; pip install safetensors") from None
    try:
        return load_file(path)
    except Exception as error:  # its reader has exceptions of its own
        raise InputError(f"{path} is truncated or damaged ({reason_of(error)}); fetch it again") from None


def _objects(error: Exception) -> str:
    """Returns the class that PyTorch refused to load, in parentheses, if its message names one."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f" ({found[1]})" if found else ""


def _conversion(path: Path) -> str:
    """Returns the command that writes the tensors of a file to another one, and runs whatever code the file has."""
    code = (
        f"import torch; c = torch.load({str(path)!r}, 'cpu', weights_only=False); "
        f"c = next((c[k] for k in {_WRAPPERS} if isinstance(c, dict) and k in c), c); "
        f"torch.save(getattr(c, 'state_dict', lambda: c)(), {str(path.with_suffix('.tensors.pth'))!r})"
    )
    return f"python -c {shlex.quote(code)}"


def is_plain(tensor: Tensor) -> bool:
    """Returns whether a tensor is of an ordinary kind, whose values are all in the file."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_complex():
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype}, {str(tensor.layout).removeprefix('torch.')}, on {tensor.device}"


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal digits; an unchanged file is read once per process."""
    return _sha256(path, _version(path))


@lru_cache(maxsize=8)
def _sha256(path: Path, version: tuple[int, ...]) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _model_state(path: Path) -> dict[str, object]:
    """Returns what the file has by name, without what wraps it.

    The tensors of an unchanged file are kept for the next call if they are memory-mapped; they are never written to.
    """
    version = _version(path)
    mapped = bool(version) and _begins_with(path, _ZIP_MAGIC)
    read = _read_model_state if mapped else _read_model_state.__wrapped__
    return dict(read(path, version))


def _begins_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _version(path: Path) -> tuple[int, ...]:
    """Returns what changes if a file is replaced or written to; nothing for a missing file."""
    if not path.is_file():
        return ()
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=64)
def _try_pickles(path: Path, version: tuple[int, ...]) -> None:
    """Raises InputError if the pickles of a file are damaged or take too long: torch.load has no limit of time."""
    try:
        read_in_child("PyTorch", path)
    except ValueError as error:
        raise InputError(f"{path} {error}") from None


@lru_cache(maxsize=2)
def _read_model_state(path: Path, version: tuple[int, ...]) -> dict[str, object]:
    state = load_tensors(path)
    while isinstance(state, dict) and (inner := [state[key] for key in _WRAPPERS if isinstance(state.get(key), dict)]):
        state = inner[0]
    if not isinstance(state, dict):
        raise InputError(f"{path} is not a checkpoint: it contains a {type(state).__name__}, not a dict of tensors")
    return {key: value for key, value in state.items() if isinstance(key, str)}


def _stage_depths(state: dict[str, Tensor]) -> tuple[int, ...]:
    blocks = {match.groups() for key in state if (match := re.match(r"s(\d+)\.(b\d+)\.", key))}
    return tuple(sum(stage == str(s) for stage, _ in blocks) for s in (1, 2, 3, 4))


def _depth_of(state: dict[str, Tensor]) -> int | None:
    return {depths: depth for depth, depths in STAGE_DEPTHS.items()}.get(_stage_depths(state))


def _network_name(depth: int | None) -> str:
    return f"ResNet-{depth}" if depth else "network of another depth"


def _guess(state: dict[str, Tensor], depth: int, wrong: list[str]) -> str:
    found = _depth_of(state)
    if found != depth and found is not None:
        return f"; it is a ResNet-{found}: give its depth, or another file"
    if len(wrong) <= 2 and any(text.startswith("head.fc.") for text in wrong):
        return f"; its descriptors have {len(state['head.fc.weight'])} dimensions: give this number"
    return "; it may come from another project, or be cut off"
