"""A labelled dataset: its images, and the ground truth of its queries."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from extraction.folder import LeftOut
from extraction.images import ImageFile
from model.errors import InputError, short_list
from revisitop.protocols import REVISITED_PROTOCOLS, Protocol


@dataclass(frozen=True)
class GroundTruth:
    """The ground truth of one query.

    Attributes:
        kinds: int64 arrays of database numbers, by kind (easy, hard, junk; ok; relevant).
        usage: the part of the queries to which it belongs (Public, Private); "" if there are no parts.
    """

    kinds: Mapping[str, np.ndarray]
    usage: str = ""

    @property
    def listed(self) -> np.ndarray:
        """All images whose position the protocols need, kind after kind."""
        return np.concatenate([*self.kinds.values()])


@dataclass(frozen=True)
class Dataset:
    """A benchmark: its images, the ground truth of its queries, and its protocols.

    Attributes:
        name: the name of its folder.
        folder: the folder with the ground truth and the images.
        queries: the Q query images with their boxes.
        database: the N database images.
        ground_truth: the ground truth of each query; database images are numbered from 0.
        protocols: the protocols by which rankings are evaluated.
        layout: the layout from which it was read, in words.
        query_names, names: the names of queries and database images; by default their file names.
        in_database: the database number of each query, if the queries are database images themselves.
        left_out: the files in the folder that do not belong to the dataset, by reason.
    """

    name: str
    folder: Path
    queries: Sequence[ImageFile]
    database: Sequence[ImageFile]
    ground_truth: list[GroundTruth]
    protocols: tuple[Protocol, ...] = REVISITED_PROTOCOLS
    layout: str = "revisitop"
    query_names: Sequence[str] | None = None
    names: Sequence[str] | None = None
    in_database: np.ndarray | None = None
    left_out: LeftOut = field(default_factory=dict)

    def __repr__(self) -> str:
        left_out = "".join(f", {len(paths)} left out ({reason})" for reason, paths in self.left_out.items() if paths)
        without = len(self.queries) - len(self.positives)
        queries = f"{len(self.queries)} queries{f' ({without} without a positive image)' if without else ''}"
        return f"{self.name}: {queries}, {len(self.database)} database images in {self.folder}{left_out}"

    def query_name(self, number: int) -> str:
        return self.query_names[number] if self.query_names is not None else self.queries[number].path.stem

    def database_name(self, number: int) -> str:
        return self.names[number] if self.names is not None else self.database[number].path.stem

    @property
    def listed(self) -> list[Tensor]:
        """Returns, per query, the database numbers (L,) whose rank the protocols need."""
        return [torch.from_numpy(truth.listed) for truth in self.ground_truth]

    @property
    def excluded(self) -> Tensor | None:
        """The database number of each query, (Q,), which is not a result of its own; None if no query is in there."""
        return None if self.in_database is None else torch.from_numpy(self.in_database)

    @property
    def depth(self) -> int:
        """The number of results per query that the measures need from an index; 0 if they count all alike."""
        return max(each.measure.depth for each in self.protocols)

    @cached_property
    def positives(self) -> list[int]:
        """The number of positive images in any protocol of each query that has one."""
        kinds = {kind for each in self.protocols for kind in each.positive}
        counts = [sum(len(truth.kinds[kind]) for kind in kinds) for truth in self.ground_truth]
        return [count for count in counts if count]

    def images(self) -> Iterator[ImageFile]:
        """Iterates over the queries, then the database."""
        return chain(self.queries, self.database)

    def check_files(self) -> None:
        """Raises InputError if images are missing; the message names the first few and their number."""
        missing, count = self.missing_files()
        if missing:
            raise InputError(
                f"{self.name}: {len(missing)} of {count} images are missing "
                f"({short_list(missing)}); the images belong in {missing[0].parent}"
            )

    def missing_files(self) -> tuple[list[Path], int]:
        """Returns the missing files, and the number of images that should exist."""
        queries = self.queries if self.in_database is None else ()
        paths = (str(image.path) for image in chain(queries, self.database))  # text, because there may be a million
        missing = dict.fromkeys(path for path in paths if not os.path.isfile(path))
        return [*map(Path, missing)], len(queries) + len(self.database)


class Layout(NamedTuple):
    """A way in which a dataset lies in its folder.

    Attributes:
        files: what the folder of a dataset NAME contains, in words.
        fits: returns whether a folder has this layout, complete or not.
        read: returns the dataset, from its name and its folder, and the settings by their names.
        settings: the names of the settings that it has.
    """

    files: str
    fits: Callable[[Path], bool]
    read: Callable[..., Dataset]
    settings: tuple[str, ...] = ()
