"""The layout with a folder per class: each image is a query against all others; single images are distractors."""

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from extraction.images import ImageFile, image_suffixes
from model.errors import InputError
from revisitop.dataset import Dataset, GroundTruth, Layout
from revisitop.protocols import CLASS_PROTOCOLS

# Names of folders that are parts of a dataset, or of another layout.
_NO_CLASSES = ("train", "val", "test", "gallery", "query", "queries", "images", "index", "database", "jpg", "__macosx")


def class_folders(folder: Path) -> list[Path]:
    """Returns the class folders, sorted by name, without hidden ones; empty if the folder is not one of classes.

    That is, if none contains an image, if there is only one, or if one has a name that means something else.
    """
    folders = sorted(path for path in folder.glob("*/") if not path.name.startswith("."))
    if len(folders) < 2 or any(path.name.lower() in _NO_CLASSES for path in folders):
        return []
    return folders if any(next(_images(path), None) for path in folders) else []


def read_classes(name: str, folder: Path) -> Dataset:
    """Returns the dataset of a folder of class folders.

    Raises:
        InputError: if a class has no image, an image is in two classes (as a link), or no class has two images.
    """
    classes = {path.name: sorted(_images(path)) for path in class_folders(folder)}
    if empty := [name for name, images in classes.items() if not images]:
        raise InputError(
            f"{folder / empty[0]} contains no image, but {len(classes)} other folders do; delete the folder"
        )
    seen: dict[str, Path] = {}
    for images in classes.values():
        for path in images:
            other = seen.setdefault(os.path.realpath(path), path)
            if other.parent != path.parent and other.relative_to(folder).parts[0] != path.relative_to(folder).parts[0]:
                raise InputError(f"{path} is the same file as {other}: an image belongs to one class")
    files = [path for images in classes.values() for path in images]
    database = [ImageFile(path) for path in files]
    numbers: dict[str, list[int]] = defaultdict(list)
    for number, path in enumerate(files):
        numbers[path.relative_to(folder).parts[0]].append(number)
    in_database = [number for own in numbers.values() if len(own) > 1 for number in own]
    if not in_database:
        raise InputError(f"{folder}: no class has two images, so that no query has a positive image")
    truth = []
    for own in numbers.values():
        for number in own if len(own) > 1 else ():
            others = np.array([other for other in own if other != number], dtype=np.int64)
            truth.append(GroundTruth({"same class": others, "itself": np.array([number], dtype=np.int64)}))
    names = [path.relative_to(folder).as_posix() for path in files]
    return Dataset(
        name,
        folder,
        [database[number] for number in in_database],
        database,
        truth,
        CLASS_PROTOCOLS,
        f"{len(classes)} class folders",
        [names[number] for number in in_database],
        names,
        np.array(in_database, dtype=np.int64),
    )


CLASSES = Layout(
    f"a folder of images for each of two or more classes, none of them named {', '.join(_NO_CLASSES)}",
    lambda name, folder: bool(class_folders(folder)),
    read_classes,
)


def _images(folder: Path) -> Iterator[Path]:
    suffixes = image_suffixes()
    for path in folder.rglob("*"):
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file():
            yield path
