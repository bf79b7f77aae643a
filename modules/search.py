"""Exact cosine search over descriptors that need not fit in memory.

Shapes: Q queries, N database rows, D dimensions, M results per query, L listed rows of a query.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_INDEX_BITS = 32
_INDEX_MASK = (1 << _INDEX_BITS) - 1
_CHUNK_BYTES = 64 << 20


class NotFiniteError(ValueError):
    """A score is NaN or infinite: `row` of the database or a query holds no descriptor."""

    def __init__(self, query: int, row: int):
        super().__init__(f"query {query} and database row {row} have a score that is not finite")
        self.query, self.row = query, row


class Database:
    """Rows of one or more (N_i, D) tensors, numbered as if they were stacked.

    A part may be memory-mapped (``torch.load(..., mmap=True)``, ``torch.from_numpy`` of a NumPy
    memory map): only the rows in use are read.

    Args:
        parts: a tensor, or tensors of equal D and of any floating dtype; rows of unit length.

    Raises:
        ValueError: where there is no part, or a part is no (N, D) floating tensor, or widths differ.
    """

    def __init__(self, parts: Tensor | Sequence[Tensor]):
        self.parts = [parts] if isinstance(parts, Tensor) else list(parts)
        shapes = [tuple(part.shape) for part in self.parts]
        if not shapes or any(len(shape) != 2 or shape[1] != shapes[0][-1] for shape in shapes):
            raise ValueError(f"a database is one or more (N, D) tensors of equal D, got shapes {shapes}")
        if not all(part.is_floating_point() for part in self.parts):
            raise ValueError(f"a database holds floating numbers, got {[part.dtype for part in self.parts]}")
        if sum(shape[0] for shape in shapes) > _INDEX_MASK:
            raise ValueError(f"a database has at most {_INDEX_MASK} rows, got shapes {shapes}")

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def dim(self) -> int:
        return self.parts[0].shape[1]

    def __repr__(self) -> str:
        return f"Database({' + '.join(str(len(part)) for part in self.parts)} rows of {self.dim})"

    def rows(self, ids: Tensor) -> Tensor:
        """The rows with these numbers, as float32 on the CPU. (...) int64 -> (..., D)."""
        flat = ids.flatten().cpu()
        out = torch.empty(len(flat), self.dim)
        start = 0
        for part in self.parts:
            here = ((flat >= start) & (flat < start + len(part))).nonzero().squeeze(1)
            out[here] = part[(flat[here] - start).to(part.device)].to("cpu", torch.float32)
            start += len(part)
        return out.view(*ids.shape, self.dim)

    def chunks(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """(number of the first row, rows), at most `size` rows at a time, never across parts."""
        start = 0
        for part in self.parts:
            for first in range(0, len(part), size):
                yield start + first, part[first : first + size]
            start += len(part)


class SearchResult(NamedTuple):
    ids: Tensor  # (Q, M) int64, best first
    scores: Tensor  # (Q, M) float32
    positions: list[Tensor]  # per query (L,) int64: 0-based rank of each listed row among all N


def search(
    queries: Tensor,
    database: Database | Tensor,
    m: int,
    listed: Sequence[Tensor] | None = None,
    chunk_size: int | None = None,
    device: torch.device | str = "cpu",
    on_chunk: Callable[[int], None] | None = None,
) -> SearchResult:
    """The M best rows per query, and the rank of the listed rows, in one pass over the database.

    Score = q . x. Higher first; equal scores keep the lower row number first. A score is the
    float32 nearest to the float64 dot product, so that rankings are the same on any device, for
    any chunk size, and equal rows tie wherever they stand. Nothing of size N x Q is kept or sorted.

    Args:
        queries: (Q, D), unit rows.
        database: N rows of D.
        m: results per query; all where the database is smaller.
        listed: per query the row numbers (L,) int64 whose rank is wanted; none by default.
        chunk_size: rows read at a time; by default what keeps the work arrays near 64 MB.
        device: where the products are computed.
        on_chunk: called with the number of rows after each chunk, for a progress bar.

    Raises:
        ValueError: on shapes that do not fit, m < 1, a listed number outside the database, or a
            score that is not finite (NotFiniteError; the row is named).

    >>> import torch
    >>> search(torch.eye(3)[:1], torch.eye(3), m=2).ids
    tensor([[0, 1]])
    """
    database = database if isinstance(database, Database) else Database(database)
    if queries.ndim != 2 or queries.shape[1] != database.dim:
        raise ValueError(f"queries must be (Q, {database.dim}) for {database}, got {tuple(queries.shape)}")
    if m < 1:
        raise ValueError(f"m must be at least 1, got {m}")
    listed = [torch.empty(0, dtype=torch.int64)] * len(queries) if listed is None else listed
    if len(listed) != len(queries):
        raise ValueError(f"{len(queries)} queries need {len(queries)} lists of rows, got {len(listed)}")
    if chunk_size is None:
        chunk_size = max(256, _CHUNK_BYTES // (8 * max(database.dim, len(queries), 1)))

    queries = queries.to(device, torch.float64)
    ranks = _ListedRanks(queries, database, listed)
    best = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    for start, chunk in database.chunks(chunk_size):
        scores = _scores(queries, chunk.to(device), start)
        ranks.make_consistent(scores, start)
        keys = _order_keys(scores, start)
        ranks.count(keys)
        best = torch.cat([best, keys.topk(min(m, len(chunk)), sorted=False).values], dim=1)
        best = best.topk(min(m, best.shape[1]), sorted=True).values
        if on_chunk is not None:
            on_chunk(len(chunk))
    ids, scores = _from_order_keys(best)
    return SearchResult(ids.cpu(), scores.cpu(), ranks.positions())


class _ListedRanks:
    """Counts, chunk by chunk, how many rows stand before each listed row of each query."""

    def __init__(self, queries: Tensor, database: Database, listed: Sequence[Tensor]):
        device, n = queries.device, len(database)
        self.lengths = [len(ids) for ids in listed]
        width = max(self.lengths, default=0)
        ids = torch.full((len(listed), width), -1, dtype=torch.int64, device=device)  # -1 pads
        scores = torch.zeros(len(listed), width, device=device)
        for query, (numbers, vector) in enumerate(zip(listed, queries, strict=True)):
            if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < n:
                raise ValueError(f"query {query}: a listed row lies outside the database of {n} rows")
            ids[query, : len(numbers)] = numbers.to(device)
            rows = database.rows(numbers).to(device)
            scores[query, : len(numbers)] = _scores(vector[None], rows, 0)[0]
        self.ids, self.scores = ids, scores
        keys = _order_keys(scores, ids).masked_fill(ids < 0, torch.iinfo(torch.int64).max)
        self.keys, self.order = keys.sort(dim=1)
        # before[q, i]: rows that stand before exactly the first i of the query's sorted listed rows
        self.before = torch.zeros(len(listed), width + 1, dtype=torch.int64, device=device)

    def make_consistent(self, scores: Tensor, start: int) -> None:
        """Give the listed rows of this chunk the very scores that the others are compared with."""
        query, column = ((self.ids >= start) & (self.ids < start + scores.shape[1])).nonzero(as_tuple=True)
        scores[query, self.ids[query, column] - start] = self.scores[query, column]

    def count(self, keys: Tensor) -> None:
        if self.keys.shape[1]:
            passed = torch.searchsorted(self.keys, keys)
            bins = passed + self.before.shape[1] * torch.arange(len(keys), device=keys.device)[:, None]
            self.before += torch.bincount(bins.flatten(), minlength=self.before.numel()).view_as(self.before)

    def positions(self) -> list[Tensor]:
        ahead = self.before[:, 1:].flip(1).cumsum(1).flip(1)
        positions = torch.empty_like(ahead).scatter_(1, self.order, ahead).cpu()
        return [row[:length] for row, length in zip(positions, self.lengths, strict=True)]


def _scores(queries: Tensor, rows: Tensor, start: int) -> Tensor:
    """(Q, D) float64, (C, D) -> (Q, C) float32, rounded once. Adding 0 turns -0 into 0."""
    scores = (queries @ rows.to(torch.float64).T).to(torch.float32).add_(0.0)
    if not torch.isfinite(scores).all():
        query, column = (~torch.isfinite(scores)).nonzero()[0].tolist()
        raise NotFiniteError(query, start + column)
    return scores


def _order_keys(scores: Tensor, first: int | Tensor) -> Tensor:
    """One int64 per score whose order is: higher score, then lower row number. All are distinct.

    The float32's bits, flipped for negative numbers, order as integers do; the row number, counted
    down, fills the lower half. `first` is the number of the first column, or all numbers.
    """
    bits = scores.view(torch.int32)
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    if not isinstance(first, Tensor):
        first = torch.arange(first, first + scores.shape[1], device=scores.device)
    return (bits << _INDEX_BITS) | (_INDEX_MASK - first)


def _from_order_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    bits = (keys >> _INDEX_BITS).to(torch.int32)
    scores = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)
    return _INDEX_MASK - (keys & _INDEX_MASK), scores
