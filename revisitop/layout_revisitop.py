"""revisitop's layout: jpg/, and gnd_NAME.pkl with easy, hard and junk images, or ok and junk as in older datasets."""

import hashlib
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from extraction.images import ImageFile, ImageList
from model.errors import InputError
from revisitop.dataset import Dataset, GroundTruth
from revisitop.protocols import OK_PROTOCOLS, REVISITED_PROTOCOLS
from revisitop.safe_pickle import ArrayLike, load_pickle

_REVISITED, _OK = ("easy", "hard", "junk"), ("ok", "junk")


def read_ground_truth(name: str, path: Path) -> Dataset:
    """Reads the dataset of a ground-truth file; its images belong in the folder jpg/ beside the file.

    Raises:
        InputError: if the file is unsafe, damaged or inconsistent.
    """
    content = load_pickle(path)
    try:
        names, query_names, entries = (list(content[key]) for key in ("imlist", "qimlist", "gnd"))
    except (TypeError, KeyError, IndexError):
        raise InputError(f"{path} is not a ground truth: a dict with imlist, qimlist and gnd is expected") from None
    if len(query_names) != len(entries):
        raise InputError(f"{path}: {len(query_names)} queries but {len(entries)} entries of ground truth")
    if not names or not query_names:
        raise InputError(f"{path}: {len(query_names)} queries and {len(names)} database images; it must have both")
    jpg, names, query_names = path.parent / "jpg", _names(names, path, "imlist"), _names(query_names, path, "qimlist")
    kinds = _OK if all(_has(entry, "ok") and not _has(entry, "easy") for entry in entries) else _REVISITED
    boxes = [
        None if kinds == _OK and not _has(entry, "bbx") else _box(entry, path, query)
        for entry, query in zip(entries, query_names, strict=True)
    ]
    return Dataset(
        name,
        path.parent,
        [ImageFile(_image(jpg, query), box) for query, box in zip(query_names, boxes, strict=True)],
        [ImageFile(_image(jpg, name)) for name in names],
        [_ground_truth(entry, kinds, len(names), path, q) for entry, q in zip(entries, query_names, strict=True)],
        OK_PROTOCOLS if kinds == _OK else REVISITED_PROTOCOLS,
        f"revisitop, {path.name} with {', '.join(kinds)}",
    )


def load_distractor_list(folder: Path) -> tuple[str, ImageList]:
    """Returns the SHA-256 of revisitop1m.txt, and its images in the order of the list.

    Names are relative to the folder, or to its jpg/. It is not checked that the images exist.

    Raises:
        InputError: if the list is missing or empty.
    """
    path = folder / "revisitop1m.txt"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; python -m tools.download revisitop1m fetches it") from None
    names = [line.strip() for line in content.splitlines() if line.strip()]
    if not names:
        raise InputError(f"{path} lists no image")
    roots = (folder, folder / "jpg")
    root = next((root for name in names[:100] for root in roots if (root / os.fsdecode(name)).is_file()), roots[1])
    return hashlib.sha256(content).hexdigest(), ImageList(root, names)


def _names(values: Any, path: Path, key: str) -> list[str]:
    names = [value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value for value in values]
    wrong = [name for name in names if not isinstance(name, str) or not name or "\0" in name or len(name) > 1000]
    if wrong:
        raise InputError(f"{path}: {key} must contain names of images, but has {_shown(wrong[0])}")
    return [str(name) for name in names]


def _image(jpg: Path, name: str) -> Path:
    return jpg / (name if name.lower().endswith(".jpg") else f"{name}.jpg")


def _box(entry: Any, path: Path, query: str) -> tuple[float, float, float, float]:
    try:
        numbers = list(entry["bbx"])
        if len(numbers) == 4 and all(_is_number(number) for number in numbers):
            x0, y0, x1, y1 = (float(number) for number in numbers)
            if all(map(math.isfinite, (x0, y0, x1, y1))):
                return x0, y0, x1, y1
    except (TypeError, ValueError, KeyError, IndexError, OverflowError):
        pass
    raise InputError(f"{path}: query {query} has no box bbx of four numbers x0, y0, x1, y1")


def _has(entry: Any, key: str) -> bool:
    return isinstance(entry, dict) and key in entry


def _ground_truth(entry: Any, kinds: tuple[str, ...], n: int, path: Path, query: str) -> GroundTruth:
    lists = []
    for kind in kinds:
        try:
            values = list(np.asarray(entry[kind]).reshape(-1)) if _is_array(entry[kind]) else list(entry[kind])
            if not all(_is_number(value) and value == int(value) for value in values):
                raise ValueError
            numbers = np.array([int(value) for value in values], dtype=np.int64)
        except (TypeError, ValueError, KeyError, IndexError, OverflowError):
            raise InputError(f"{path}: query {query} has no list of image numbers '{kind}'") from None
        outside = numbers[(numbers < 0) | (numbers >= n)]
        if len(outside):
            raise InputError(
                f"{path}: query {query} lists image {outside[0]} as {kind}, but imlist has {n} (0 to {n - 1})"
            )
        lists.append(numbers)
    together, counts = np.unique(np.concatenate(lists), return_counts=True)
    if (counts > 1).any():
        raise InputError(f"{path}: query {query} lists image {together[counts > 1][0]} more than once")
    return GroundTruth(dict(zip(kinds, lists, strict=True)))


def _is_array(values: Any) -> bool:
    return isinstance(values, ArrayLike | np.ndarray)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool | np.bool_)


def _shown(value: Any) -> str:
    """Returns a value of an untrusted file as short text, for an error message."""
    return repr(value)[:50] if isinstance(value, str | int | float) else f"a {type(value).__name__}"
