"""One dataset, from pictures to figures: describe, search, rerank, evaluate."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model.errors import InputError
from model.extract import describe_all, file_stamps, list_digest
from model.store import DescriptorStore
from model.superglobal import SuperGlobal
from modules.reranking import SuperGlobalReranker
from modules.search import Database, NotFiniteError, search
from revisitop.dataset import Dataset, GroundTruth
from revisitop.evaluate import KAPPAS, Result, evaluate_positions

log = logging.getLogger(__name__)

SAVED_RANKS = 400


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


def describe_dataset(
    dataset: Dataset,
    model: SuperGlobal,
    source: dict,
    out_dir: Path,
    workers: int = 0,
    pin_memory: bool = False,
    batch_size: int = 0,
    resume: bool = True,
) -> tuple[Tensor, Tensor]:
    """Query and database descriptors, (Q, D) and (N, D); out_dir keeps them as .npy files.

    Args:
        source: what a descriptor depends on beside the pictures (checkpoint, settings); saved
            descriptors of the same source and pictures are used again, unless resume is False.

    Raises:
        InputError: where pictures are damaged; what has been described is kept.
    """
    parts = {"query": dataset.queries, "db": dataset.database}
    stores = {  # all are opened before one is touched
        kind: DescriptorStore(
            out_dir / f"{dataset.name}_{kind}.npy",
            len(images),
            model.dim,
            {**source, "pictures": list_digest(images)},
            resume,
            hint="TEST.RESUME False starts over, another TEST.OUT_DIR keeps both",
            stamps=file_stamps(images),
        )
        for kind, images in parts.items()
    }
    for kind, store in stores.items():
        if store.complete:
            log.info("%s: used again, made from the same pictures, checkpoint and settings", store.path)
            continue
        start, missing = time.perf_counter(), store.missing()
        title = f"{dataset.name} {'queries' if kind == 'query' else 'database'}"
        describe_all(model, parts[kind], store, missing, title, workers, pin_memory, batch_size)
        store.finish()
        log.info("%s: %d pictures described in %.1f s", title, len(missing), time.perf_counter() - start)
    described = [torch.from_numpy(np.load(store.path, mmap_mode="c")) for store in stores.values()]
    return described[0], described[1]


def retrieve(
    queries: Tensor,
    database: Database,
    ground_truth: Sequence[GroundTruth],
    reranker: SuperGlobalReranker | None = None,
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
    if reranker is not None:
        start = time.perf_counter()
        order, reranked = reranker.rerank(queries, found.ids, database.rows, device)
        ids, scores = found.ids.clone(), found.scores.clone()
        ids[:, : order.shape[1]] = found.ids.gather(1, order)
        scores[:, : order.shape[1]] = reranked
        seconds = time.perf_counter() - start
        moved = [move(where, new.numpy()) for where, new in zip(positions, order, strict=True)]
        figures = evaluate_positions(moved, ground_truth)
        stages["reranking"] = Ranking(ids[:, :SAVED_RANKS], scores[:, :SAVED_RANKS], figures, seconds)
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
