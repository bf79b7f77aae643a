"""A labelled dataset: images, and the ground truth of its queries."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.errors import InputError, short_list
from model.images import ImageFile
from revisitop.protocols import REVISITED_PROTOCOLS, Protocol


@dataclass(frozen=True)
class GroundTruth:
    """Of one query.

    Attributes:
        kinds: database numbers by kind (easy, hard, junk; ok; relevant), each an int64 array.
        usage: to which part of the queries it belongs (Public, Private); "" where there are no parts.
    """

    kinds: Mapping[str, np.ndarray]
    usage: str = ""

    @property
    def listed(self) -> np.ndarray:
        """All that the protocols ask the position of, kind after kind."""
        return np.concatenate([*self.kinds.values()])


@dataclass(frozen=True)
class Dataset:
    """A benchmark: its images, the ground truth of its queries, and how rankings are judged.

    Attributes:
        name: of its folder.
        folder: holds the ground truth and the images.
        queries: the query images with their boxes, Q of them.
        database: the database images, N of them.
        ground_truth: per query; its numbers count the database from 0.
        protocols: the ways to judge rankings.
        layout: the layout that it was read from, in words.
        query_names, names: how queries and database images are called; by default their files' names.
        in_database: the database number of each query, where the queries are database images themselves.
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

    def __repr__(self) -> str:
        return f"{self.name}: {len(self.queries)} queries, {len(self.database)} database images in {self.folder}"

    def query_name(self, number: int) -> str:
        return self.query_names[number] if self.query_names is not None else self.queries[number].path.stem

    def database_name(self, number: int) -> str:
        return self.names[number] if self.names is not None else self.database[number].path.stem

    @property
    def listed(self) -> list[Tensor]:
        """Per query the database numbers (L,) whose rank the protocols ask for."""
        return [torch.from_numpy(truth.listed) for truth in self.ground_truth]

    def images(self) -> Iterator[ImageFile]:
        """The queries, then the database."""
        return chain(self.queries, self.database)

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the names and boxes of queries and database, in their order."""
        digest, cut = hashlib.sha256(str(len(self.queries)).encode()), len(f"{self.folder}/")
        for image in self.images():
            digest.update(f"{str(image.path)[cut:]} {image.box}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def check_files(self) -> None:
        """Raises InputError where images are missing, with the names of the first and their number."""
        missing, count = self.missing_files()
        if missing:
            raise InputError(
                f"{self.name}: {len(missing)} of {count} images are missing "
                f"({short_list(missing)}); the images belong in {missing[0].parent}"
            )

    def missing_files(self) -> tuple[list[Path], int]:
        """The files that are not there, and how many there should be."""
        paths = dict.fromkeys(str(image.path) for image in self.images())  # text: a million of them may be here
        return [Path(path) for path in paths if not os.path.isfile(path)], len(paths)
