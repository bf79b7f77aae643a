"""From descriptors to rankings: search, then rerank. No ground truth is needed here.

Shapes: Q queries, N database descriptors (rows), D dimensions, R results that are kept, M candidates that a
reranker sorts, L listed rows of a query (those whose rank a metric needs).
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from tqdm import tqdm

from extraction.processes import Processes
from model.errors import InputError
from modules.candidates import Reranker, places_after, reordered
from modules.search import GRID, Database, NotFiniteError, merged, search
from revisitop.index import IndexedDatabase
from revisitop.measures import NOT_FOUND

SAVED_RANKS = 400


@dataclass(frozen=True)
class Ranking:
    """The first results of each query, and the positions of the listed rows.

    Attributes:
        ids: (Q, R) int64, the first results of each query, best first.
        scores: (Q, R), the scores that order them: the cosine or, after reranking, see modules.candidates.Reranking.
        positions: per query (L,) int64, the 0-based rank of each listed row among all N.
        seconds: the time for all queries.
        once: the time to prepare the database, which is not needed again for further queries.
        by_protocol: the positions for the protocols for which they differ, by name.
    """

    ids: Tensor
    scores: Tensor
    positions: list[Tensor]
    seconds: float
    by_protocol: Mapping[str, list[Tensor]] = field(default_factory=dict)
    once: float = 0.0


def retrieve(
    queries: Tensor,
    database: Database,
    m: int = SAVED_RANKS,
    listed: Sequence[Tensor] | None = None,
    device: torch.device | str = "cpu",
    processes: Processes | None = None,
    excluded: Tensor | None = None,
) -> Ranking:
    """Returns the ranking by cosine similarity, by exact search (modules.search.search) or the index of the database.

    With `torchrun`, each process searches a range of rows on the grid of the search, and all get the whole ranking,
    which is identical to the bit to that of a single process.

    Args:
        queries: (Q, D), unit descriptors.
        database: the rows. With an IndexedDatabase, a listed row that the index does not find among the first m
            has the position NOT_FOUND.
        m: R, the number of results that are kept: at least as many as the following rerankers need.
        listed: per query, the row numbers (L,) int64 whose rank is wanted; none by default.
        device: where the products are computed.
        processes: the processes that search together, with the same arguments; by default only this one.
        excluded: (Q,), a row number per query that is not among its results, such as its own; None for none.

    Raises:
        InputError: if a descriptor has NaN; the message names it.
    """
    if excluded is not None:
        listed = [torch.empty(0, dtype=torch.int64)] * len(queries) if listed is None else listed
        listed = [torch.cat([numbers, row]) for numbers, row in zip(listed, excluded.split(1), strict=True)]
        return _without(retrieve(queries, database, m + 1, listed, device, processes), excluded)
    start = time.perf_counter()
    if isinstance(database, IndexedDatabase):
        return Ranking(*database.search(queries, m, listed), time.perf_counter() - start)
    rank, count = (processes.rank, processes.count) if processes else (0, 1)
    part = tuple(min(len(database), -(-len(database) * each // (count * GRID)) * GRID) for each in (rank, rank + 1))
    with tqdm(desc="search", total=part[1] - part[0], unit="img", dynamic_ncols=True, delay=1, disable=rank > 0) as bar:
        try:
            found = search(queries, database, m, listed, device=device, on_chunk=bar.update, rows=part)
        except NotFiniteError as error:
            own = len(database.parts[0])
            where = f"database row {error.row}" if error.row < own else f"distractor {error.row - own}"
            raise InputError(
                f"the descriptor of {where} (from 0) or of query {error.query} has NaN; extract it again"
            ) from None
    if count > 1:
        found = merged(processes.gathered(found), min(m, len(database)))
    return Ranking(*found, time.perf_counter() - start)


def _without(ranking: Ranking, excluded: Tensor) -> Ranking:
    """Returns the ranking without a row of each query, which is the last of its listed rows. excluded (Q,)."""
    dropped = ranking.ids == excluded[:, None]
    dropped[:, -1] |= ~dropped.any(dim=1)  # a row that is not among the results leaves room for one less
    shape = len(dropped), dropped.shape[1] - 1
    positions = []
    for where in ranking.positions:
        listed, place = where[:-1], where[-1]
        closer = listed - ((listed > place) & (listed < NOT_FOUND)).long()
        positions.append(closer.masked_fill(listed == place, NOT_FOUND))
    return replace(
        ranking, ids=ranking.ids[~dropped].view(shape), scores=ranking.scores[~dropped].view(shape), positions=positions
    )


def rerank(
    ranking: Ranking,
    reranker: Reranker,
    queries: Tensor,
    database: Database,
    device: torch.device | str = "cpu",
) -> Ranking:
    """Returns the ranking with its first reranker.m places sorted by the reranker's scores, equal scores as before.

    Args:
        ranking: the result of retrieve, with at least reranker.m results, or all of them.
        queries: (Q, D), unit descriptors.
        database: the rows to which the ids of the ranking refer.
        device: the device of the reranker.
    """
    start = time.perf_counter()
    new_scores = reranker.scores(queries, ranking, database.rows, device)
    found = reordered(ranking.ids, ranking.scores, new_scores)
    positions = [places_after(where, new) for where, new in zip(ranking.positions, found.order, strict=True)]
    return Ranking(found.ids, found.scores, positions, time.perf_counter() - start)
