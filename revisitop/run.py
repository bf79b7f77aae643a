"""One dataset, from pictures to figures: describe, search, rerank, evaluate."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model.checkpoint import find_checkpoint
from model.errors import InputError
from model.extract import describe_all, file_stamps
from model.images import ImageFile
from model.store import DescriptorStore
from model.superglobal import SuperGlobal
from modules.reranking import SuperGlobalReranker
from modules.search import Database, NotFiniteError, search
from revisitop import toy
from revisitop.dataset import Dataset, GroundTruth, load_dataset
from revisitop.evaluate import KAPPAS, Result, evaluate_positions

if TYPE_CHECKING:
    from revisitop.cvnet import CVNetReranking

log = logging.getLogger(__name__)

SAVED_RANKS = 400
_DEFAULT_WEIGHTS = Path("weights")


@dataclass(frozen=True)
class Ranking:
    """What a search or a reranking found.

    Attributes:
        ids: (Q, R) int64, the first pictures of each query, best first.
        scores: (Q, R), what they were ordered by: the cosine; after reranking, its score in the first M places.
        figures: per protocol E, M, H.
        seconds: what it took, for all queries.
    """

    ids: Tensor
    scores: Tensor
    figures: dict[str, Result]
    seconds: float

    def in_words(self) -> list[str]:
        """The log's lines: mAP, then mP@k, in percent."""
        maps = ", ".join(f"{name}: {100 * result.map:.2f}" for name, result in self.figures.items())
        precisions = [
            f"{name}: " + " ".join(f"{100 * value:.2f}" for value in result.mp_at_k)
            for name, result in self.figures.items()
        ]
        return [f"mAP {maps}", f"mP@{','.join(map(str, KAPPAS))} {', '.join(precisions)}"]

    def as_dict(self) -> dict:
        """The same for results.json, with the AP of each query, in percent."""
        return {
            "seconds": self.seconds,
            **{
                name: {
                    "mAP": 100 * result.map,
                    **{f"mP@{k}": 100 * value for k, value in zip(KAPPAS, result.mp_at_k, strict=True)},
                    "AP": 100 * result.ap,
                }
                for name, result in self.figures.items()
            },
        }


def make_folder(folder: Path) -> None:
    """Raises InputError where it cannot be made, or not be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"TEST.OUT_DIR {folder} cannot be made ({error.strerror})") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"TEST.OUT_DIR {folder}: nothing can be written there")


def find_dataset(name: str, data_dir: Path) -> Dataset:
    """The dataset; toy is drawn where it is not there yet."""
    if name == "toy":
        toy.ensure_dataset(data_dir, lambda pictures: tqdm(pictures, desc="drawing toy", unit="img"))
    return load_dataset(name, data_dir)


def find_weights(dataset: Dataset, weights: Path, depth: int) -> Path:
    """The checkpoint; toy brings random weights of its own, unless other ones than the default were asked for."""
    if dataset.name == "toy" and weights == _DEFAULT_WEIGHTS:
        return toy.ensure_weights(dataset.folder, depth)
    return find_checkpoint(weights, depth)


@dataclass(frozen=True)
class PictureList:
    """Pictures to be described together, in their order.

    Attributes:
        path: the .npy file of their descriptors.
        title: for the progress bar and the errors.
        images: the pictures.
        folder: whose parts tell them apart; without it their names do.
    """

    path: Path
    title: str
    images: Sequence[ImageFile]
    folder: Path | None = None


def dataset_lists(dataset: Dataset, out_dir: Path) -> list[PictureList]:
    """Queries and database of a dataset."""
    return [
        PictureList(out_dir / f"{dataset.name}_query.npy", f"{dataset.name} queries", dataset.queries),
        PictureList(out_dir / f"{dataset.name}_db.npy", f"{dataset.name} database", dataset.database),
    ]


def describe_lists(
    lists: Sequence[PictureList],
    build: Callable[[], SuperGlobal],
    source: dict,
    dim: int,
    workers: int = 0,
    pin_memory: bool = False,
    batch_size: int = 0,
    resume: bool = True,
    on_error: str = "list",
) -> list[Tensor]:
    """The descriptors of each list, (N, D); their files keep them.

    Args:
        build: makes the network; called once, and only where a picture is to be described.
        source: what a descriptor depends on beside the pictures (checkpoint, settings); saved
            descriptors of the same source and pictures are used again, unless resume is False.
        dim: D.
        on_error: what a damaged picture does, see model.extract.describe_all.

    Raises:
        InputError: where pictures are damaged; what has been described is kept.
    """
    stores = [  # all are opened before one is touched
        DescriptorStore(
            each.path,
            len(each.images),
            dim,
            source,
            resume,
            hint="TEST.RESUME False starts over, another TEST.OUT_DIR keeps both",
            stamps=file_stamps(each.images, each.folder),
        )
        for each in lists
    ]
    model = None
    for each, store in zip(lists, stores, strict=True):
        if store.complete:
            log.info("%s: used again, made from the same pictures, checkpoint and settings", store.path)
            continue
        start, missing = time.perf_counter(), store.missing()
        if len(missing):
            model = model or build()
            describe_all(model, each.images, store, missing, each.title, workers, pin_memory, batch_size, on_error)
        store.finish()
        log.info("%s: %d pictures described in %.1f s", each.title, len(missing), time.perf_counter() - start)
    return [torch.from_numpy(np.load(store.path, mmap_mode="c")) for store in stores]


def retrieve(
    queries: Tensor,
    database: Database,
    ground_truth: Sequence[GroundTruth],
    reranker: "SuperGlobalReranker | CVNetReranking | None" = None,
    device: torch.device | str = "cpu",
) -> dict[str, Ranking]:
    """Searches, and reranks where a reranker is given: {"retrieval": ..., "reranking": ...}."""
    m = SAVED_RANKS if reranker is None else max(SAVED_RANKS, reranker.m)
    start = time.perf_counter()
    with tqdm(total=len(database), desc="search", unit="img", dynamic_ncols=True) as bar:
        listed = [torch.from_numpy(truth.listed) for truth in ground_truth]
        try:
            found = search(queries, database, m, listed, device=device, on_chunk=bar.update)
        except NotFiniteError as error:
            own = len(database.parts[0])
            where = f"database row {error.row}" if error.row < own else f"distractor {error.row - own}"
            raise InputError(
                f"the descriptor of {where} (from 0) or of query {error.query} has NaN; make it again"
            ) from None
    seconds = time.perf_counter() - start
    positions = [where.numpy() for where in found.positions]
    figures = evaluate_positions(positions, ground_truth)
    stages = {"retrieval": Ranking(found.ids[:, :SAVED_RANKS], found.scores[:, :SAVED_RANKS], figures, seconds)}
    if isinstance(reranker, SuperGlobalReranker):
        start = time.perf_counter()
        order, reranked = reranker.rerank(queries, found.ids, database.rows, device)
        ids, scores = found.ids.clone(), found.scores.clone()
        ids[:, : order.shape[1]] = found.ids.gather(1, order)
        scores[:, : order.shape[1]] = reranked
        seconds = time.perf_counter() - start
        moved = [move(where, new.numpy()) for where, new in zip(positions, order, strict=True)]
        figures = evaluate_positions(moved, ground_truth)
        stages["reranking"] = Ranking(ids[:, :SAVED_RANKS], scores[:, :SAVED_RANKS], figures, seconds)
    elif reranker is not None:
        stages |= reranker.stages(found, positions)
    return stages


def move(positions: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Positions after the first len(order) places were reordered; later ones stay.

    Args:
        positions: (L,) places in the old ranking.
        order: (M,) the old place of each new place.
    """
    new_place = np.empty_like(order)
    new_place[order] = np.arange(len(order))
    moved = np.array(positions)
    inside = moved < len(order)
    moved[inside] = new_place[moved[inside]]
    return moved
