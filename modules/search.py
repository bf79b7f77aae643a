"""Exact cosine search over descriptors that need not fit in memory.

Shapes: Q queries, N database rows, D dimensions, M results per query, L listed rows of a query.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_INDEX_BITS = 32
_INDEX_MASK = (1 << _INDEX_BITS) - 1
_PRODUCT_BYTES = 8 << 20
_BLOCK = 2048  # pairs or rows whose float64 products are made at a time


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

    Score = q . x. Higher first; equal scores keep the lower row number first. A score is the float32
    nearest to the float64 dot product, so that rankings are the same on any device, for any chunk
    size, and equal rows tie wherever they stand. Only scores that decide something are computed
    that way: those so near to the M-th best, or to a listed row, that float32 products could err.
    Nothing of size N x Q is kept or sorted.

    Args:
        queries: (Q, D), unit rows.
        database: N rows of D.
        m: results per query; all where the database is smaller.
        listed: per query the row numbers (L,) int64 whose rank is wanted; none by default.
        chunk_size: rows read at a time; by default what keeps the products near 8 MB.
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
        chunk_size = max(1024, min(16384, _PRODUCT_BYTES // (4 * max(len(queries), 1))))

    queries = queries.to(device, torch.float64)
    ranks = _ListedRanks(queries, database, listed)
    best = torch.empty(len(queries), 0, dtype=torch.int64, device=device)  # order keys, descending
    for start, chunk in database.chunks(chunk_size):
        chunk = chunk.to(device)
        scores, error = _products(queries, chunk, start)
        # Only scores above both the M-th best and the lowest listed one can change a result.
        bar = _from_order_keys(best[:, -1])[1] if best.shape[1] == m else torch.full_like(ranks.lowest, -torch.inf)
        query, column = (scores >= (torch.minimum(bar, ranks.lowest) - error)[:, None]).nonzero(as_tuple=True)
        values = scores[query, column]
        above, near = ranks.place(query, values, error)
        challenging = values >= (bar - error)[query]
        _make_exact(scores, queries, chunk, column[near | challenging].unique())
        values, ids = scores[query, column], column + start
        ranks.count(query, values, ids, above, near)
        best = _merge(best, query[challenging], _order_keys(values[challenging], ids[challenging]), m)
        if on_chunk is not None:
            on_chunk(len(chunk))
    ids, values = _from_order_keys(best)
    return SearchResult(ids.cpu(), values.cpu(), ranks.positions())


def _products(queries: Tensor, chunk: Tensor, start: int) -> tuple[Tensor, float]:
    """The scores of a chunk, (Q, C) float32, and by how much each may err."""
    # Reduced precision (TF32, say), where somebody chose it, has no useful bound.
    fast = torch.get_float32_matmul_precision() == "highest" and chunk.dtype != torch.float64
    work = torch.float32 if fast else torch.float64
    scores = (queries.to(work) @ chunk.to(work).T).to(torch.float32)
    if not torch.isfinite(scores.sum()):
        bad = (~torch.isfinite(scores)).nonzero()
        if len(bad):
            raise NotFiniteError(int(bad[0, 0]), start + int(bad[0, 1]))
    # The roundings of a sum of D products of unit vectors add up like a random walk of half ulps.
    return scores, chunk.shape[1] ** 0.5 * 2.0**-24


def _make_exact(scores: Tensor, queries: Tensor, chunk: Tensor, columns: Tensor) -> None:
    """Replaces the scores of some columns by the float32 nearest to the float64 product."""
    for part in columns.split(_BLOCK):
        scores[:, part] = _rounded(queries @ chunk[part].to(torch.float64).T)


class _ListedRanks:
    """Counts, chunk by chunk, how many rows stand before each listed row of each query."""

    def __init__(self, queries: Tensor, database: Database, listed: Sequence[Tensor]):
        device, n = queries.device, len(database)
        self.lengths = [len(ids) for ids in listed]
        width = max(self.lengths, default=0)
        keys = torch.full((len(listed), width + 1), torch.iinfo(torch.int64).max, device=device)  # the last one pads
        for query, (numbers, vector) in enumerate(zip(listed, queries, strict=True)):
            if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < n:
                raise ValueError(f"query {query}: a listed row lies outside the database of {n} rows")
            rows = database.rows(numbers).to(device, torch.float64)
            if len(numbers):
                keys[query, : len(numbers)] = _order_keys(_rounded((rows * vector).sum(dim=1)), numbers.to(device))
        self.keys, self.order = keys.sort(dim=1)  # (Q, L+1)
        self.scores = _from_order_keys(self.keys)[1].masked_fill(
            torch.arange(width + 1, device=device) >= torch.tensor(self.lengths, device=device)[:, None], torch.inf
        )
        self.lowest = self.scores[:, 0]
        # As one ascending list for all queries, searched in one call.
        offset = torch.arange(len(listed), device=device)[:, None]
        self.flat = _flat_keys(offset, self.scores).flatten()
        # passed[q, i]: rows that stand before exactly the first i of the query's sorted listed rows
        self.passed = torch.zeros_like(self.keys)

    def place(self, query: Tensor, values: Tensor, error: float) -> tuple[Tensor, Tensor]:
        """How many of the query's listed rows score lower, and whether that is in doubt for the error."""
        scores = self.scores.flatten()
        above = torch.searchsorted(self.flat, _flat_keys(query, values)).clamp_(max=len(scores) - 1)
        below = (above - 1).clamp_(min=0)
        near = ((scores[above] - values).abs() <= error) | ((scores[below] - values).abs() <= error)
        return above - query * self.keys.shape[1], near

    def count(self, query: Tensor, values: Tensor, ids: Tensor, above: Tensor, near: Tensor) -> None:
        """Counts these rows; the near ones have exact scores by now, and are placed again."""
        for part in near.nonzero().squeeze(1).split(_BLOCK):
            keys = _order_keys(values[part], ids[part])
            above[part] = torch.searchsorted(self.keys[query[part]], keys[:, None]).squeeze(1)
        bins = query * self.passed.shape[1] + above
        self.passed += torch.bincount(bins, minlength=self.passed.numel()).view_as(self.passed)

    def positions(self) -> list[Tensor]:
        ahead = self.passed.flip(1).cumsum(1).flip(1)[:, 1:]
        ahead = torch.nn.functional.pad(ahead, (0, 1))
        positions = torch.empty_like(ahead).scatter_(1, self.order, ahead).cpu()
        return [row[:length] for row, length in zip(positions, self.lengths, strict=True)]


def _merge(best: Tensor, query: Tensor, keys: Tensor, m: int) -> Tensor:
    """The m largest keys per query of best (Q, B) and of new ones, given as pairs in the order of queries."""
    counts = torch.bincount(query, minlength=len(best))
    new = torch.full((len(best), int(counts.max()) if len(query) else 0), torch.iinfo(torch.int64).min)
    new = new.to(best.device)
    place = torch.arange(len(query), device=best.device) - (counts.cumsum(0) - counts)[query]
    new[query, place] = keys
    merged = torch.cat([best, new], dim=1)
    return merged.topk(min(m, merged.shape[1]), sorted=True).values


def _rounded(scores: Tensor) -> Tensor:
    """float64 -> the nearest float32; adding 0 turns -0 into 0."""
    return scores.to(torch.float32).add_(0.0)


def _sortable(scores: Tensor) -> Tensor:
    """float32 -> int64 that orders alike: the bits, flipped for negative numbers."""
    bits = scores.view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)


def _order_keys(scores: Tensor, ids: Tensor) -> Tensor:
    """One int64 per score whose order is: higher score, then lower row number. All are distinct."""
    return (_sortable(scores) << _INDEX_BITS) | (_INDEX_MASK - ids)


def _from_order_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The row numbers and the scores of order keys."""
    bits = (keys >> _INDEX_BITS).to(torch.int32)
    scores = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)
    return _INDEX_MASK - (keys & _INDEX_MASK), scores


def _flat_keys(query: Tensor, scores: Tensor) -> Tensor:
    """One int64 per score whose order is: query, then score."""
    return (query << _INDEX_BITS) + _sortable(scores) + (1 << (_INDEX_BITS - 1))
