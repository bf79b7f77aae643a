"""Load saved descriptors: the project's own, revisitop's .mat files, and those of the distractors."""

import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from extraction.store import provenance_differences, provenance_path, read_provenance
from model.checkpoint import is_plain, load_tensors
from model.errors import InputError, short_list
from modules.search import Database
from revisitop.dataset import Dataset
from revisitop.measures import NOT_FOUND
from revisitop.retrieve import Ranking
from revisitop.safe_pickle import ArrayLike, load_pickle

log = logging.getLogger(__name__)

# Lengths in float16 files are off by up to 5e-4; a larger deviation is not rounding.
_UNIT_TOLERANCE = 1e-3


def load_descriptors(path: Path, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Returns the saved query and database descriptors of a dataset, (Q, D) and (N, D) float32, unit descriptors.

    Args:
        path: a .mat, .npz or .pth file with Q and X, with one column per image as in revisitop's files, or
            one row per image; one of the two files <dataset>_query.npy and <dataset>_db.npy; or the folder
            that contains both.

    Raises:
        InputError: if a file is missing or damaged, does not fit the dataset, or contains a zero vector
            or values that are not finite.
    """
    if not path.exists():
        raise InputError(f"no file or folder {path}")
    suffix = path.suffix.lower()
    if path.is_dir() or suffix == ".npy":
        folder = path if path.is_dir() else path.parent
        files = [folder / f"{dataset.name}_{kind}.npy" for kind in ("query", "db")]
        if path.suffix and not path.is_dir() and path not in files:
            raise InputError(f"{path}: for {dataset.name} it must be {files[0].name} or {files[1].name}")
        arrays = [_load_npy(file) for file in files]
        _check_pair(*files)
    elif suffix in (".mat", ".npz", ".pth"):
        content = {".mat": load_mat, ".npz": _load_npy, ".pth": load_tensors}[suffix](path)
        try:
            arrays = [_array(content[name]) for name in ("Q", "X")]
        except (KeyError, TypeError, IndexError):
            raise InputError(f"{path} has no Q and X (query and database descriptors)") from None
        except Exception as error:  # .npz files are decompressed here
            raise InputError(f"{path}: Q or X is damaged or not a plain array ({_first_line(error)})") from None
    else:
        raise InputError(f"{path} must be a .mat, .npz, .pth or .npy file or a folder")
    counts = (len(dataset.queries), len(dataset.database))
    columns_first = suffix == ".mat"
    queries, database = (
        _rows(array, count, columns_first, f"{kind} descriptors of {path}", dataset.name)
        for array, count, kind in zip(arrays, counts, ("query", "database"), strict=True)
    )
    if queries.shape[1] != database.shape[1]:
        raise InputError(f"{path}: queries have {queries.shape[1]} dimensions, the database {database.shape[1]}")
    return queries, database


def load_ranking(path: Path, dataset: Dataset) -> Ranking:
    """Loads a saved ranking: similarities and database numbers, as in AMES' nn_*.pkl.

    Args:
        path: a .pkl file with a tensor or an array (2, Q, R): for each query, the similarities of its first R
            results, best first, and their numbers; -1 where there are no more. R may be below N: images that
            are not among the results count as never found.

    Raises:
        InputError: if the file is damaged, is not safe to load, or does not fit the dataset.
    """
    try:
        content = load_tensors(path)
    except InputError:
        content = load_pickle(path)
    saved = _array(content) if isinstance(content, Tensor | np.ndarray | ArrayLike) else np.empty(0)
    if saved.ndim != 3 or len(saved) != 2 or not np.issubdtype(saved.dtype, np.number):
        raise InputError(
            f"{path} is not a ranking: a tensor (2, Q, R) of similarities and database numbers is expected"
        )
    q, n, r = len(dataset.queries), len(dataset.database), saved.shape[2]
    if saved.shape[1] != q:
        raise InputError(f"{path} has {saved.shape[1]} queries, but {dataset.name} has {q}")
    scores, numbers = saved[0].astype(np.float32), saved[1]
    ids = np.where(np.isfinite(numbers), numbers, -2).astype(np.int64)
    if (ids != numbers).any() or (ids < -1).any() or (ids >= n).any():
        raise InputError(f"{path}: the numbers of results must be whole numbers from 0 to {n - 1}, or -1 for none")
    for query, row in enumerate(ids):
        there = row[row >= 0]
        if len(np.unique(there)) < len(there):
            raise InputError(f"{path}: query {query} (from 0) has the same image twice among its results")
    if r < n:
        log.warning("%s has %d results of %d images: images that are not among them count as never found", path, r, n)
    positions = []
    for row, listed in zip(ids, dataset.listed, strict=True):
        place = np.full(n, NOT_FOUND, dtype=np.int64)
        there = np.flatnonzero(row >= 0)
        place[row[there]] = there
        positions.append(torch.from_numpy(place[listed.numpy()]))
    return Ranking(torch.from_numpy(ids), torch.from_numpy(scores), positions, 0.0)


def descriptors_made_from(path: Path, dataset: Dataset) -> dict[str, Any]:
    """Returns the provenance of saved descriptors; empty if they have no provenance file.

    Args:
        path: as in load_descriptors.
    """
    file = database_file(path, dataset)
    return {key: value for key, value in (read_provenance(file) or {}).items() if key != "stamps"}


def database_file(path: Path, dataset: Dataset) -> Path:
    """Returns the file with the database descriptors of a dataset.

    Args:
        path: as in load_descriptors.
    """
    folder = path if path.is_dir() else path.parent
    return folder / f"{dataset.name}_db.npy" if path.is_dir() or path.suffix.lower() == ".npy" else path


def load_distractors(path: Path) -> Tensor:
    """Loads the descriptors of the distractors, (N, D), memory-mapped.

    Raises:
        InputError: as load_rows, and if rows are not unit vectors (a thousand of them are checked; zero rows,
            which belong to skipped images, are valid).
    """
    rows = load_rows(path)
    norms = rows[:: max(1, len(rows) // 1000)].float().norm(dim=1)
    if ((norms > 0) & ((norms - 1).abs() > _UNIT_TOLERANCE)).any():
        raise InputError(
            f"{path}: its rows are not of unit length ({norms.min():.3g} to {norms.max():.3g}); normalise them"
        )
    return rows


def load_rows(path: Path) -> Tensor:
    """Loads vectors (N, D) in float16, float32 or float64, memory-mapped.

    Raises:
        InputError: if the file is damaged, or contains something else.
    """
    if path.suffix == ".npy":
        array = _load_npy(path, mmap_mode="c")
        rows = torch.from_numpy(array) if array.dtype in (np.float16, np.float32, np.float64) else None
    else:
        rows = load_tensors(path)
    if isinstance(rows, Tensor):
        rows = rows.detach()
    if not isinstance(rows, Tensor) or rows.ndim != 2 or not rows.is_floating_point() or not is_plain(rows):
        raise InputError(f"{path} is not a floating-point array (N, D) with one descriptor per row")
    if not rows.numel():
        raise InputError(f"{path} contains no descriptors: its shape is {tuple(rows.shape)}")
    return rows


def check_distractors(path: Path, provenance: dict) -> None:
    """Compares the provenance of the distractors with that of the database; warns if a file has none.

    Raises:
        InputError: if they differ; the message names the differences.
    """
    differing = provenance_differences(path, provenance)
    if differing is None:
        log.warning("%s has no provenance file %s; it is not compared with this run", path, provenance_path(path).name)
    elif differing:
        raise InputError(
            f"{path} was extracted with other settings ({short_list(differing)}); "
            "run with those, or extract it again with extract_rop1m.py"
        )


def _check_pair(queries: Path, database: Path) -> None:
    """Raises InputError if query and database descriptors have different settings, as after an interrupted run."""
    made_from = read_provenance(queries) or {}
    provenance = {key: value for key, value in made_from.items() if key != "stamps"}
    if differing := provenance_differences(database, provenance):
        what = short_list(differing).replace("before", "in the database").replace("now", "in the queries")
        raise InputError(f"{queries} and {database} have different settings ({what}); extract them again")


def _array(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        if not is_plain(values):
            raise ValueError("not a plain tensor")
        return values.detach().float().numpy() if values.is_floating_point() else values.numpy()
    return np.asarray(values)


def add_distractors(rows: Tensor, distractors: Sequence[Tensor]) -> Database:
    """Returns the database followed by the distractors. Raises InputError if dimensions differ."""
    if rows.shape[1] != distractors[0].shape[1]:
        raise InputError(f"the distractors have {distractors[0].shape[1]} dimensions, the database {rows.shape[1]}")
    return Database([rows, *distractors])


def _load_npy(path: Path, mmap_mode: str | None = None) -> Any:
    try:
        return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # exceptions of zipfile, zlib and NumPy
        raise InputError(f"{path} is damaged or not a NumPy file ({_first_line(error)})") from None


# A damaged file can crash SciPy's reader, so that it runs in a process of its own.
_READ_MAT = """
import sys
import numpy, scipy.io
try:
    content = scipy.io.loadmat(sys.argv[1], variable_names=["X", "Q"])
except NotImplementedError:
    sys.exit("it is in MATLAB 7.3 format (HDF5); save it with -v7")
except Exception as error:
    sys.exit((str(error) or type(error).__name__).splitlines()[0])
numpy.savez(sys.argv[2], **{name: content[name] for name in ("X", "Q") if name in content})
"""


def load_mat(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays Q and X of a MATLAB file, without those that are missing.

    Raises:
        InputError: if it is damaged or not a MATLAB file.
    """
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "descriptors.npz"
        command = [sys.executable, "-c", _READ_MAT, str(path.absolute()), str(converted)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:] if done.returncode > 0 else [f"signal {-done.returncode}"]
            raise InputError(f"{path} is damaged or not a MATLAB file ({''.join(reason)})")
        try:
            with np.load(converted, allow_pickle=False) as content:
                return dict(content)
        except ValueError:  # arrays of objects
            raise InputError(f"{path}: Q or X is not an array of numbers") from None


def _rows(array: np.ndarray, count: int, columns_first: bool, what: str, dataset: str) -> Tensor:
    """Returns one unit descriptor per image, as a row, whether the file has them as rows or columns."""
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"{what}: expected a 2-dimensional floating-point array, got {array.dtype} {array.shape}")
    fits = [axis for axis in ((1, 0) if columns_first else (0, 1)) if array.shape[axis] == count]
    if not fits:
        raise InputError(f"{what}: {dataset} has {count} images, but the shape is {array.shape}")
    if len(fits) == 2:  # as many dimensions as images: descriptors have unit length, a few damaged ones aside
        values = torch.from_numpy(array.astype(np.float32))
        unit = {axis: (values.norm(dim=1 - axis) - 1).abs() <= _UNIT_TOLERANCE for axis in fits}
        fits = [axis for axis in fits if unit[axis].float().mean() > 0.5]
        if len(fits) != 1:
            advice = "both have unit length; add a dimension of zeros" if fits else "save them with unit length"
            raise InputError(f"{what}: rows and columns cannot be distinguished by the shape {array.shape}; {advice}")
    rows = torch.from_numpy(np.ascontiguousarray(array if fits[0] == 0 else array.T, dtype=np.float32))
    norms = rows.norm(dim=1)
    bad = (~(norms > 0) | ~torch.isfinite(norms)).nonzero().flatten()
    if len(bad):
        raise InputError(f"{what}: the descriptor of image {int(bad[0])} (from 0) is zero or not finite")
    off = ((norms - 1).abs() > _UNIT_TOLERANCE).sum()
    if off:
        log.warning("%s: %d of %d are not of unit length; they are normalised", what, off, count)
        rows = rows / norms[:, None]
    return rows


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
