"""What follows a search: a stage makes a new ranking of the search's.

A reranker sorts each query's first results; query expansion and database-side augmentation search once more.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from model.errors import InputError
from model.store import scratch_rows
from modules.expansion import DBA_K, QueryExpansion, augmented_rows
from modules.reranking import Reranker
from modules.search import Database, NotFiniteError
from revisitop.retrieve import Ranking, rerank, retrieve


class Stage(Protocol):
    """Makes a new ranking of one that a search gave.

    Attributes:
        needed: results of the search that it looks at.
        shortlist: in words, what it orders anew.
    """

    @property
    def needed(self) -> int: ...

    @property
    def shortlist(self) -> str: ...

    def __call__(
        self,
        searched: Ranking,
        queries: Tensor,
        database: Database,
        listed: Sequence[Tensor] | None = None,
        device: torch.device | str = "cpu",
    ) -> Ranking:
        """Returns the new ranking.

        Args:
            searched: what retrieve gave, with at least `needed` results, or all there are.
            queries: (Q, D), unit rows.
            database: the rows that the ranking's ids count.
            listed: per query the row numbers (L,) int64 whose rank is wanted; those of `searched`.
            device: where the work is done.

        Raises:
            InputError: if a descriptor has NaN.
        """
        ...


@dataclass(frozen=True)
class Reranked:
    """The first results in the order of a reranker's scores; the others stay."""

    reranker: Reranker

    @property
    def needed(self) -> int:
        return self.reranker.m + self.reranker.spare

    @property
    def shortlist(self) -> str:
        if self.reranker.spare:
            return f"the first {self.reranker.m} results that the protocol does not ignore"
        return f"the first {self.reranker.m} results, ignored images among them"

    def __call__(
        self,
        searched: Ranking,
        queries: Tensor,
        database: Database,
        listed: Sequence[Tensor] | None = None,
        device: torch.device | str = "cpu",
    ) -> Ranking:
        """Returns the new ranking, see :class:`Stage`."""
        return rerank(searched, self.reranker, queries, database, device)


@dataclass(frozen=True)
class SearchedAgain:
    """The whole database, searched once more with expanded queries (AQE, alpha-QE)."""

    expansion: QueryExpansion

    @property
    def needed(self) -> int:
        return self.expansion.n

    @property
    def shortlist(self) -> str:
        return f"the whole database, with queries expanded by the first {self.expansion.n} results"

    def __call__(
        self,
        searched: Ranking,
        queries: Tensor,
        database: Database,
        listed: Sequence[Tensor] | None = None,
        device: torch.device | str = "cpu",
    ) -> Ranking:
        """Returns the new ranking, see :class:`Stage`."""
        start = time.perf_counter()
        expanded = self.expansion.expand(queries, searched.ids, database.rows, device)
        found = retrieve(expanded, database, searched.ids.shape[1], listed, device)
        return replace(found, seconds=time.perf_counter() - start)


@dataclass(frozen=True)
class Augmented:
    """The whole database, each row replaced by the mean of its neighbourhood, searched once more (DBA).

    The augmented rows stand in a temporary file while they are used.

    Attributes:
        k: rows that make up a new row.
        folder: where the temporary file is.
    """

    k: int = DBA_K
    folder: Path | None = None

    needed = 1

    @property
    def shortlist(self) -> str:
        return f"the whole database, each row the mean of its {self.k} nearest"

    def __call__(
        self,
        searched: Ranking,
        queries: Tensor,
        database: Database,
        listed: Sequence[Tensor] | None = None,
        device: torch.device | str = "cpu",
    ) -> Ranking:
        """Returns the new ranking, see :class:`Stage`; its `once` is the time of the augmentation."""
        start = time.perf_counter()
        rows = scratch_rows(len(database), database.dim, self.folder)
        with tqdm(total=len(database), desc="augmentation", unit="img", dynamic_ncols=True) as bar:
            try:
                augmented_rows(database, self.k, out=rows, device=device, on_rows=bar.update)
            except NotFiniteError as error:
                raise InputError(
                    f"the descriptor of database row {error.row} (from 0) has NaN; make it again"
                ) from None
        once = time.perf_counter() - start
        found = retrieve(queries, Database(rows), searched.ids.shape[1], listed, device)
        return replace(found, once=once)
