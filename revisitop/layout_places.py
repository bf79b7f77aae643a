"""The layout of visual place recognition: database/ and queries/, with UTM coordinates in the names of the files.

A name begins with @EAST@NORTH@, in metres; images may be in subfolders. Berton et al., "Deep Visual Geo-localization
Benchmark", CVPR 2022.
"""

import re
from pathlib import Path

import numpy as np
from scipy.spatial import KDTree

from extraction.folder import LeftOut, image_files
from extraction.images import ImageList, NameList
from model.errors import InputError
from revisitop.dataset import Dataset, GroundTruth, Layout
from revisitop.protocols import PLACE_PROTOCOLS

RADIUS = 25.0
_COORDINATES = re.compile(r"@(-?\d+(?:\.\d*)?)@(-?\d+(?:\.\d*)?)@")


def place_folders(folder: Path) -> list[Path]:
    """Returns the folders with queries/ and database/: the folder itself, and images/test in it."""
    roots = (folder, folder / "images" / "test")
    return [root for root in roots if (root / "database").is_dir() and _has_coordinates(root / "queries")]


def read_places(name: str, folder: Path, radius: float = RADIUS) -> Dataset:
    """Returns the dataset; the positives of a query are the database images within a radius of its place.

    Args:
        radius: in metres, in the plane.

    Raises:
        InputError: if images are in two places, a name has no coordinates, or no query has a positive image.
    """
    root, *others = place_folders(folder)
    if others:
        raise InputError(f"{folder} has queries/ and database/ in itself and in {others[0]}; remove one of them")
    left_out: LeftOut = {}
    queries, database = (list(image_files(root / part, left_out)) for part in ("queries", "database"))
    if not database:
        raise InputError(f"{root / 'database'} contains no image")
    near = positives_within(radius, *(np.array([_coordinates(path) for path in each]) for each in (queries, database)))
    if not any(map(len, near)):
        raise InputError(f"{root}: no query has a database image within {radius:g} m")
    images = (
        ImageList(root / part, NameList(str(path.relative_to(root / part)) for path in each))
        for part, each in (("queries", queries), ("database", database))
    )
    truth = [GroundTruth({"near": numbers}) for numbers in near]
    layout = f"places with UTM coordinates, positive within {radius:g} m"
    return Dataset(name, folder, *images, truth, PLACE_PROTOCOLS, layout, left_out=left_out)


def positives_within(radius: float, queries: np.ndarray, database: np.ndarray) -> list[np.ndarray]:
    """Returns, for each query, the ascending numbers of the points within the radius. (Q, 2), (N, 2) -> Q x (P,)."""
    near = KDTree(database).query_ball_point(queries, radius, return_sorted=True)
    return [np.array(numbers, dtype=np.int64) for numbers in near]


def _coordinates(path: Path) -> tuple[float, float]:
    match = _COORDINATES.match(path.name)
    if match is None:
        raise InputError(f"{path}: the name must begin with UTM coordinates, @EAST@NORTH@, as those beside it do")
    return float(match[1]), float(match[2])


def _has_coordinates(folder: Path) -> bool:
    first = next(image_files(folder, {}), None) if folder.is_dir() else None
    return first is not None and _COORDINATES.match(first.name) is not None


PLACES = Layout(
    "queries/ and database/ (or both in images/test/), with files @EAST@NORTH@...jpg",
    lambda folder: bool(place_folders(folder)),
    read_places,
    ("radius",),
)
