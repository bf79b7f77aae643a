"""Write rankings and descriptors as other programs read them; revisitop.descriptors reads all of these files, too.

nn_TITLE.pkl                    AMES and ELViS: a pickled tensor (2, Q, R), similarities and row numbers
ranks_TITLE.npy                 revisitop's own tools: row numbers (N, Q), best first
predictions_TITLE.csv           the Google Landmarks challenge: `id,images`
ames_NAME/                      AMES and ELViS: HDF5 files with `features` (N, D), and the lists of their images
global-feats-NAME.h5            hloc: HDF5, a group with `global_descriptor` (D,) per image
"""

import importlib.util
import pickle
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from extraction.files import write_array, write_atomically
from extraction.images import ImageFile
from model.errors import InputError
from modules.search import Database
from revisitop.descriptors import LISTS
from revisitop.layout_csv import write_predictions
from revisitop.retrieve import Ranking

_OF_DESCRIPTORS = ("ames", "hloc")


class Names(NamedTuple):
    """The names of the queries and of the database images."""

    queries: Sequence[str]
    database: Sequence[str]

    @classmethod
    def of_files(cls, *sets: tuple[Sequence[ImageFile], Path]) -> "Names":
        """Returns the paths of the images of queries and database, each relative to its folder."""
        return cls(*([image.path.relative_to(folder).as_posix() for image in images] for images, folder in sets))


def check_forms(forms: Collection[str], with_descriptors: bool = True) -> None:
    """Raises InputError if h5py is missing for one of the forms, or there are no descriptors for it."""
    needed = [form for form in forms if form in _OF_DESCRIPTORS]
    if needed and not with_descriptors:
        raise InputError(f"{needed[0]} has descriptors, but there is only a ranking")
    if needed and importlib.util.find_spec("h5py") is None:
        raise InputError(f"{needed[0]} has HDF5 files, which need h5py: pip install h5py")


def write_rankings(
    folder: Path, forms: Collection[str], name: str, rankings: Mapping[str, Ranking], names: Names
) -> None:
    """Writes the ranking of each stage in these forms, with all results that are kept.

    Raises:
        InputError: if a name cannot be in a CSV file, or a file cannot be written.
    """
    for stage, ranking in rankings.items():
        title = f"{name}_{stage}".replace(" ", "_")
        if "nn" in forms:  # float32 has all whole numbers up to 2^24
            dtype = torch.float32 if ranking.ids.numel() == 0 or int(ranking.ids.max()) < 1 << 24 else torch.float64
            saved = torch.stack([ranking.scores.to(dtype), ranking.ids.to(dtype)])
            write_atomically(folder / f"nn_{title}.pkl", lambda file, saved=saved: pickle.dump(saved, file))
        if "ranks" in forms:
            write_array(folder / f"ranks_{title}.npy", np.ascontiguousarray(ranking.ids.numpy().T))
        if "csv" in forms:
            write_predictions(folder / f"predictions_{title}.csv", *names, ranking.ids.numpy())


def write_descriptors(
    folder: Path, forms: Collection[str], name: str, queries: Tensor, database: Database, names: Names
) -> None:
    """Writes the descriptors in these forms, without those of distractors.

    Args:
        queries, database: (Q, D) and the rows; those of the images are the first part of the database.
        names: the paths of the images.

    Raises:
        InputError: if two images of one name have different descriptors, or a file cannot be written.
    """
    sets = [(each.numpy(), listed) for each, listed in zip((queries, database.parts[0]), names, strict=True)]
    if "ames" in forms:
        place = folder / f"ames_{name}"
        place.mkdir(exist_ok=True)
        for (rows, listed), kind, file in zip(sets, ("query", "gallery"), LISTS, strict=True):
            _write_hdf5(place / f"superglobal_{kind}_global.hdf5", {"features": rows})
            write_atomically(place / file, lambda out, listed=listed: out.write("\n".join([*listed, ""]).encode()))
    if "hloc" in forms:
        content: dict[str, Any] = {}
        for rows, listed in sets:
            for row, image in zip(rows, listed, strict=True):
                key = f"{image}/global_descriptor"
                if not np.array_equal(content.setdefault(key, row), row):
                    raise InputError(f"hloc has one descriptor per image, but {image} has two (a box?); use ames")
        _write_hdf5(folder / f"global-feats-{name}.h5", content)


def _write_hdf5(path: Path, content: Mapping[str, np.ndarray]) -> None:
    import h5py  # optional, see check_forms

    def write(file: IO[bytes]) -> None:
        with h5py.File(file, "w") as out:
            for name, array in content.items():
                out[name] = array

    write_atomically(path, write)
