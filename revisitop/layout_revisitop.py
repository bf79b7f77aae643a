"""revisitop's layout: jpg/, and gnd_NAME.pkl with easy, hard and junk images, or ok and junk as in older datasets."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from extraction.files import read_pickle
from extraction.images import ImageFile, ImageList, NameList, image_suffixes
from model.errors import InputError
from revisitop.dataset import Dataset, GroundTruth, Layout
from revisitop.protocols import OK_PROTOCOLS, REVISITED_PROTOCOLS

_REVISITED, _OK = ("easy", "hard", "junk"), ("ok", "junk")


def read_ground_truth(name: str, path: Path) -> Dataset:
    """Reads the dataset of a ground-truth file; its images belong in the folder jpg/ beside the file.

    Queries have easy and hard, or ok, or, as in the original lists of Oxford and Paris, ok and good, which are as
    positive. junk and the boxes bbx may be missing, of all queries.

    Raises:
        InputError: if the file is unsafe, damaged or inconsistent.
    """
    content = read_pickle(path)
    parts = [content.get(key) for key in ("imlist", "qimlist", "gnd")] if isinstance(content, dict) else [None]
    if not all(isinstance(each, list) and each for each in parts):
        raise InputError(f"{path} is not a ground truth: a dict with lists imlist, qimlist and gnd, none of them empty")
    names, query_names, entries = parts
    for each in (*names, *query_names):
        if not isinstance(each, str) or not each or "\0" in each or len(each) > 1000:
            raise InputError(f"{path}: imlist and qimlist must contain names of images, but have {_shown(each)}")
        if each.startswith("/") or ".." in Path(each).parts:
            raise InputError(f"{path}: {_shown(each)} is outside the folder of the images")
    if len(query_names) != len(entries) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{path}: gnd must have a dict for each of the {len(query_names)} queries")
    keys = set().union(*entries)
    kinds = _OK if keys & {"ok", "good"} else _REVISITED
    if kinds == _OK and keys & {"easy", "hard"}:
        found = ", ".join(sorted(keys & {"easy", "hard", "ok", "good"}))
        raise InputError(
            f"{path} has {found}: a ground truth has either easy and hard, or ok (and good, which counts so)"
        )
    empty: dict[str, Any] = dict.fromkeys({"junk", *(["ok"] if "good" in keys else [])} - keys, ())
    jpg, queries, truth, suffixes = path.parent / "jpg", [], [], image_suffixes()
    for query, entry in zip(query_names, entries, strict=True):
        lists = {kind: _numbers({**empty, **entry}, kind, path, query) for kind in kinds}
        if "good" in keys:
            lists["ok"] = np.concatenate([lists["ok"], _numbers(entry, "good", path, query)])
        box = None
        if "bbx" in (entry if kinds == _OK else keys):
            box = tuple(_numbers(entry, "bbx", path, query).tolist())
            if len(box) != 4 or not np.isfinite(box).all():
                raise InputError(f"{path}: query {query} has no box bbx of four numbers x0, y0, x1, y1")
        queries.append(ImageFile(_image(jpg, query, suffixes), box))
        truth.append(_ground_truth(lists, len(names), path, query))
    database = [ImageFile(_image(jpg, image, suffixes)) for image in names]
    if len(repeated := set(database)) < len(database):
        raise InputError(f"{path}: imlist has {len(database) - len(repeated)} images twice")
    return Dataset(
        name,
        path.parent,
        queries,
        database,
        truth,
        OK_PROTOCOLS if kinds == _OK else REVISITED_PROTOCOLS,
        f"revisitop, {path.name} with {', '.join(sorted(keys & {*kinds, 'good', 'bbx'}))}",
    )


REVISITOP = Layout(
    "jpg/ and gnd_NAME.pkl, NAME as that of the folder",
    lambda folder: _ground_truth_file(folder).is_file(),
    lambda name, folder: read_ground_truth(name, _ground_truth_file(folder)),
)


def _ground_truth_file(folder: Path) -> Path:
    return folder / f"gnd_{folder.name}.pkl"


def load_distractor_list(folder: Path) -> tuple[str, ImageList]:
    """Returns the SHA-256 of revisitop1m.txt, and its images in the order of the list.

    NameList are relative to the folder, or to its jpg/. It is not checked that the images exist.

    Raises:
        InputError: if the list is missing or empty.
    """
    path = folder / "revisitop1m.txt"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; tools.download fetches revisitop1m, see docs/million.md") from None
    names = [line.strip() for line in content.splitlines() if line.strip()]
    if not names:
        raise InputError(f"{path} lists no image")
    if outside := [name for name in names if name.startswith(b"/") or b".." in name.split(b"/")]:
        raise InputError(f"{path}: {os.fsdecode(outside[0])!r} is outside the folder of the images")
    roots = (folder, folder / "jpg")
    root = next((root for name in names[:100] for root in roots if (root / os.fsdecode(name)).is_file()), roots[1])
    return hashlib.sha256(content).hexdigest(), ImageList(root, NameList(names))


def _image(jpg: Path, name: str, suffixes: set[str]) -> Path:
    """Returns the file of a name, which may have the suffix of an image format in either case; else it is .jpg."""
    return jpg / (name if os.path.splitext(name)[1].lower() in suffixes else f"{name}.jpg")


def _ground_truth(numbers: dict[str, np.ndarray], n: int, path: Path, query: str) -> GroundTruth:
    """Returns the ground truth of a query, whose lists may have numbers of any type."""
    lists = {}
    for kind, values in numbers.items():
        with np.errstate(invalid="ignore"):
            lists[kind] = values.astype(np.int64)
        if len(outside := values[(lists[kind] != values) | (values < 0) | (values >= n)]):
            raise InputError(
                f"{path}: query {query} lists image {outside[0]} as {kind}, but imlist has {n} (0 to {n - 1})"
            )
    together, counts = np.unique(np.concatenate([*lists.values()]), return_counts=True)
    if (counts > 1).any():
        raise InputError(f"{path}: query {query} lists image {together[counts > 1][0]} more than once")
    return GroundTruth(lists)


def _numbers(entry: dict[str, Any], key: str, path: Path, query: str) -> np.ndarray:
    """Returns a list of numbers in the ground truth of a query as an array (L,)."""
    try:
        numbers = np.asarray(entry[key]).reshape(-1)
    except (KeyError, ValueError):  # missing, or lists of different lengths
        numbers = np.array(None)
    if numbers.dtype.kind not in "fiu":
        raise InputError(f"{path}: query {query} has no list of numbers '{key}'")
    return numbers


def _shown(value: Any) -> str:
    """Returns a value of an untrusted file as short text, for an error message."""
    return repr(value)[:50] if isinstance(value, str | int | float) else f"a {type(value).__name__}"
