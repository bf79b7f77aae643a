"""The layout of ILIAS' core: a folder per object, with its queries in query/ and its positive images in pos/.

Beside an image, NAME_bbox.txt may have the boxes of the object, lines "x y w h". Kordopatis-Zilos et al., "ILIAS:
Instance-Level Image retrieval At Scale", CVPR 2025.
"""

from pathlib import Path

import numpy as np

from extraction.folder import LeftOut, entries_of, image_files, is_hidden
from extraction.identity import Box
from extraction.images import ImageFile
from model.errors import InputError
from revisitop.dataset import Dataset, GroundTruth, Layout
from revisitop.layout_classes import counts, subfolders
from revisitop.protocols import INSTANCE_PROTOCOLS


def read_instances(name: str, folder: Path, crop_queries: bool = False) -> Dataset:
    """Returns the dataset; the positives of a query are the images in pos/ of its object.

    Args:
        crop_queries: whether queries are cropped to the smallest box that contains their boxes.

    Raises:
        InputError: if an object has no query or no positive image, or a box is missing or invalid.
    """
    left_out: LeftOut = {}
    queries, files, truth = [], [], []
    objects = subfolders(folder)
    for entry in entries_of(folder):
        if is_hidden(entry) or not entry.is_dir():
            left_out.setdefault("hidden" if is_hidden(entry) else "in no folder of an object", []).append(entry)
    for each in objects:
        found = []
        for part in (each / "query", each / "pos"):
            found.append(list(image_files(part, left_out)) if part.is_dir() else [])
            if not found[-1]:
                raise InputError(f"{part} contains no image: each object needs images in query/ and in pos/")
        positive = np.arange(len(files), len(files) + len(found[1]))
        queries += found[0]
        files += found[1]
        truth += [GroundTruth({"same object": positive})] * len(found[0])
    left_out["not images"] = [path for path in left_out.get("not images", []) if not path.name.endswith("_bbox.txt")]
    boxes = [_box(path) if crop_queries else None for path in queries]
    return Dataset(
        name,
        folder,
        [ImageFile(path, box) for path, box in zip(queries, boxes, strict=True)],
        [ImageFile(path) for path in files],
        truth,
        INSTANCE_PROTOCOLS,
        f"{len(objects)} objects with query/ and pos/, queries {'cropped' if crop_queries else 'not cropped'}",
        [path.relative_to(folder).as_posix() for path in queries],
        [path.relative_to(folder).as_posix() for path in files],
        left_out={reason: count for reason, count in counts(left_out).items() if count},
    )


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


INSTANCES = Layout(
    "objects, as in ILIAS",
    {
        "a folder for each object": lambda folder: bool(subfolders(folder)),
        "images in its query/": lambda folder: any((path / "query").is_dir() for path in subfolders(folder)),
        "images in its pos/": lambda folder: any((path / "pos").is_dir() for path in subfolders(folder)),
    },
    lambda folder: any((path / "query").is_dir() and (path / "pos").is_dir() for path in subfolders(folder)),
    read_instances,
    ("crop_queries",),
)
