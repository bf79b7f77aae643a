"""Read arrays from files of other programs. The kind of a file is recognised by its content."""

import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from extraction.files import read_hdf5, read_mat, read_numpy, read_pickle
from model.checkpoint import is_plain, is_tensor_file, load_tensors
from model.errors import InputError, short_list

KINDS = "NumPy's .npy and .npz, MATLAB's .mat, PyTorch's .pth, HDF5 and .pkl"

_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"


class Arrays(NamedTuple):
    """The arrays of a file.

    Attributes:
        path: the file.
        arrays: its arrays of numbers by their names; an array without a name, as in a .npy file, has the name "".
        names: the images to which the rows of its only array belong, if the file names them.
    """

    path: Path
    arrays: dict[str, np.ndarray]
    names: list[str] | None = None

    @property
    def only(self) -> np.ndarray | None:
        """The array, if the file has only one."""
        return next(iter(self.arrays.values())) if len(self.arrays) == 1 else None

    def __str__(self) -> str:
        found = [f"{name} {array.dtype} {array.shape}".strip() for name, array in self.arrays.items()]
        return f"{self.path} (with {short_list(found)})"


def is_text(path: Path) -> bool:
    """Returns whether a file begins with text, as a CSV file does."""
    head = _head(path)
    return bool(head) and min(head) >= ord("\t") and b"\n" in head and not head.startswith(b"MATLAB")


def read_arrays_of(path: Path) -> Arrays:
    """Returns the arrays of a file, memory-mapped if it is a .npy or .pth file; those of MATLAB are transposed.

    (MATLAB users store a descriptor as a column.)

    Raises:
        InputError: if it is missing, damaged, of another kind, or contains no array of numbers.
    """
    head = _head(path)
    found: Any
    if head.startswith(b"\x93NUMPY") or (head.startswith(b"PK\x03\x04") and _has_numpy_arrays(path)):
        found = read_numpy(path)
    elif is_tensor_file(path):
        found = load_tensors(path)
    elif _HDF5_MAGIC in (head[:8], head[512:520]):  # MATLAB 7.3 writes HDF5 after a header of its own
        found = read_hdf5(path)
    elif head.startswith(b"MATLAB") or path.suffix.lower() == ".mat":
        found = read_mat(path)
    elif head.startswith(b"\x80") or path.suffix.lower() == ".pkl":
        found = read_pickle(path)
    else:
        raise InputError(
            f"{path} is {'of another kind' if head else 'empty'}; {KINDS} can be read; save others with numpy.save"
        )
    names = found.pop("names", None) if isinstance(found, dict) else None
    found = found if isinstance(found, dict) else {"": found}
    arrays = {name: array for name, each in found.items() if (array := _numbers(each)) is not None}
    if not arrays:
        where = " (in HDF5: of a descriptor per image, not of local features)" if _HDF5_MAGIC in head else ""
        raise InputError(f"{path} contains no array of numbers{where}")
    if head.startswith(b"MATLAB") and head[512:520] != _HDF5_MAGIC:
        arrays = {name: array.T if array.ndim == 2 else array for name, array in arrays.items()}
    return Arrays(path, arrays, names)


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(1024)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def _has_numpy_arrays(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return all(name.endswith(".npy") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return path.suffix.lower() == ".npz"  # the reader says what is damaged


def _numbers(value: Any) -> np.ndarray | None:
    """Returns an array or a tensor of numbers as an array, None for anything else."""
    if isinstance(value, Tensor):
        if not is_plain(value) or value.ndim == 0:
            return None
        value = value.detach()
        return (value.float() if value.element_size() == 2 and value.is_floating_point() else value).numpy()
    return value if isinstance(value, np.ndarray) and value.dtype.kind in "fiu" and value.ndim else None
