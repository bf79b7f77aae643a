"""Layouts in which folders are classes or objects: the positives of a query are the database images of its own.

    NAME/CLASS/*.jpg                                each image is a query against all others
    NAME/query/CLASS/*.jpg, NAME/gallery/CLASS/*.jpg
    NAME/OBJECT/query/*.jpg, NAME/OBJECT/pos/*.jpg  ILIAS' core; NAME_bbox.txt beside an image may have lines "x y w h"

Kordopatis-Zilos et al., "ILIAS: Instance-Level Image retrieval At Scale", CVPR 2025.
"""

import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from extraction.folder import LeftOut, entries_of, image_files, is_hidden
from extraction.identity import Box
from extraction.images import ImageFile
from model.errors import InputError
from revisitop.dataset import Dataset, GroundTruth, Layout
from revisitop.layout_csv import CSV
from revisitop.layout_places import PLACES
from revisitop.protocols import CLASS_PROTOCOLS, INSTANCE_PROTOCOLS, Protocol

Groups = dict[str, list[Path]]  # image files by the name of their class or object

# Names of folders that are parts of a dataset, or of another layout.
NO_CLASSES = ("train", "val", "test", "gallery", "query", "queries", "images", "index", "database", "jpg")
_QUERIES, _DATABASE = ("query", "queries"), ("database", "gallery", "index")


def read_classes(name: str, folder: Path) -> Dataset:
    """Returns the dataset of a folder of class folders; classes of a single image are distractors.

    Raises:
        InputError: if no class has two images, or as images_by_folder.
    """
    left_out: LeftOut = {}
    classes = images_by_folder(folder, left_out)
    queries = {each: images for each, images in classes.items() if len(images) > 1}
    if not queries:
        raise InputError(f"{folder}: no class has two images, so that no query has a positive image")
    layout = f"{len(classes)} class folders, each image a query against all others"
    return _dataset(name, folder, queries, classes, CLASS_PROTOCOLS, layout, left_out, in_database=True)


def read_gallery(name: str, folder: Path) -> Dataset:
    """Returns the dataset of two folders of class folders, of queries and of the database.

    Raises:
        InputError: if there are two folders of queries or of the database, no class is in both, or as images_by_folder.
    """
    left_out: LeftOut = {}
    roots = []
    for found in (_roots(folder, names) for names in (_QUERIES, _DATABASE)):
        if len(found) > 1:
            raise InputError(f"{folder} has {found[0].name}/ and {found[1].name}/; leave one of them")
        roots += found
    queries, database = (images_by_folder(root, left_out) for root in roots)
    if not {*queries} & {*database}:
        raise InputError(f"{roots[0]} and {roots[1]} have no class folder of the same name")
    layout = f"queries in {len(queries)} and database in {len(database)} class folders"
    return _dataset(name, folder, queries, database, CLASS_PROTOCOLS, layout, left_out, roots=roots)


def read_objects(name: str, folder: Path, crop_queries: bool = False) -> Dataset:
    """Returns the dataset of a folder per object, with its queries in query/ and its positive images in pos/.

    Args:
        crop_queries: whether queries are cropped to the smallest box that contains their boxes.

    Raises:
        InputError: if an object has no query or no positive image, a box is missing or invalid, or as images_by_folder.
    """
    left_out: LeftOut = {}
    objects = images_by_folder(folder, left_out)
    if others := [path for path in left_out.pop("not images", []) if not path.name.endswith("_bbox.txt")]:
        left_out["not images"] = others
    parts: dict[str, Groups] = {"query": {}, "pos": {}}
    for part, groups in parts.items():
        for each, images in objects.items():
            groups[each] = [path for path in images if path.relative_to(folder).parts[1] == part]
            if not groups[each]:
                raise InputError(f"{folder / each / part} contains no image: each object needs query/ and pos/")
    queries, database = parts.values()
    boxes = [_box(path) for path in chain(*queries.values())] if crop_queries else None
    layout = f"{len(objects)} objects with query/ and pos/, queries {'cropped' if crop_queries else 'not cropped'}"
    return _dataset(name, folder, queries, database, INSTANCE_PROTOCOLS, layout, left_out, boxes)


def images_by_folder(folder: Path, left_out: LeftOut) -> Groups:
    """Returns the images in each subfolder, by its name; other files are added to left_out, by reason.

    Raises:
        InputError: if a subfolder has no image, or an image is in two of them (as a link).
    """
    groups: Groups = {}
    for entry in entries_of(folder):
        if is_hidden(entry) or not entry.is_dir():
            left_out.setdefault("hidden" if is_hidden(entry) else "in no class folder", []).append(entry)
        else:
            groups[entry.name] = list(image_files(entry, left_out))
    if empty := [name for name, images in groups.items() if not images]:
        count = len(groups) - len(empty)
        raise InputError(f"{folder / empty[0]} contains no image, but {count} other folders do; delete the folder")
    seen: dict[str, tuple[str, Path]] = {}
    for name, path in ((name, path) for name, images in groups.items() for path in images):
        other_name, other = seen.setdefault(os.path.realpath(path), (name, path))
        if other_name != name:
            raise InputError(f"{path} is the same file as {other}: an image belongs to one class")
    return groups


def _dataset(
    name: str,
    folder: Path,
    queries: Groups,
    database: Groups,
    protocols: tuple[Protocol, ...],
    layout: str,
    left_out: LeftOut,
    boxes: Sequence[Box] | None = None,
    in_database: bool = False,
    roots: Sequence[Path] = (),
) -> Dataset:
    """Returns the dataset of the images of queries and database; see Dataset.

    Args:
        in_database: whether the queries are all database images of their classes.
        roots: the folders of queries and database to which their names are relative; by default that of the dataset.
    """
    (kind,), numbers, first = protocols[0].positive, dict.fromkeys(queries, np.empty(0, np.int64)), 0
    for each, images in database.items():
        numbers[each] = np.arange(first, first + len(images))
        first += len(images)
    own = np.concatenate([numbers[each] for each in queries]) if in_database else None
    if own is None:
        truth = [GroundTruth({kind: numbers[each]}) for each, images in queries.items() for _ in images]
    else:
        classes = [numbers[each] for each in queries for _ in numbers[each]]
        truth = [
            GroundTruth({kind: others[others != number], "itself": np.array([number])})
            for others, number in zip(classes, own, strict=True)
        ]
    files = [list(chain(*groups.values())) for groups in (queries, database)]
    images = [[ImageFile(path) for path in paths] for paths in files]
    if boxes is not None:
        images[0] = [ImageFile(path, box) for path, box in zip(files[0], boxes, strict=True)]
    roots = roots or (folder, folder)
    names = [[path.relative_to(root).as_posix() for path in paths] for root, paths in zip(roots, files, strict=True)]
    return Dataset(name, folder, *images, truth, protocols, layout, *names, own, left_out)


def _box(image: Path) -> Box:
    """Returns the smallest box that contains the boxes of an image.

    Raises:
        InputError: if its file of boxes is missing, empty, or has other lines than four numbers x y w h.
    """
    path = image.with_name(f"{image.stem}_bbox.txt")
    try:
        lines = [line.replace(",", " ").split() for line in path.read_text(encoding="utf-8").splitlines()]
        boxes = np.array([[float(word) for word in line] for line in lines if line])
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; it has the boxes of {image.name}") from None
    except ValueError:
        boxes = np.empty(0)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all() or (boxes[:, 2:] <= 0).any():
        raise InputError(f"{path} must have lines of four numbers x y w h, with w and h above 0")
    x0, y0 = boxes[:, :2].min(axis=0).tolist()
    x1, y1 = (boxes[:, :2] + boxes[:, 2:]).max(axis=0).tolist()
    return x0, y0, x1, y1


def subfolders(folder: Path) -> list[Path]:
    """Returns the folders in a folder, by name, without hidden ones; empty if there is no such folder."""
    return [path for path in entries_of(folder) if path.is_dir() and not is_hidden(path)] if folder.is_dir() else []


def _has_classes(folder: Path) -> bool:
    """Returns whether a folder has two or more folders, and none with a name, or a query/, as in other layouts."""
    folders = subfolders(folder)
    others = (path for path in folders if path.name.lower() in NO_CLASSES or (path / "query").is_dir())
    return len(folders) > 1 and not any(others) and any(map(_has_image, folders))


def _has_gallery(folder: Path) -> bool:
    """Returns whether a folder has queries and a database in class folders, without lists or coordinates."""
    classes = [path for root in _roots(folder, _QUERIES) for path in subfolders(root)]
    others = (CSV.fits(folder), PLACES.fits(folder))
    return bool(_roots(folder, _DATABASE)) and any(map(_has_image, classes)) and not any(others)


def _has_image(folder: Path) -> bool:
    return next(image_files(folder, {}), None) is not None


def _roots(folder: Path, names: tuple[str, ...]) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_dir()]


CLASSES = Layout(
    "two or more folders with the names of classes (not train, query, images ...)", _has_classes, read_classes
)
GALLERIES = Layout(
    "query/ (or queries/) and gallery/ (or database/, index/), with class folders of the same names",
    _has_gallery,
    read_gallery,
)
OBJECTS = Layout(
    "a folder per object, with images in its query/ and in its pos/",
    lambda folder: any((path / "query").is_dir() and (path / "pos").is_dir() for path in subfolders(folder)),
    read_objects,
    ("crop_queries",),
)
