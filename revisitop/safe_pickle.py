"""Read ground-truth pickles from the internet safely: containers, numbers, text and NumPy arrays, but no code.

NumPy's own pickle protocol trusts the dtypes in a file, and a malicious file can make it follow addresses.
Here an array is rebuilt from its bytes, its shape and a plain dtype (integers, floats, booleans, text).
"""

import math
import pickle
import re
import struct
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from model.errors import InputError

# Kind and size in bytes, as NumPy writes them; text has a length instead of a size.
_PLAIN = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|[US]\d{1,4})")


def load_pickle(path: Path) -> Any:
    """Returns the content of a pickle of containers, numbers, text and arrays.

    Arrays inside containers are ArrayLike: they support iteration, len and np.asarray.

    Raises:
        InputError: if the file contains anything else, or is damaged.
    """
    try:
        content = _Unpickler(BytesIO(path.read_bytes()), encoding="latin1").load()
    except _RefusedError as error:
        raise InputError(f"{path} is refused: it would call {error}, which no ground truth needs") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except Exception as error:  # damaged pickles raise almost any exception
        raise InputError(f"{path} is damaged or not a pickle ({type(error).__name__}); fetch it again") from None
    return content.array if isinstance(content, ArrayLike) else content


class _RefusedError(Exception):
    pass


class _PlainType:
    """Stands for a dtype: its text, and of the state in the file only the byte order."""

    def __init__(self, text: Any, *_: Any):
        if not isinstance(text, str) or not _PLAIN.fullmatch(text):
            raise _RefusedError(f"an array of {text!r}")
        self.text = text.lstrip("<>|=")
        self.order = text[0] if text[0] in "<>" else "<"

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ("<", ">", "|", "="):
            raise _RefusedError(f"an array of byte order {order!r}")
        if order in "<>":
            self.order = order

    def dtype(self) -> np.dtype:
        return np.dtype(self.order + self.text)


class ArrayLike:
    """An array under construction: NumPy's pickles set its bytes after creating it."""

    def __init__(self) -> None:
        self.array = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, plain, fortran, data = state
        self.array = _array(data, plain, shape, "F" if fortran else "C")

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.array if dtype is None else self.array.astype(dtype)

    def __len__(self) -> int:
        return len(self.array)

    def __iter__(self) -> Iterator:
        return iter(self.array)


def _array(data: Any, plain: Any, shape: Any, order: str) -> np.ndarray:
    if not isinstance(plain, _PlainType) or order not in ("C", "F"):
        raise _RefusedError("an array without a plain dtype")
    if not isinstance(shape, tuple) or not all(type(side) is int and 0 <= side < 1 << 40 for side in shape):
        raise _RefusedError(f"an array of shape {shape!r}")
    data = data.encode("latin1") if isinstance(data, str) else bytes(data)
    if len(data) != math.prod(shape) * plain.dtype().itemsize:
        raise ValueError("the bytes of an array do not fit its shape")
    return np.frombuffer(data, plain.dtype()).reshape(shape, order=order).copy()


def _reconstruct(*_: Any) -> ArrayLike:
    return ArrayLike()


def _from_buffer(data: Any, plain: Any, shape: Any, order: Any) -> ArrayLike:
    made = ArrayLike()
    made.array = _array(data, plain, shape, order)
    return made


def _scalar(plain: Any, data: Any) -> Any:
    return _array(data, plain, (), "C")[()]


def _latin1(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise _RefusedError(f"the codec {encoding}")
    return text.encode("latin1")


def _bytes(*arguments: Any) -> bytes:
    """Returns empty bytes, which protocol 2 writes as a call, as older protocols do for bytearrays."""
    if not arguments:
        return b""
    if isinstance(arguments[0], bytes):
        return arguments[0]
    if len(arguments) == 2 and all(isinstance(each, str) for each in arguments):
        return _latin1(*arguments)
    raise _RefusedError("bytes with arguments")


_BUILTINS = {"list": list, "tuple": tuple, "dict": dict, "set": set, "frozenset": frozenset}
_BUILTINS |= {"bytes": _bytes, "bytearray": _bytes}
_CALLS = {
    **{(module, name): call for module in ("builtins", "__builtin__") for name, call in _BUILTINS.items()},
    ("_codecs", "encode"): _latin1,  # protocol 2 writes bytes this way
    ("numpy", "ndarray"): ArrayLike,
    ("numpy", "dtype"): _PlainType,
    ("multiarray", "_reconstruct"): _reconstruct,
    ("multiarray", "scalar"): _scalar,
    ("numeric", "_frombuffer"): _from_buffer,
}


class _Unpickler(pickle._Unpickler):
    """Calls only the functions above, under the module names of NumPy 1 and NumPy 2.

    It extends Python's unpickler written in Python, because the one in C allocates any number of objects or
    bytes that a file claims to have.
    """

    dispatch: ClassVar[dict] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        core = module.removeprefix("numpy._core.").removeprefix("numpy.core.")
        if (core, name) in _CALLS:
            return _CALLS[core, name]
        raise _RefusedError(f"{module}.{name}")

    def _load_build(self) -> None:
        """Sets the state of arrays and dtypes, and of nothing else."""
        state = self.stack.pop()
        if not isinstance(self.stack[-1], ArrayLike | _PlainType):
            raise _RefusedError(f"the state of a {type(self.stack[-1]).__name__}")
        self.stack[-1].__setstate__(state)

    def _load_bytearray(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(size))

    dispatch[pickle.BUILD[0]] = _load_build
    dispatch[pickle.BYTEARRAY8[0]] = _load_bytearray
