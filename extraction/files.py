"""Files: written in one step, and read without trust in whoever wrote them.

Reading gives what was asked for or an InputError of one line: no file runs code, hangs or exhausts the command.
"""

import errno
import importlib.util
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import torch

from model.errors import InputError, reason_of
from model.pickles import read_in_child


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file in one step: it is always the complete old file or the complete new one, after a power cut, too.

    Processes that write it at the same time do not disturb each other; the last one wins.

    Args:
        path: the file; its folder must exist.
        write: writes the content into the open file.

    Raises:
        InputError: if it cannot be written. Nothing remains of the new file then.
    """
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with new.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides the error of the disk
        if not isinstance(cause, OSError) or isinstance(cause, ConnectionError):  # of a process that died meanwhile
            raise
        raise InputError(f"{path} cannot be written ({cause.strerror or cause})") from None
    finally:
        if new.exists():
            new.unlink()


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file atomically, see jsonable."""
    write_atomically(path, lambda file: file.write(json.dumps(jsonable(content), indent=1).encode() + b"\n"))


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes a .npy file atomically."""
    write_atomically(path, lambda file: np.save(file, array, allow_pickle=False))


def jsonable(value: Any) -> Any:
    """Returns the value in JSON types: NaN becomes null, infinity the text 'inf', an array a list."""
    if isinstance(value, dict):
        return {key: jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [jsonable(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value.item() if isinstance(value, np.generic) else value


def reserve(file: IO[bytes], size: int) -> None:
    """Reserves `size` bytes on the disk: writing to a mapped file on a full disk would kill the process."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except AttributeError:  # not on every system
        file.truncate(size)
    except OSError as error:  # nor on every file system
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        file.truncate(size)


def scratch_rows(rows: int, dim: int, folder: Path | None = None) -> torch.Tensor:
    """Returns a new (rows, dim) float32 tensor on disk, in a file that is deleted together with the tensor.

    Args:
        folder: the folder of the file; by default the system's folder for temporary files.

    Raises:
        InputError: if there is no room for it.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            reserve(file, max(1, 4 * rows * dim))
            return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=(rows, dim)))
    except OSError as error:
        where = folder or tempfile.gettempdir()
        raise InputError(f"{where} has no room for {rows:,} rows of {dim} ({error.strerror})") from None


def read_json(path: Path) -> dict:
    """Returns the content of a JSON file with an object.

    Raises:
        InputError: if it is missing or damaged, nested too deeply, or has integers of thousands of digits.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # of format, encoding, depth, or an integer that is too long
        raise InputError(f"{path} is damaged, not valid JSON ({reason_of(error)})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must contain a JSON object, but has a {type(content).__name__}")
    return content


def read_numpy(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of numbers or text of a .npz file by name, or that of a .npy file, named "" and memory-mapped.

    They have the byte order of this machine.

    Raises:
        InputError: if it is missing or damaged, or an array has anything else.
    """
    try:
        content = np.load(path, mmap_mode="c", allow_pickle=False)  # mapped: a short file is noticed before it is read
        if isinstance(content, np.ndarray):
            content = {"": content}
        elif sum(each.file_size for each in content.zip.infolist()) > 100 * path.stat().st_size + 1_000_000:
            raise InputError(f"{path} is refused: unpacked, it is more than 100 times as large")
        arrays = {name: np.asarray(content[name]) for name in content}  # which are decompressed here
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # exceptions of zipfile, zlib and NumPy
        raise InputError(f"{path} is damaged or not a NumPy file ({reason_of(error)}); fetch it again") from None
    for name, array in arrays.items():
        if array.dtype.kind not in "fiuSU" or array.dtype.char == "g":
            what = f"{name} of {path}" if name else path
            raise InputError(f"{what}: expected numbers of at most 64 bits, got {array.dtype} {array.shape}")
    return {name: array.astype(array.dtype.newbyteorder("="), copy=False) for name, array in arrays.items()}


def read_hdf5(path: Path) -> dict[str, Any]:
    """Returns the arrays of an HDF5 file by name; those of hloc's groups together, with the list `names` of the groups.

    Raises:
        InputError: if h5py is not installed, the file is missing or damaged, or takes too much time or memory.
    """
    if importlib.util.find_spec("h5py") is None:
        raise InputError(f"{path} is an HDF5 file, which needs h5py: pip install h5py")
    return _from_child("HDF5", path)


def read_pickle(path: Path) -> Any:
    """Returns the content of a pickle: containers, numbers, text, and arrays or tensors as NumPy arrays.

    Tuples, sets of numbers and arrays of text become lists, bytes text, and arrays without axes numbers.

    Raises:
        InputError: if it is missing, damaged, contains or calls anything else, or takes too much time or memory.
    """
    return _from_child("pickle", path)


def read_mat(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays Q, X and ranks of a MATLAB file, without those that are missing.

    Raises:
        InputError: if it is missing, damaged or not a MATLAB file, or takes too much time or memory.
    """
    return _from_child("MATLAB", path)


def _from_child(kind: str, path: Path) -> Any:
    try:
        head, _, data = read_in_child(kind, path).partition(b"\n")
        return _decoded(json.loads(head), memoryview(data))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} {reason_of(error)}") from None


def _decoded(value: Any, data: memoryview) -> Any:
    """Returns the object of an answer, see model.pickles.Answer."""
    if isinstance(value, list):
        return [_decoded(inner, data) for inner in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "dict":
        return {key: _decoded(each, data) for key, each in inner.items()}
    text, shape, strides, start, end = inner
    try:
        array = np.ndarray(shape, text, data[start:end], strides=strides)
        array = array.astype(array.dtype.newbyteorder("="))
        return array.tolist() if array.ndim == 0 or array.dtype.kind in "SU" else array
    except (ValueError, TypeError) as error:
        raise ValueError(f"has a damaged array ({reason_of(error)}); fetch it again") from None
