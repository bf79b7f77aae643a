"""From descriptors to rankings: search, then rerank. No ground truth is needed here.

Shapes: Q queries, N database rows, D dimensions, R results that are kept, M candidates that a reranker
sorts, L listed rows of a query (those whose rank a metric asks for).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from model.distributed import Processes
from model.errors import InputError
from modules.reranking import Reranker
from modules.search import Database, NotFiniteError, merged, search
from revisitop.index import IndexedDatabase

SAVED_RANKS = 400


class Candidates(NamedTuple):
    """What a reranker scored beyond the m places that it sorts, as the search had found it.

    A benchmark that drops some images from a ranking sorts the first m of the others anew.
    """

    ids: Tensor  # (Q, M) int64, in the order of the search
    scores: Tensor  # (Q, M), the reranker's
    positions: list[Tensor]  # per query (L,) int64, as the search had them
    m: int


@dataclass(frozen=True)
class Ranking:
    """The first results of each query, and where the listed rows stand.

    Attributes:
        ids: (Q, R) int64, the first results of each query, best first.
        scores: (Q, R), what they are ordered by: the cosine; after reranking, its score in the first places.
        positions: per query (L,) int64, the 0-based rank of each listed row among all N.
        seconds: what it took, for all queries.
        once: what preparing the database for it took, which further queries would not need.
        candidates: None, or what a reranker scored beyond the places that it sorted.
    """

    ids: Tensor
    scores: Tensor
    positions: list[Tensor]
    seconds: float
    candidates: Candidates | None = None
    once: float = 0.0


def retrieve(
    queries: Tensor,
    database: Database,
    m: int = SAVED_RANKS,
    listed: Sequence[Tensor] | None = None,
    device: torch.device | str = "cpu",
    processes: Processes | None = None,
) -> Ranking:
    """Returns the ranking by cosine similarity: exact, see modules.search.search, or what the database's index finds.

    The processes of a `torchrun` each search a part of the rows, and all get the whole ranking; it is the same to
    the bit as one process's.

    Args:
        queries: (Q, D), unit rows.
        database: the rows. Of an IndexedDatabase, a listed row that the index does not find among the first m
            has the position NOT_FOUND.
        m: results that are kept, R: at least what the rerankers to come look at.
        listed: per query the row numbers (L,) int64 whose rank is wanted; none by default.
        device: where the products are computed.
        processes: those that search together, with the same arguments; by default this one alone.

    Raises:
        InputError: if a descriptor has NaN; it is named.
    """
    start = time.perf_counter()
    if isinstance(database, IndexedDatabase):
        return Ranking(*database.search(queries, m, listed), time.perf_counter() - start)
    rank, count = (processes.rank, processes.count) if processes else (0, 1)
    part = tuple(len(database) * each // count for each in (rank, rank + 1))
    with tqdm(total=part[1] - part[0], desc="search", unit="img", dynamic_ncols=True, disable=rank > 0) as bar:
        try:
            found = search(queries, database, m, listed, device=device, on_chunk=bar.update, rows=part)
        except NotFiniteError as error:
            own = len(database.parts[0])
            where = f"database row {error.row}" if error.row < own else f"distractor {error.row - own}"
            raise InputError(
                f"the descriptor of {where} (from 0) or of query {error.query} has NaN; make it again"
            ) from None
    if count > 1:
        found = merged(processes.gathered(found), min(m, len(database)))
    return Ranking(*found, time.perf_counter() - start)


def rerank(
    ranking: Ranking,
    reranker: Reranker,
    queries: Tensor,
    database: Database,
    device: torch.device | str = "cpu",
) -> Ranking:
    """Returns the ranking with its first reranker.m places in the order of the reranker's scores; equal scores stay.

    Args:
        ranking: what retrieve gave, with at least reranker.m + reranker.spare results, or all there are.
        queries: (Q, D), unit rows.
        database: the rows that the ranking's ids count.
        device: where the reranker works.
    """
    start = time.perf_counter()
    scored = reranker.scores(queries, ranking, database.rows, device)
    sorted_scores, order = scored[:, : reranker.m].sort(dim=1, descending=True, stable=True)
    ids, scores = ranking.ids.clone(), ranking.scores.clone()
    ids[:, : order.shape[1]] = ranking.ids.gather(1, order)
    scores[:, : order.shape[1]] = sorted_scores
    positions = [move(where, new) for where, new in zip(ranking.positions, order, strict=True)]
    candidates = None
    if reranker.spare:
        candidates = Candidates(ranking.ids[:, : scored.shape[1]], scored, ranking.positions, reranker.m)
    return Ranking(ids, scores, positions, time.perf_counter() - start, candidates)


def move(positions: Tensor, order: Tensor) -> Tensor:
    """Returns the positions after the first len(order) places were reordered; later ones stay.

    Args:
        positions: (L,) places in the old ranking.
        order: (M,) the old place of each new place.
    """
    if not len(order):
        return positions
    new_place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    inside = positions < len(order)
    return torch.where(inside, new_place[positions.clamp(max=len(order) - 1)], positions)
