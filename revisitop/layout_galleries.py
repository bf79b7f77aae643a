"""The layout with query and database folders, each with class folders of the same names."""

from itertools import chain
from pathlib import Path

import numpy as np

from extraction.folder import LeftOut
from extraction.images import ImageFile
from model.errors import InputError
from revisitop.dataset import Dataset, GroundTruth, Layout
from revisitop.layout_classes import counts, has_image, images_by_class, subfolders
from revisitop.layout_csv import CSV
from revisitop.layout_places import PLACES
from revisitop.protocols import CLASS_PROTOCOLS

_QUERIES, _DATABASE = ("query", "queries"), ("database", "gallery", "index")


def is_gallery(folder: Path) -> bool:
    """Returns whether a folder has queries and a database in class folders, without lists or coordinates."""
    return not GALLERIES.missing(folder) and not any(each.fits(folder) for each in (CSV, PLACES))


def read_gallery(name: str, folder: Path) -> Dataset:
    """Returns the dataset; the positives of a query are the database images of its class.

    Raises:
        InputError: if there are two folders of queries or of the database, an image is in no class or in two, or no
            query has a positive image.
    """
    roots, left_out = [_only(folder, names) for names in (_QUERIES, _DATABASE)], LeftOut()
    queries, database = (images_by_class(root, left_out) for root in roots)
    numbers, first = {}, 0
    for each, images in database.items():
        numbers[each] = np.arange(first, first + len(images))
        first += len(images)
    if not {*queries} & {*database}:
        raise InputError(f"{roots[0]} and {roots[1]} have no class folder of the same name")
    none = np.empty(0, dtype=np.int64)
    truth = [GroundTruth({"same class": numbers.get(each, none)}) for each, images in queries.items() for _ in images]
    files = [list(chain.from_iterable(classes.values())) for classes in (queries, database)]
    images = ([ImageFile(path) for path in paths] for paths in files)
    names = ([path.relative_to(root).as_posix() for path in paths] for root, paths in zip(roots, files, strict=True))
    layout = f"queries in {len(queries)} and database in {len(database)} class folders"
    return Dataset(name, folder, *images, truth, CLASS_PROTOCOLS, layout, *names, left_out=counts(left_out))


GALLERIES = Layout(
    "queries and gallery",
    {
        "query/ (or queries/)": lambda folder: bool(_roots(folder, _QUERIES)),
        "gallery/ (or database/, index/)": lambda folder: bool(_roots(folder, _DATABASE)),
        "class folders of the same names in both": lambda folder: any(
            has_image(path) for root in _roots(folder, _QUERIES) for path in subfolders(root)
        ),
    },
    is_gallery,
    read_gallery,
)


def _roots(folder: Path, names: tuple[str, ...]) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_dir()]


def _only(folder: Path, names: tuple[str, ...]) -> Path:
    roots = _roots(folder, names)
    if len(roots) > 1:
        raise InputError(f"{folder} has {roots[0].name}/ and {roots[1].name}/; leave one of them")
    return roots[0]
