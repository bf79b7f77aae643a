"""Read pickles, MATLAB and HDF5 files of strangers, and try the pickles in PyTorch files, in a child with limits.

An allow-list of what a pickle may call is not enough: in 128 bytes, a tuple contains itself twice, 60 times over, and
is hashed for years. So this file is also the program of a child process with limits of time and memory. It imports
only Python's standard library, and answers with JSON and the bytes of arrays, which extraction.files reads.
"""

import collections
import contextlib
import io
import json
import math
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

SECONDS = 10  # of processor time for any file, and a second for each 20 MB
MEMORY = 1 << 30  # bytes for any file, and 16 times its size for the objects that it becomes
DEEPEST = 50  # containers inside each other

# Kind and size in bytes, as NumPy writes them; text has a length instead of a size.
_PLAIN = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|[US]\d{1,4})")


def read_in_child(kind: str, path: Path) -> bytes:
    """Returns a line of JSON and the bytes of arrays, see Answer.

    Args:
        kind: "pickle"; "MATLAB"; "HDF5"; or "PyTorch", whose pickles are only tried, and whose answer is empty.
        path: the file.

    Raises:
        ValueError: if the file is refused or damaged; the message continues the name of the file.
        OSError: if it is missing.
    """
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError("is not a file")
    limits = SECONDS + size // 20_000_000, MEMORY + (16 * size if kind != "PyTorch" else 0)
    packages = [folder for folder in sys.path if folder] if kind in ("MATLAB", "HDF5") else []  # for SciPy and h5py
    command = [sys.executable, "-I", "-S", __file__, kind, str(path), *map(str, limits), *packages]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # each takes memory
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, env=environment)
    if done.returncode < 0:
        raise ValueError(f"is refused: reading it took more than {limits[0]} s, or crashed (signal {-done.returncode})")
    if done.returncode:
        raise ValueError(" ".join(done.stderr.decode(errors="replace").split()))
    return done.stdout


class RefusedError(Exception):
    """Something that no such file needs."""


class Array:
    """An array, a scalar or a tensor: its bytes, and how they are read."""

    dtype: str = "<f4"
    shape: Any = (0,)
    strides: Any = None
    data: bytes = b""
    size: int = 0  # bytes of all its elements

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.set(dtype, data, shape, "F" if fortran else "C")

    def set(self, dtype: Any, data: Any, shape: Any, order: Any = "C", strides: Any = None) -> "Array":
        shape = tuple(shape)  # a copy: a pickle can change a list afterwards
        if not isinstance(dtype, Dtype) or not all(type(side) is int and 0 <= side < 1 << 40 for side in shape):
            raise RefusedError("it has an array without a plain dtype or shape")
        data = data.encode("latin1") if isinstance(data, str) else bytes(data)
        if strides is None and len(data) != math.prod(shape) * dtype.size:
            raise ValueError("the bytes of an array do not fit its shape")
        if order == "F":
            strides = [math.prod(shape[:axis]) for axis in range(len(shape))]
        self.dtype, self.shape, self.data = dtype.order + dtype.text, shape, data
        self.strides = None if strides is None else [dtype.size * stride for stride in strides]
        self.size = math.prod(shape) * dtype.size
        return self


class Dtype:
    """A plain dtype of NumPy. Of its state only the byte order is used, as NumPy would follow addresses in it."""

    def __init__(self, text: Any, *_: Any):
        if not isinstance(text, str) or not _PLAIN.fullmatch(text):
            raise RefusedError(f"it has an array of {str(text)[:50]!r}")
        self.order, self.text = text[0] if text[0] in "<>" else "<", text.lstrip("<>|=")
        self.size = int(self.text[1:]) * (4 if self.text[0] == "U" else 1)

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise RefusedError("it has an array without a byte order")
        self.order = state[1] if state[1] in "<>" else self.order


class Answer:
    """The content of a file as JSON, in which {"dict": ...} is a dict, and {"array": ...} says how bytes are read.

    The bytes of arrays follow the line of JSON. Tuples become lists, bytes text, and sets of numbers sorted lists.

    Args:
        room: how many values and bytes it may have. A pickle can contain the same object a million times.
    """

    def __init__(self, content: Any, room: int):
        self.room, self.blobs, self.length = room, list[bytes](), 0
        self.head = json.dumps(self._encoded(content, 0)).encode()

    def write(self, file: BinaryIO) -> None:
        file.writelines([self.head, b"\n", *self.blobs])

    def _encoded(self, value: Any, depth: int) -> Any:
        size = value.size if isinstance(value, Array) else len(value) if hasattr(value, "__len__") else 1
        self.room -= size + 1
        if self.room < 0 or depth > DEEPEST:
            raise RefusedError("it has lists in lists without end, or content much larger than the file")
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, bytes | bytearray):
            return value.decode("utf-8", "surrogateescape")
        if isinstance(value, Array):
            self.blobs.append(value.data)
            self.length += len(value.data)
            return {"array": [value.dtype, value.shape, value.strides, self.length - len(value.data), self.length]}
        if isinstance(value, set | frozenset) and all(isinstance(each, int) for each in value):
            return sorted(value)
        if isinstance(value, list | tuple):
            return [self._encoded(each, depth + 1) for each in value]
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {"dict": {key: self._encoded(each, depth + 1) for key, each in value.items()}}
        raise RefusedError(
            f"it has a {type(value).__name__}" + " with keys that are not names" * isinstance(value, dict)
        )


def _latin1(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise RefusedError(f"it would call the codec {encoding[:50]}")
    return text.encode("latin1")


def _bytes(*arguments: Any) -> bytes:
    """Returns the bytes that protocol 2 writes as a call; a number would be the length of new ones."""
    return _latin1(*arguments) if len(arguments) == 2 else b"".join(arguments)


def _storage(data: bytes) -> tuple[Dtype, bytes]:
    """Returns the numbers of a tensor in a pickle, which PyTorch writes there as a file in its format before 1.6."""
    file = io.BytesIO(data)
    _magic, _version, _sizes, dtype, _name = (StorageUnpickler(file).load() for _ in range(5))
    (count,) = struct.unpack("<q", file.read(8))
    return dtype, file.read(count * dtype.size)


def _tensor(storage: tuple[Dtype, bytes], offset: int, shape: tuple, strides: tuple, *_: Any) -> Array:
    dtype, data = storage
    return Array().set(dtype, data[offset * dtype.size :], shape, strides=strides)


_BUILTINS: dict[str, Any] = {"list": list, "tuple": tuple, "dict": dict, "set": set, "frozenset": frozenset}
_BUILTINS |= {"bytes": _bytes, "bytearray": _bytes}
_COLLECTIONS = {"OrderedDict": collections.OrderedDict, "Counter": collections.Counter}
_CALLS: dict[tuple[str, str], Any] = {
    **{(module, name): call for module in ("builtins", "__builtin__") for name, call in _BUILTINS.items()},
    **{("collections", name): call for name, call in _COLLECTIONS.items()},
    ("_codecs", "encode"): _latin1,
    ("numpy", "ndarray"): Array,
    ("numpy", "dtype"): Dtype,
    ("multiarray", "_reconstruct"): lambda *_: Array(),
    ("multiarray", "scalar"): lambda dtype, data: Array().set(dtype, data, ()),
    ("numeric", "_frombuffer"): lambda data, dtype, shape, order: Array().set(dtype, data, shape, order),
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
}
_STORAGES = {"Double": "f8", "Float": "f4", "Half": "f2", "Long": "i8", "Int": "i4", "Short": "i2", "Byte": "u1"}


class Unpickler(pickle.Unpickler):
    """Calls only the functions above, under the module names of NumPy 1 and NumPy 2."""

    def __init__(self, file: Any):
        super().__init__(file, encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        core = module.removeprefix("numpy._core.").removeprefix("numpy.core.")
        if (core, name) not in _CALLS:
            raise RefusedError(f"it would call {module[:50]}.{name[:50]}")
        return _CALLS[core, name]


class StorageUnpickler(Unpickler):
    """Reads the type of a storage: its name is torch.FloatStorage, and its key a tuple with this name."""

    def persistent_load(self, key: Any) -> Dtype:
        return Dtype(key[1])

    def find_class(self, module: str, name: str) -> Any:
        return _STORAGES.get(name.removesuffix("Storage")) if module == "torch" else super().find_class(module, name)


class Inert:
    """Anything in a PyTorch file beside containers. It accepts whatever a pickle does to it."""

    def __init__(self, *arguments: Any):
        repr(arguments)  # which PyTorch may do for an error message

    __setstate__ = append = extend = add = update = __init__

    def __setitem__(self, key: Any, value: Any) -> None:
        hash(key)


class InertUnpickler(Unpickler):
    """Builds, hashes and shows what PyTorch would build, hash and show, and does nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        return tuple if name == "Size" else {**_BUILTINS, **_COLLECTIONS}.get(name, Inert)

    def persistent_load(self, key: Any) -> Inert:
        hash(key)
        return Inert(key)


def _read_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        return Unpickler(file).load()


def _read_mat(path: Path) -> Any:
    import scipy.io

    try:
        content = scipy.io.loadmat(path, variable_names=["X", "Q", "ranks"])
    except NotImplementedError:
        raise RefusedError("it has the format of MATLAB 7.3 (HDF5); save it with -v7") from None
    return {name: _plain(content[name]) for name in ("Q", "X", "ranks") if name in content}


def _read_hdf5(path: Path) -> Any:
    import h5py
    import numpy as np

    content: dict[str, Any] = {}
    rows: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        group, _, leaf = name.rpartition("/")
        if isinstance(item, h5py.Dataset) and item.dtype.kind in "fiu" and leaf in ("global_descriptor", name):
            (rows if group else content)[group or name] = item[()]

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    if rows:
        if len({row.shape for row in rows.values()}) > 1:
            raise RefusedError("its descriptors differ in length")
        content["global_descriptor"] = np.stack([*rows.values()])
    return {name: _plain(each) for name, each in content.items()} | ({"names": [*rows]} if rows else {})


def _plain(array: Any) -> Array:
    return Array().set(Dtype(array.dtype.str), array.tobytes(), array.shape)


def _try_torch(path: Path) -> None:
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            for _ in range(5):  # before PyTorch 1.6: magic number, version, sizes of types, the content, names
                InertUnpickler(file).load()
            return
        with zipfile.ZipFile(file) as archive:
            for each in archive.infolist():
                if each.filename.lower().endswith("data.pkl"):
                    InertUnpickler(io.BytesIO(archive.read(each))).load()


_READERS: dict[str, Any] = {
    "pickle": _read_pickle, "MATLAB": _read_mat, "HDF5": _read_hdf5, "PyTorch": _try_torch,
}  # fmt: skip


def _child(kind: str, name: str, seconds: str, memory: str, *packages: str) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no limits, macOS none of memory
        import resource

        for limit, value in (("CORE", 0), ("CPU", int(seconds)), ("AS", int(memory))):
            number = getattr(resource, f"RLIMIT_{limit}")
            resource.setrlimit(number, (value, resource.getrlimit(number)[1]))
    sys.path += packages
    try:
        Answer(_READERS[kind](Path(name)), 16 * os.path.getsize(name) + 1_000_000).write(sys.stdout.buffer)
    except RefusedError as error:
        sys.exit(f"is refused: {error}")
    except Exception as error:  # damaged files raise almost any exception
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        sys.exit(f"is damaged or not a {kind} file ({reason}); fetch it again")


if __name__ == "__main__":
    _child(*sys.argv[1:])
