"""Load saved descriptors and rankings: the project's own, revisitop's .mat files, and those of the distractors."""

import logging
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from extraction.files import read_array, read_arrays, read_mat, read_pickle
from extraction.store import FILE_FACTS, check_rows, differences, provenance_differences, read_provenance, sidecars
from model.checkpoint import is_plain, is_tensor_file, load_tensors
from model.errors import InputError, short_list
from revisitop.dataset import Dataset
from revisitop.evaluate import positions_in
from revisitop.layout_csv import read_predictions
from revisitop.retrieve import Ranking

log = logging.getLogger(__name__)

RANKINGS = (".pkl", ".csv")  # suffixes of files with a ranking instead of descriptors
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
        if not path.is_dir() and path not in files:
            raise InputError(f"{path}: for {dataset.name} it must be {files[0].name} or {files[1].name}")
        arrays = [read_array(file) for file in files]
        for file, images in zip(files, (dataset.queries, dataset.database), strict=True):
            check_labels(file, [image.label(dataset.folder) for image in images])
        for file, array in zip(files, arrays, strict=True):
            check_rows(file, array)
        _check_pair(*files)
    elif suffix == ".npz":
        arrays = read_arrays(path, ("Q", "X"))
    elif suffix in (".mat", ".pth", ".pt"):
        content: Any = read_mat(path) if suffix == ".mat" else load_tensors(path)
        if not isinstance(content, dict) or not {"Q", "X"} <= content.keys():
            raise InputError(f"{path} has no Q and X (query and database descriptors)")
        arrays = [_array(content[name], f"{name} of {path}") for name in ("Q", "X")]
    else:
        raise InputError(f"{path} must be a .mat, .npz, .pth or .npy file or a folder")
    queries, database = (
        _rows(array, count, suffix == ".mat", f"{kind} descriptors of {path}", dataset.name)
        for array, count, kind in zip(
            arrays, (len(dataset.queries), len(dataset.database)), ("query", "database"), strict=True
        )
    )
    if queries.shape[1] != database.shape[1]:
        raise InputError(f"{path}: queries have {queries.shape[1]} dimensions, the database {database.shape[1]}")
    return queries, database


def check_labels(path: Path, expected: Sequence[bytes]) -> None:
    """Compares the images of saved descriptors with those of a dataset, if there is a file of their labels beside them.

    Args:
        path: the descriptors, NAME.npy; their labels are the array `labels` of NAME.npy.images.npz.
        expected: the labels of the dataset's images, see ImageFile.label.

    Raises:
        InputError: if they differ; the message names the first difference.
    """
    file = Path(f"{path}.images.npz")
    if not file.exists():
        return
    (labels,) = read_arrays(file, ["labels"], kinds="S")
    for number, (label, other) in enumerate(zip_longest(labels.tolist(), expected)):
        if label != other:
            found, wanted = ("none" if each is None else repr(each.decode(errors="replace")) for each in (label, other))
            raise InputError(f"{path} belongs to other images: image {number} (from 0) is {found}, not {wanted}")


def load_ranking(path: Path, dataset: Dataset) -> Ranking:
    """Loads a saved ranking: predictions in the challenge's format, or similarities and numbers as in AMES' nn_*.pkl.

    Images that are not among the results count as never found.

    Args:
        path: a .csv file `id,images`, for a dataset in GLDv2's layout (see layout_csv.read_predictions); or a .pkl file
            with a tensor or an array (2, Q, R): for each query, the similarities of its first R results, best first,
            and their database numbers; -1 where there are no more.

    Raises:
        InputError: if the file is damaged, is not safe to load, or does not fit the dataset.
    """
    if path.suffix.lower() == ".csv":
        predictions = read_predictions(path, dataset)
        ids = np.full((len(predictions), max(map(len, predictions))), -1)
        for row, numbers in zip(ids, predictions, strict=True):
            row[: len(numbers)] = numbers
        if empty := sum(not len(numbers) for numbers in predictions):
            log.warning("%d of %d queries have no predictions and count 0", empty, len(predictions))
        if unknown := sum(int((numbers < 0).sum()) for numbers in predictions):
            log.warning("%d predictions repeat an earlier one or are not in the index; they never score", unknown)
        scores = np.full(ids.shape, np.nan, dtype=np.float32)
    else:
        ids, scores = _neighbours(path, dataset)
    positions = [torch.from_numpy(places) for places in positions_in(ids, dataset.ground_truth)]
    return Ranking(torch.from_numpy(ids), torch.from_numpy(scores), positions, 0.0)


def _neighbours(path: Path, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    if not path.is_file():
        raise InputError(f"no file {path}")
    saved = _array(load_tensors(path) if is_tensor_file(path) else read_pickle(path), str(path))
    if saved.ndim != 3 or len(saved) != 2:
        raise InputError(f"{path}: expected similarities and database numbers (2, Q, R), got the shape {saved.shape}")
    if saved.shape[1] != len(dataset.queries):
        raise InputError(f"{path} has {saved.shape[1]} queries, but {dataset.name} has {len(dataset.queries)}")
    if saved.shape[2] < len(dataset.database):
        log.warning("%s has the first %d of %d images", path, saved.shape[2], len(dataset.database))
    return check_ids(saved[1], len(dataset.database), path), saved[0].astype(np.float32)


def check_ids(ids: np.ndarray, n: int, path: Path) -> np.ndarray:
    """Returns the row numbers of results, (Q, R), as int64.

    Raises:
        InputError: if they are not whole numbers from 0 to n - 1, or -1 for none, or one is twice in a row.
    """
    numbers = np.where(np.isfinite(ids), ids, -2).astype(np.int64)
    if (numbers != ids).any() or (numbers < -1).any() or (numbers >= n).any():
        raise InputError(f"{path}: the numbers of results must be whole numbers from 0 to {n - 1}, or -1 for none")
    for query, row in enumerate(numbers):
        found = np.sort(row[row >= 0])
        if (found[1:] == found[:-1]).any():
            raise InputError(f"{path}: query {query} (from 0) has the same image twice among its results")
    return numbers


def descriptors_provenance(path: Path, dataset: Dataset) -> dict[str, Any]:
    """Returns the provenance of saved descriptors, see load_descriptors; empty if they have no provenance file."""
    return read_provenance(database_file(path, dataset)) or {}


def database_file(path: Path, dataset: Dataset) -> Path:
    """Returns the file with the database descriptors of a dataset, see load_descriptors."""
    folder = path if path.is_dir() else path.parent
    return folder / f"{dataset.name}_db.npy" if path.is_dir() or path.suffix.lower() == ".npy" else path


def load_distractors(path: Path) -> Tensor:
    """Loads the descriptors of the distractors, (N, D), memory-mapped.

    Raises:
        InputError: as load_rows, and if rows are damaged, or not unit vectors (a thousand of them are checked; zero
            rows, which belong to skipped images, are valid).
    """
    rows = load_rows(path)
    check_rows(path, rows.numpy())
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
    rows = torch.from_numpy(read_array(path, mapped=True)) if path.suffix == ".npy" else load_tensors(path)
    if not isinstance(rows, Tensor) or rows.ndim != 2 or not rows.is_floating_point() or not is_plain(rows):
        raise InputError(f"{path} is not a floating-point array (N, D) with one descriptor per row")
    if not rows.numel():
        raise InputError(f"{path} contains no descriptors: its shape is {tuple(rows.shape)}")
    return rows.detach()


def check_distractors(path: Path, provenance: dict[str, Any], probe: np.ndarray, tolerance: float) -> None:
    """Compares the provenance of the distractors with that of the database; warns if a file has none.

    Args:
        probe, tolerance: as in extraction.store.Store.

    Raises:
        InputError: if they differ; the message names the differences.
    """
    differing = provenance_differences(path, provenance, probe, tolerance)
    if differing is None:
        log.warning("%s has no provenance file %s; it is not compared with this run", path, sidecars(path)[0].name)
    elif differing:
        raise InputError(
            f"{path} was extracted with other settings ({short_list(differing)}); "
            "run with those, or extract it again with extract_rop1m.py"
        )


def _check_pair(queries: Path, database: Path) -> None:
    """Raises InputError if query and database descriptors have different settings, as after an interrupted run."""
    made, other = ({**(read_provenance(file) or {})} for file in (queries, database))
    settings = {key: value for key, value in made.items() if key not in FILE_FACTS}
    if made and other and (differing := differences(other, settings)):
        raise InputError(
            f"{database} (before) and {queries} (now) have different settings ({short_list(differing)}); "
            "extract them again"
        )


def _array(values: Any, what: str) -> np.ndarray:
    if isinstance(values, Tensor) and is_plain(values):
        return values.detach().float().numpy() if values.is_floating_point() else values.numpy()
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
        raise InputError(f"{what} must be an array of numbers, but it is a {type(values).__name__}")
    return values


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
