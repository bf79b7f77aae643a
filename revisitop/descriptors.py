"""Load saved descriptors and rankings, of the project and of other programs.

A file is read whatever its kind (extraction.arrays); here its arrays become the descriptors or ranking of a dataset.
"""

import logging
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from extraction.arrays import Arrays, is_text, read_arrays_of
from extraction.files import read_numpy, scratch_rows
from extraction.images import ImageFile
from extraction.provenance import Provenance, differences, read_provenance, sidecars
from extraction.store import FILE_FACTS, check_rows
from model.errors import InputError, short_list
from revisitop.dataset import Dataset
from revisitop.index import positions_of
from revisitop.layout_csv import read_predictions
from revisitop.retrieve import Ranking

log = logging.getLogger(__name__)

# Lengths in float16 files are off by up to 5e-4; a larger deviation is not rounding.
_UNIT_TOLERANCE = 1e-3
_ROWS = 8192  # rows whose lengths are computed at a time
# Files of queries and of the database: the parts of their names, and the lists of images beside those of AMES.
_PAIRS = (("_query", "_db"), ("_query", "_gallery"))
LISTS = ("test_query.txt", "test_gallery.txt")


class SavedDescriptors(NamedTuple):
    """The saved descriptors of a dataset.

    Attributes:
        queries, database: (Q, D) and (N, D) float32, unit descriptors.
        file: the file of the database.
    """

    queries: Tensor
    database: Tensor
    file: Path


def load_features(path: Path, dataset: Dataset) -> SavedDescriptors | Ranking:
    """Returns what a file has for a dataset: its descriptors, or a ranking.

    Args:
        path: descriptors: a file with Q and X (queries and database), with one column per image as in revisitop's
            .mat files, or one row per image; an HDF5 file of hloc, whose image names are those of the dataset; one of
            two files NAME_query.npy and NAME_db.npy, or of AMES NAME_query_global.hdf5 and NAME_gallery_global.hdf5,
            or the folder that contains both. A ranking: see load_ranking.

    Raises:
        InputError: if a file is missing or damaged, does not fit the dataset, or contains a zero vector
            or values that are not finite.
    """
    if path.is_dir():
        file, others = path / f"{dataset.name}_query.npy", sorted(path.glob("*_query_global.*"))
        return _pair(others[0] if len(others) == 1 and not file.exists() else file, dataset)
    if is_text(path):
        return load_ranking(path, dataset)
    found = read_arrays_of(path)
    if _is_ranking(found):
        return load_ranking(path, dataset)
    if {"Q", "X"} <= found.arrays.keys():
        queries, database = (
            _rows(found.arrays[name], count, f"{name} of {path}", dataset.name)
            for name, count in (("Q", len(dataset.queries)), ("X", len(dataset.database)))
        )
        return _saved(queries, database, path)
    if found.only is None:
        raise InputError(f"{found}: Q and X (queries and database), or a single array, are expected")
    if found.names is not None:
        queries, database = (
            _rows(found.only[rows_by_name(found.names, images, path)], len(images), str(path), dataset.name)
            for images in (dataset.queries, dataset.database)
        )
        return _saved(queries, database, path)
    return _pair(path, dataset)


def _pair(path: Path, dataset: Dataset) -> SavedDescriptors:
    """Returns the descriptors in the file of the queries and that of the database, given one of the two."""
    pairs = [
        tuple(path.with_name(kind.join(path.name.rsplit(part, 1))) for kind in kinds)
        for kinds in _PAIRS
        for part in kinds
        if part in path.name
    ]
    if not pairs:
        raise InputError(
            f"{path} has a single array; name it {dataset.name}_db.npy"
            + (f", beside {dataset.name}_query.npy for the queries" if dataset.in_database is None else "")
        )
    files = next((files for files in pairs if all(file.exists() for file in files)), pairs[0])
    database = _rows_of_images(files[1], dataset.database, LISTS[1], dataset)
    if dataset.in_database is not None and not files[0].exists():  # as a run leaves queries that are database images
        return _saved(database[torch.from_numpy(dataset.in_database)], database, files[1])
    queries = _rows_of_images(files[0], dataset.queries, LISTS[0], dataset)
    _check_pair(*files)
    return _saved(queries, database, files[1])


def _rows_of_images(file: Path, images: Sequence[ImageFile], names: str, dataset: Dataset) -> Tensor:
    """Returns the rows of one of two files, in the order of the images; `names` is a list of theirs beside the file."""
    check_labels(file, [image.label(dataset.folder) for image in images])
    found, listed = read_arrays_of(file), file.with_name(names)
    if found.only is None:
        raise InputError(f"{found}: a single array is expected")
    rows = found.only
    check_rows(file, rows)
    if file.suffix != ".npy" and listed.exists():
        named = [line.partition(",")[0].strip() for line in listed.read_text(encoding="utf-8").splitlines()]
        if len(named) != len(rows):
            raise InputError(f"{listed} has {len(named)} lines, {file} has {len(rows)} rows")
        rows = rows[rows_by_name(named, images, listed)]
    return _rows(rows, len(images), str(file), dataset.name)


def _saved(queries: Tensor, database: Tensor, file: Path) -> SavedDescriptors:
    if queries.shape[1] != database.shape[1]:
        raise InputError(f"{file}: queries have {queries.shape[1]} dimensions, the database {database.shape[1]}")
    return SavedDescriptors(queries, database, file)


def rows_by_name(names: Sequence[str], images: Sequence[ImageFile], path: Path) -> list[int]:
    """Returns the number of the name of each image: its path, or the end of it, with or without the suffix.

    Raises:
        InputError: if an image has no name, two images have the same, or a name is repeated.
    """
    places = {name: number for number, name in enumerate(names)}
    if len(places) < len(names):
        raise InputError(f"{path}: {next(name for name in names if names.count(name) > 1)} is there twice")
    rows: list[int] = []
    owners: dict[int, Path] = {}
    for image in images:
        ends = [image.path.parts[start:] for start in range(1, len(image.path.parts))]
        names_of_image = ["/".join(end) for end in ends]
        names_of_image += [name.removesuffix(image.path.suffix) for name in names_of_image]
        name = next((name for name in names_of_image if name in places), None)
        if name is None:
            raise InputError(f"{path} has no {'/'.join(image.path.parts[-2:])}; its names are {short_list(names, 3)}")
        rows.append(places[name])
        if owners.setdefault(rows[-1], image.path) != image.path:
            raise InputError(f"{path}: {name} fits both {owners[rows[-1]]} and {image.path}; names need their folders")
    return rows


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
    labels = read_numpy(file).get("labels", np.empty(0, np.bytes_))
    for number, (label, other) in enumerate(zip_longest(labels.tolist(), expected)):
        if label != other:
            found, wanted = ("none" if each is None else repr(each.decode(errors="replace")) for each in (label, other))
            raise InputError(f"{path} belongs to other images: image {number} (from 0) is {found}, not {wanted}")


def _is_ranking(found: Arrays) -> bool:
    """Returns whether arrays are similarities and numbers (2, Q, R), or the numbers alone."""
    array = found.arrays.get("ranks", found.only)
    return array is not None and (array.ndim == 3 or array.dtype.kind in "iu" or "ranks" in found.arrays)


def load_ranking(path: Path, dataset: Dataset) -> Ranking:
    """Loads a saved ranking. Images that are not among the results count as never found.

    Args:
        path: the challenge's CSV file `id,images` (see layout_csv.read_predictions), or see ranking_of.

    Raises:
        InputError: if the file is damaged, is not safe to load, or does not fit the dataset.
    """
    if is_text(path):
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
        ids, scores = ranking_of(read_arrays_of(path), len(dataset.queries), len(dataset.database))
        if ids.shape[1] < len(dataset.database):
            log.warning("%s has the first %d of %d images", path, ids.shape[1], len(dataset.database))
    rows = torch.from_numpy(ids)
    positions = [positions_of(numbers, row) for numbers, row in zip(dataset.listed, rows, strict=True)]
    return Ranking(rows, torch.from_numpy(scores), positions, 0.0)


def ranking_of(found: Arrays, queries: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns row numbers (Q, R) int64, best first, -1 for none, and their scores (Q, R), NaN where they are unknown.

    Args:
        found: an array (2, Q, R) of similarities and row numbers, as in the nn_*.pkl of AMES; or the row numbers
            alone, (R, Q) as in revisitop's `ranks`, or (Q, R) as in ours.
        queries, n: the number of queries and of rows.

    Raises:
        InputError: if the array does not fit.
    """
    array = found.arrays.get("ranks", found.only)
    if array is None or array.ndim not in (2, 3) or (array.ndim == 3 and len(array) != 2):
        raise InputError(
            f"{found}: row numbers (Q, R), or similarities and row numbers (2, Q, R), are expected (alone, or as ranks)"
        )
    ids = array[1] if array.ndim == 3 else array
    fits = [axis for axis in range(4 - array.ndim) if ids.shape[axis] == queries]
    if not fits:
        raise InputError(f"{found}: one of its sides must be {queries}, the number of queries")
    if len(fits) == 2:  # numbers of one query are different, those of one rank are not
        fits = [axis for axis in fits if _are_different(ids if axis == 0 else ids.T)]
        if len(fits) != 1:
            raise InputError(
                f"{found}: its rows or its columns can be the queries; add a row of -1 if each column is a query, "
                "a column of -1 if each row is"
            )
    ids = check_ids(ids if fits[0] == 0 else ids.T, n, found.path)
    scores = array[0] if array.ndim == 3 else np.full(ids.shape, np.nan)
    return ids, scores.astype(np.float32)


def _are_different(rows: np.ndarray) -> bool:
    ordered = np.sort(rows, axis=1)
    return not ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()


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


def load_rows(path: Path, name: str = "X") -> Tensor:
    """Loads vectors (N, D) in float16, float32 or float64, memory-mapped if it is a .npy or .pth file.

    Args:
        path: the file.
        name: which of several arrays: "X" for a database, "Q" for queries.

    Raises:
        InputError: if the file is damaged, or contains something else.
    """
    found = read_arrays_of(path)
    array = found.arrays.get(name, found.only)
    if array is None or array.ndim != 2 or array.dtype.kind != "f":
        raise InputError(f"{found}: a floating-point array (N, D), or one named {name}, is expected")
    if not array.size:
        raise InputError(f"{path} contains no descriptors: its shape is {array.shape}")
    return torch.from_numpy(array)


def unit_rows(rows: Tensor, what: str) -> Tensor:
    """Returns the rows if all have length 1 or 0, or else a normalised copy on disk.

    Raises:
        InputError: if a row has NaN or infinity.
    """
    off = zeros = 0
    starts = range(0, len(rows), _ROWS)
    for start in tqdm(starts, desc=f"lengths of {Path(what).name}", unit=f"{_ROWS} rows", leave=False, disable=None):
        lengths = rows[start : start + _ROWS].float().norm(dim=1)
        if len(bad := (~lengths.isfinite()).nonzero()):
            raise InputError(f"{what}: row {start + int(bad[0])} (from 0) has NaN or infinity")
        zeros += int((lengths == 0).sum())
        off += int(((lengths > 0) & ((lengths - 1).abs() > _UNIT_TOLERANCE)).sum())
    if zeros:
        log.warning("%s: %d rows are zero; their similarity to everything is 0", what, zeros)
    if not off:
        return rows
    log.warning("%s: %d of %d rows are not of unit length; they are normalised", what, off, len(rows))
    unit = scratch_rows(*rows.shape)
    for start in starts:
        block = rows[start : start + _ROWS].float()
        unit[start : start + _ROWS] = block / block.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return unit


def check_distractors(path: Path, provenance: Provenance) -> None:
    """Compares the provenance of the distractors with that of the database; warns if a file has none.

    Raises:
        InputError: if they differ; the message names the differences.
    """
    settings, images = sidecars(path)
    differing = provenance.differences(settings, images if images.exists() else None)
    if differing is None:
        log.warning("%s has no provenance file %s; it is not compared with this run", path, settings.name)
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


def _rows(array: np.ndarray, count: int, what: str, dataset: str) -> Tensor:
    """Returns one unit descriptor per image, as a row; the file may have them as columns."""
    if array.ndim != 2 or array.dtype.kind != "f" or count not in array.shape:
        raise InputError(f"{what}: {dataset} has {count} images, but the file an array {array.dtype} {array.shape}")
    array = array if len(array) == count else array.T
    rows = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if array.shape == (count, count) and ((rows.norm(dim=1) - 1).abs() > _UNIT_TOLERANCE).float().mean() > 0.5:
        raise InputError(f"{what}: as many dimensions as images: each must be a row of unit length, a column in MATLAB")
    if len(bad := (~rows.any(dim=1)).nonzero()):
        raise InputError(f"{what}: row {int(bad[0])} (from 0), the descriptor of an image, is zero")
    return unit_rows(rows, what)
