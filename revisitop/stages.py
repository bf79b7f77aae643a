"""Stages after the search, which turn its ranking into a new one.

A reranker sorts the first results of each query; query expansion and database-side augmentation search again.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from extraction.files import scratch_rows
from extraction.processes import Processes
from model.errors import InputError
from modules.expansion import DBA_K, QueryExpansion, augmented_rows
from modules.reranking import Reranker
from modules.search import Database, NotFiniteError
from revisitop.retrieve import SAVED_RANKS, Ranking, rerank, retrieve


@dataclass(frozen=True)
class Searched:
    """A search: its result, and its input.

    Attributes:
        ranking: the ranking by cosine similarity.
        queries: (Q, D), unit descriptors.
        database: the rows to which the ids of the ranking refer.
        listed: per query, the row numbers (L,) int64 whose rank is wanted, or None.
        device: the device of the computation.
        excluded: (Q,), a row number per query that is not among its results, or None.
    """

    ranking: Ranking
    queries: Tensor
    database: Database
    listed: Sequence[Tensor] | None = None
    device: torch.device | str = "cpu"
    excluded: Tensor | None = None

    def again(self, queries: Tensor, database: Database) -> Ranking:
        """Returns the ranking of another search with the same number of results per query."""
        m = self.ranking.ids.shape[1]
        return retrieve(queries, database, m, self.listed, self.device, excluded=self.excluded)


class Stage(Protocol):
    """Computes a new ranking from that of a search.

    Attributes:
        needed: the number of results of the search that it uses.
        shortlist: what it reorders, in words.
    """

    @property
    def needed(self) -> int: ...

    @property
    def shortlist(self) -> str: ...

    def __call__(self, searched: Searched) -> Ranking:
        """Returns the new ranking, given a search with at least `needed` results, or all of them.

        Raises:
            InputError: if a descriptor has NaN.
        """
        ...


def search_for(
    stages: Iterable[Stage],
    queries: Tensor,
    database: Database,
    listed: Sequence[Tensor] | None = None,
    device: torch.device | str = "cpu",
    processes: Processes | None = None,
    everything: bool = False,
    excluded: Tensor | None = None,
    depth: int = 0,
) -> Searched:
    """Searches for the results that the stages and the saved rankings need, `depth`, or all, see revisitop.retrieve."""
    m = len(database) if everything else max([SAVED_RANKS, depth, *(each.needed for each in stages)])
    ranking = retrieve(queries, database, m, listed, device, processes, excluded)
    return Searched(ranking, queries, database, listed, device, excluded)


@dataclass(frozen=True)
class Reranked:
    """Sorts the first results by the scores of a reranker; the others keep their places."""

    reranker: Reranker

    @property
    def needed(self) -> int:
        return self.reranker.m

    @property
    def shortlist(self) -> str:
        return f"the first {self.reranker.m} results, including ignored images"

    def __call__(self, searched: Searched) -> Ranking:
        """Returns the new ranking, see :class:`Stage`."""
        return rerank(searched.ranking, self.reranker, searched.queries, searched.database, searched.device)


@dataclass(frozen=True)
class SearchedAgain:
    """Searches the whole database again with expanded queries (AQE, alpha-QE)."""

    reranker: QueryExpansion

    @property
    def needed(self) -> int:
        return self.reranker.n

    @property
    def shortlist(self) -> str:
        return f"the whole database, with queries expanded by the first {self.reranker.n} results"

    def __call__(self, searched: Searched) -> Ranking:
        """Returns the new ranking, see :class:`Stage`."""
        start = time.perf_counter()
        rows = searched.database.rows
        expanded = self.reranker.expand(searched.queries, searched.ranking.ids, rows, searched.device)
        return replace(searched.again(expanded, searched.database), seconds=time.perf_counter() - start)


@dataclass(frozen=True)
class Augmented:
    """Searches the whole database again, with each row replaced by the mean of its neighbourhood (DBA).

    The augmented rows are stored in a temporary file while they are used.

    Attributes:
        k: number of rows of which a new row is the mean.
        folder: the folder of the temporary file.
    """

    k: int = DBA_K
    folder: Path | None = field(default=None, repr=False)

    needed = 1

    @property
    def shortlist(self) -> str:
        return f"the whole database, each row the mean of its {self.k} nearest"

    def __call__(self, searched: Searched) -> Ranking:
        """Returns the new ranking, see :class:`Stage`; its `once` is the time of the augmentation."""
        start, database = time.perf_counter(), searched.database
        rows = scratch_rows(len(database), database.dim, self.folder)
        with tqdm(total=len(database), desc="augmentation", unit="img", dynamic_ncols=True) as bar:
            try:
                augmented_rows(database, self.k, out=rows, device=searched.device, on_rows=bar.update)
            except NotFiniteError as error:
                raise InputError(
                    f"the descriptor of database row {error.row} (from 0) has NaN; extract it again"
                ) from None
        once = time.perf_counter() - start
        return replace(searched.again(searched.queries, Database(rows)), once=once)
