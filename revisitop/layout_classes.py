"""The layout with a folder per class: each image is a query against all others; single images are distractors."""

import os
from itertools import chain
from pathlib import Path

import numpy as np

from extraction.folder import LeftOut, entries_of, image_files, is_hidden
from extraction.images import ImageFile
from model.errors import InputError
from revisitop.dataset import Dataset, GroundTruth, Layout
from revisitop.protocols import CLASS_PROTOCOLS

# Names of folders that are parts of a dataset, or of another layout.
_NO_CLASSES = ("train", "val", "test", "gallery", "query", "queries", "images", "index", "database", "jpg")


def subfolders(folder: Path) -> list[Path]:
    """Returns the folders in a folder, by name, without hidden ones; empty if there is no such folder."""
    return [path for path in entries_of(folder) if path.is_dir() and not is_hidden(path)] if folder.is_dir() else []


def has_image(folder: Path) -> bool:
    return next(image_files(folder, {}), None) is not None


def has_classes(folder: Path) -> bool:
    """Returns whether a folder has two or more folders, and none with a name, or a query/, as in other layouts."""
    folders = subfolders(folder)
    others = (path for path in folders if path.name.lower() in _NO_CLASSES or (path / "query").is_dir())
    return len(folders) > 1 and not any(others)


def images_by_class(folder: Path, left_out: LeftOut) -> dict[str, list[Path]]:
    """Returns the images of each class folder, by its name; other files are added to left_out, by reason.

    Raises:
        InputError: if a class has no image, or an image is in two classes (as a link).
    """
    classes = {path.name: list(image_files(path, left_out)) for path in subfolders(folder)}
    for entry in entries_of(folder):
        if is_hidden(entry) or not entry.is_dir():
            left_out.setdefault("hidden" if is_hidden(entry) else "in no class folder", []).append(entry)
    if empty := [name for name, images in classes.items() if not images]:
        raise InputError(
            f"{folder / empty[0]} contains no image, but {len(classes) - len(empty)} other folders do; "
            "delete the folder"
        )
    seen: dict[str, tuple[str, Path]] = {}
    for name, images in classes.items():
        for path in images:
            other_class, other = seen.setdefault(os.path.realpath(path), (name, path))
            if other_class != name:
                raise InputError(f"{path} is the same file as {other}: an image belongs to one class")
    return classes


def counts(left_out: LeftOut) -> dict[str, int]:
    return {reason: len(paths) for reason, paths in left_out.items()}


def read_classes(name: str, folder: Path) -> Dataset:
    """Returns the dataset of a folder of class folders.

    Raises:
        InputError: if a class has no image, an image is in two classes (as a link), or no class has two images.
    """
    left_out: LeftOut = {}
    classes = images_by_class(folder, left_out)
    files, truth, in_database = list(chain.from_iterable(classes.values())), [], []
    first = 0
    for images in classes.values():
        numbers = np.arange(first, first + len(images))
        first += len(images)
        if len(numbers) > 1:
            in_database += numbers.tolist()
            truth += [
                GroundTruth({"same class": numbers[numbers != number], "itself": np.array([number])})
                for number in numbers
            ]
    if not in_database:
        raise InputError(f"{folder}: no class has two images, so that no query has a positive image")
    database = [ImageFile(path) for path in files]
    names = [path.relative_to(folder).as_posix() for path in files]
    return Dataset(
        name,
        folder,
        [database[number] for number in in_database],
        database,
        truth,
        CLASS_PROTOCOLS,
        f"{len(classes)} class folders, each image a query against all others",
        [names[number] for number in in_database],
        names,
        np.array(in_database, dtype=np.int64),
        counts(left_out),
    )


CLASSES = Layout(
    "class folders",
    {
        "images": has_image,
        "two or more folders with the names of classes (not train, query, images ...)": has_classes,
    },
    lambda folder: any(map(has_image, subfolders(folder))) and not CLASSES.missing(folder),
    read_classes,
)
