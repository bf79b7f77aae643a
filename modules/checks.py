"""Input validation shared by the modules."""

import math
import operator
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

Array = Any  # a tensor, or a NumPy array

# Descriptors are normalised if the longest of some is within this range: lossy indexes change lengths a little.
_SHORTEST, _LONGEST = 0.5, 1.1

_looking = ContextVar("whether values are checked", default=True)


def check_tensor(x: Tensor, taker: str, letters: str) -> None:
    """Raises a ValueError unless x is a floating-point tensor with these axes, none but N empty, without NaN.

    Args:
        x: the argument to check.
        taker: the name of the module or function that takes it, for the message.
        letters: the axes, for example "N, C, H, W".

    NaN is not looked for where values are unavailable: in ``torch.export``, ``torch.compile``, traces
    and graphs, on the meta device, and inside :func:`values_unseen`.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"{taker} takes a tensor ({letters}), got {type(x).__name__}")
    shape = tuple(x.shape)
    names = letters.split(", ")
    if x.ndim != len(names):
        raise ValueError(f"{taker} takes a tensor ({letters}), got shape {shape}")
    if not x.is_floating_point():
        raise ValueError(f"{taker} takes a floating-point tensor, got {x.dtype} of shape {shape}")
    if any(size == 0 and name != "N" for size, name in zip(shape, names, strict=True)):
        raise ValueError(f"{taker} takes a non-empty tensor ({letters}), got shape {shape}")
    # A sum costs a tenth of isnan; it is NaN also if there are infinities of both signs.
    if values_can_be_seen(x) and x.sum().isnan() and x.isnan().any():
        raise ValueError(f"{taker} got NaN: {int(x.isnan().sum())} of the values of shape {shape}")


def as_tensor(x: Array, name: str) -> Tensor:
    """Returns a NumPy array as a tensor, sharing its memory if possible. Raises a ValueError for anything else.

    The memory of a read-only array, like a memory map, is shared, too: nothing here writes into its input.
    """
    if isinstance(x, Tensor):
        return x
    if not hasattr(x, "__array_interface__"):
        raise ValueError(f"{name} must be a tensor or a NumPy array, got {type(x).__name__}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writ")
            return torch.from_numpy(x if x.flags.c_contiguous else x.copy())
    except (TypeError, ValueError):
        raise ValueError(f"{name}: an array of {x.dtype}, shape {x.shape}, cannot be converted to a tensor") from None


def values_can_be_seen(x: Tensor) -> bool:
    """Returns whether Python code may branch on the values of x."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.is_meta or not _looking.get():
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def warn_of_lengths(taker: str, rows: Mapping[str, Tensor], stacklevel: int) -> None:
    """Warns if the longest of some descriptors, (N, D) each, is not near unit length; rows of zeros are accepted."""
    rows = {name: each for name, each in rows.items() if len(each) and values_can_be_seen(each)}
    lengths = torch.stack([each.norm(dim=1).max() for each in rows.values()]).tolist() if rows else []  # a single wait
    for name, longest in zip(rows, lengths, strict=True):
        if longest > _LONGEST or 0 < longest < _SHORTEST:
            warnings.warn(
                f"{taker} expects descriptors of unit length, got {name} of length {longest:.3g}; "
                "torch.nn.functional.normalize(rows, dim=-1) normalises them",
                stacklevel=stacklevel,
            )


def refuse_tracing() -> None:
    """Raises a RuntimeError in torch.jit.trace and the ONNX exporter that uses it: a trace fixes the size of images."""
    if torch.jit.is_tracing():
        raise RuntimeError(
            "a trace would be wrong for images of other sizes; use torch.export.export(model, (images,), "
            "dynamic_shapes=...), and torch.onnx.export(program, dynamo=True) for ONNX"
        )


@contextmanager
def values_unseen() -> Iterator[None]:
    """A context in which no values are checked, to avoid waiting for a GPU; the caller checks the results instead."""
    token = _looking.set(False)
    try:
        yield
    finally:
        _looking.reset(token)


def whole_number(value: Any, name: str, least: int = 1) -> int:
    """Returns the value as an int. Raises a ValueError unless it is a whole number of at least `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def real_number(value: Any, name: str, least: float = 0.0, most: float = math.inf) -> float:
    """Returns the value as a float. Raises a ValueError unless it is finite and in [`least`, `most`]."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, got {value!r}") from None
    if not (least <= number <= most and math.isfinite(number)):
        bound = f"at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
        raise ValueError(f"{name} must be finite and {bound}, got {number:g}")
    return number
