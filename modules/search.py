"""Exact cosine search over descriptors, which need not fit in memory.

Shapes: Q queries, N database descriptors (rows), D dimensions, M results per query, L listed rows per query.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import Array, as_tensor
from .compact import Int8Rows

_INDEX_BITS = 32
_INDEX_MASK = (1 << _INDEX_BITS) - 1
_PRODUCT_BYTES = 4 << 20
_CACHED_BYTES = 4 << 20  # rows that a CPU multiplies at a time, so that they stay in its cache: up to twice as fast
_BLOCK = 2048  # pairs or rows whose float64 products are computed at a time
_GPU_ROWS = 1 << 16  # rows of a chunk on a GPU: few kernel launches, and products of some tens of MB
_SPARE = 256  # results beyond m that a GPU keeps, so that an error of a float32 product loses none


class NotFiniteError(ValueError):
    """A score is NaN or infinite: the query, or `row` of the database, is not a valid descriptor."""

    def __init__(self, query: int, row: int):
        super().__init__(f"query {query} and database row {row} have a score that is not finite")
        self.query, self.row = query, row


class Database:
    """The rows of one or more (N_i, D) tensors, numbered as if they were concatenated.

    A part may be memory-mapped (``torch.load(..., mmap=True)``, or ``torch.from_numpy`` of a NumPy
    memory map): only the rows in use are read.

    Args:
        parts: a tensor or several, of equal D and any floating-point dtype, or Int8Rows; the rows have unit
            length. Rows in float64 are rounded to float32 wherever they are used, so that a row has one score.

    Raises:
        ValueError: if there is no part, a part is not a floating-point tensor (N, D), or widths differ.
    """

    def __init__(self, parts: Tensor | Int8Rows | Sequence[Tensor | Int8Rows]):
        self.parts = [parts] if isinstance(parts, Tensor | Int8Rows) else list(parts)
        if not all(isinstance(part, Tensor | Int8Rows) for part in self.parts):
            raise ValueError("a database takes one or more tensors; torch.from_numpy converts an array")
        shapes = [tuple(part.shape) for part in self.parts]
        if not shapes or any(len(shape) != 2 or shape[1] != shapes[0][-1] for shape in shapes):
            raise ValueError(f"a database takes one or more (N, D) tensors of equal D, got shapes {shapes}")
        if not all(part.is_floating_point() for part in self.parts):
            raise ValueError(f"a database takes floating-point tensors, got {[part.dtype for part in self.parts]}")
        if sum(shape[0] for shape in shapes) > _INDEX_MASK:
            raise ValueError(f"a database can have at most {_INDEX_MASK} rows, got shapes {shapes}")

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def dim(self) -> int:
        return self.parts[0].shape[1]

    def __repr__(self) -> str:
        return f"Database({' + '.join(str(len(part)) for part in self.parts)} rows of {self.dim})"

    @property
    def device(self) -> torch.device:
        """The device of all parts; the CPU if they are on several devices."""
        devices = {part.device for part in self.parts}
        return devices.pop() if len(devices) == 1 else torch.device("cpu")

    def fitted(self, device: torch.device | str, share: float = 0.5) -> "Database":
        """Returns a copy on the GPU if its rows take at most this share of the free memory there; else itself."""
        device = torch.device(device)
        if device.type != "cuda":
            return self
        free, _ = torch.cuda.mem_get_info(device)
        taken = sum(part.nbytes for part in self.parts if part.device != device)
        if taken > share * free:
            return self
        # float64 as search reads it
        parts = (
            part.float() if isinstance(part, Tensor) and part.dtype == torch.float64 else part for part in self.parts
        )
        return Database([part.to(device) for part in parts])

    def rows(self, ids: Array) -> Array:
        """Returns the rows with these numbers, as float32, on the device of the database. (...) -> (..., D).

        If the numbers are a NumPy array, so are the rows.

        Raises:
            ValueError: if there is no such row.
        """
        if not isinstance(ids, Tensor):
            return self.rows(as_tensor(ids, "ids")).cpu().numpy()
        flat = ids.flatten().cpu()
        wrong = flat[(flat < 0) | (flat >= len(self))]
        if len(wrong):
            raise ValueError(f"there is no row {int(wrong[0])}; the database has {len(self)} rows")
        out = torch.empty(len(flat), self.dim, device=self.device)
        start = 0
        for part in self.parts:
            here = ((flat >= start) & (flat < start + len(part))).nonzero().squeeze(1)
            rows = part.index_select(0, (flat[here] - start).to(part.device)).to(out.device, torch.float32)
            if len(here) == len(flat):  # nothing to concatenate
                return rows.view(*ids.shape, self.dim)
            out[here.to(out.device)] = rows
            start += len(part)
        return out.view(*ids.shape, self.dim)

    def chunks(self, size: int, first: int = 0, stop: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Iterates over the rows from `first` to before `stop` as (number of the first row, at most `size` rows).

        A chunk never crosses parts; float64 rows are returned as float32.
        """
        stop, start = len(self) if stop is None else stop, 0
        for part in self.parts:
            for here in range(max(first - start, 0), min(stop - start, len(part)), size):
                rows = part[here : min(here + size, stop - start)]
                yield start + here, rows.float() if rows.dtype == torch.float64 else rows
            start += len(part)


class SearchResult(NamedTuple):
    ids: Tensor  # (Q, M) int64, best first
    scores: Tensor  # (Q, M) float32
    positions: list[Tensor]  # per query (L,) int64: 0-based rank of each listed row among all N


def merged(results: Sequence[SearchResult], m: int) -> SearchResult:
    """Merges searches of disjoint ranges of rows (`rows` of search) into the result of one search, to the bit.

    Args:
        results: of the same queries and listed rows; together the ranges must cover all rows.
        m: number of results per query.
    """
    keys = torch.cat([_order_keys(each.scores, each.ids) for each in results], dim=1)
    ids, scores = _from_order_keys(keys.topk(min(m, keys.shape[1]), dim=1).values)
    return SearchResult(ids, scores, [sum(parts) for parts in zip(*(each.positions for each in results), strict=True)])


def search(
    queries: Tensor,
    database: Database | Tensor,
    m: int,
    listed: Sequence[Tensor] | None = None,
    chunk_size: int | None = None,
    device: torch.device | str = "cpu",
    on_chunk: Callable[[int], None] | None = None,
    rows: tuple[int, int] | None = None,
) -> SearchResult:
    """Returns the M best rows per query, and the ranks of the listed rows, in one pass over the database.

    The score is q . x. Higher scores come first; among equal scores, the lower row number. A score is the
    float64 dot product rounded to float32, so that rankings are the same on any device and for any chunk
    size, and equal rows tie wherever they are. Only the scores that matter are computed that way: the best,
    and those so close to a listed row's score that float32 products could be on the wrong side of it.
    Nothing of size N x Q is kept or sorted.

    Args:
        queries: (Q, D), unit descriptors.
        database: (N, D), unit descriptors.
        m: number of results per query; all rows if the database is smaller.
        listed: per query, the row numbers (L,) int64 whose rank is wanted; none by default.
        chunk_size: number of rows read at a time; by default the products take about 4 MB, on a GPU it is 65,536.
        device: where the products are computed. Rows on another device are copied chunk by chunk;
            ``database.fitted(device)`` copies them all, once.
        on_chunk: called with the number of rows after each chunk, for a progress bar.
        rows: search only the rows from the first number to before the second. `ids` are still numbers among
            all rows, and `listed` may contain any row. :func:`merged` merges the results.

    Raises:
        ValueError: if shapes do not fit, m < 1, a listed number is outside the database, or a score is not
            finite (NotFiniteError, which names the row).

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
    rows = (0, len(database)) if rows is None else rows
    if not 0 <= rows[0] <= rows[1] <= len(database):
        raise ValueError(f"rows must be ascending numbers from 0 to {len(database)}, got {rows}")
    m = min(m, rows[1] - rows[0])

    queries = queries.to(device).to(torch.float64)
    if queries.device.type == "cuda" and m:
        found = _search_without_waiting(queries, database, m, listed, chunk_size or _GPU_ROWS, on_chunk, rows)
        if found is not None:
            return found
        on_chunk = None  # what follows is a second pass over the same rows
    if chunk_size is None:
        chunk_size = max(1024, min(8192, _PRODUCT_BYTES // (4 * max(len(queries), 1))))
    ranks, best = _ListedRanks(queries, database, listed), _Best(queries, database, m)
    fast = queries.to(_work_type())
    for start, chunk in database.chunks(chunk_size, *rows):
        chunk = chunk.to(device)
        scores = _products(fast, chunk)
        _check_finite(scores, start)
        best.take(scores, start)
        ranks.count(scores, chunk, start)
        if on_chunk is not None:
            on_chunk(len(chunk))
    best.settle()
    return SearchResult(best.ids.cpu(), best.scores.cpu(), ranks.positions())


def _search_without_waiting(
    queries: Tensor,
    database: Database,
    m: int,
    listed: Sequence[Tensor],
    chunk_size: int,
    on_chunk: Callable[[int], None] | None,
    rows: tuple[int, int],
) -> SearchResult | None:
    """Searches as `search` does, but lets the host run ahead of a GPU; the result is the same to the bit.

    Per chunk, the host waits for the device once, to count ranks: a fixed number of results is kept, and
    only at the end it is checked whether that was enough and whether all scores are finite.

    Returns:
        The result, or None if the number was too small, so that `search` must take its usual path.
    """
    ranks, best = _ListedRanks(queries, database, listed), _BestOfEachChunk(queries, database, m)
    fast = queries.to(_work_type())
    finite = torch.ones((), dtype=torch.bool, device=queries.device)
    for start, chunk in _on_device(database, chunk_size, queries.device, rows):
        scores = _products(fast, chunk)
        finite &= scores.sum().isfinite()
        best.take(scores, start)
        ranks.count_later(scores, start)
        if on_chunk is not None:
            on_chunk(len(chunk))
    if not finite or not best.is_enough():
        return None
    best.settle()
    ranks.settle()
    return SearchResult(best.ids.cpu(), best.scores.cpu(), ranks.positions())


def _on_device(
    database: Database, size: int, device: torch.device, rows: tuple[int, int]
) -> Iterator[tuple[int, Tensor]]:
    """Yields the chunks on the device; host rows are copied through two pinned buffers, one chunk ahead."""
    if device.type != "cuda" or database.device == device:
        yield from ((start, chunk.to(device)) for start, chunk in database.chunks(size, *rows))
        return
    work, copies = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    buffers: dict[int, Tensor] = {}
    sent: dict[int, torch.cuda.Event] = {}
    ahead = None
    for number, (start, chunk) in enumerate(database.chunks(size, *rows)):
        slot = number % 2
        if slot in sent:
            sent[slot].synchronize()  # until the buffer may be overwritten
        if slot not in buffers or buffers[slot].dtype != chunk.dtype:
            buffers[slot] = torch.empty(size, database.dim, dtype=chunk.dtype, pin_memory=True)
        with torch.cuda.stream(copies):
            there = buffers[slot][: len(chunk)].copy_(chunk).to(device, non_blocking=True)
            sent[slot] = copies.record_event()
        there.record_stream(work)
        if ahead is not None:
            yield ahead[:2]
        ahead = (start, there)
        work.wait_event(sent[slot])
    if ahead is not None:
        yield ahead


def _products(queries: Tensor, chunk: Tensor) -> Tensor:
    """Returns the float32 scores of a chunk, (Q, C), from products in the dtype of the queries, see _work_type."""
    if chunk.device.type != "cpu":
        return (queries @ chunk.to(queries.dtype).T).to(torch.float32)
    blocks = chunk.split(max(1, _CACHED_BYTES // (chunk.shape[1] * queries.element_size())))
    return torch.cat([queries @ block.to(queries.dtype).T for block in blocks], dim=1).to(torch.float32)


def _check_finite(scores: Tensor, start: int) -> None:
    if not torch.isfinite(scores.sum()):
        bad = (~torch.isfinite(scores)).nonzero()
        if len(bad):
            raise NotFiniteError(int(bad[0, 0]), start + int(bad[0, 1]))


def _work_type() -> torch.dtype:
    """Returns the dtype of the products: float64 if a reduced precision is set (TF32), which has no useful bound."""
    try:
        return torch.float32 if torch.get_float32_matmul_precision() == "highest" else torch.float64
    except RuntimeError:  # raised if a precision was set through the newer settings
        return torch.float64


def _error(scores: Tensor, dim: int) -> Tensor:
    """Returns a bound for the error of float32 products of unit vectors.

    The rounding errors of D partial sums, which grow towards the score, add up like a random walk. At
    D = 2048 the largest error among 10^8 products was a fifth of this bound.
    """
    return (1.5 * dim**0.5 * scores.abs() + 4) * 2.0**-24


def _exact(queries: Tensor, rows: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """Returns float64 products rounded to float32, without -0. (Q, D) float64, ids (C,) of rows -> (Q, C) float32."""
    parts = [queries @ rows(part).to(queries.device, torch.float64).T for part in ids.split(_BLOCK)]
    return torch.cat([part.to(torch.float32).add_(0.0) for part in parts], dim=1)


class _Best:
    """Keeps the best M rows of each query so far, and those that may turn out to be among them."""

    def __init__(self, queries: Tensor, database: Database, m: int):
        self.queries, self.database, self.m = queries, database, m
        self.ids = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        self.scores = torch.empty(len(queries), 0, device=queries.device)
        self.bar = torch.full((len(queries), 1), -torch.inf, device=queries.device)

    def take(self, scores: Tensor, start: int) -> None:
        query, column = (scores >= self.bar).nonzero(as_tuple=True)
        if not len(query):
            return
        # The pairs are ordered by query: lay them out in rows, padded with -inf.
        counts = torch.bincount(query, minlength=len(scores))
        place = torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[query]
        new_scores = scores.new_full((len(scores), int(counts.max())), -torch.inf)
        new_ids = torch.zeros_like(new_scores, dtype=torch.int64)
        new_scores[query, place] = scores[query, column]
        new_ids[query, place] = column + start
        self.scores, self.ids = torch.cat([self.scores, new_scores], 1), torch.cat([self.ids, new_ids], 1)
        if self.scores.shape[1] < self.m:
            return
        lowest = self.scores.topk(self.m, dim=1).values[:, -1:]
        self.bar = lowest - 2 * _error(lowest, self.queries.shape[1])
        keep = int((self.scores >= self.bar).sum(dim=1).max())
        self.scores, places = self.scores.topk(keep, dim=1)
        self.ids = self.ids.gather(1, places)
        if keep > 2 * self.m + _BLOCK:  # many rows tie: only their numbers decide which stay
            self.settle()

    def settle(self) -> None:
        """Keeps only the best M by exact scores, in order."""
        there = self.scores > -torch.inf
        unique, inverse = self.ids.unique(return_inverse=True)
        self.scores = _exact(self.queries, self.database.rows, unique).gather(1, inverse)
        keys = torch.where(there, _order_keys(self.scores, self.ids), torch.iinfo(torch.int64).min)
        self.ids, self.scores = _from_order_keys(keys.topk(min(self.m, keys.shape[1]), dim=1).values)


class _BestOfEachChunk(_Best):
    """The same with a fixed number of rows that are kept, so that the host need not know any values."""

    def __init__(self, queries: Tensor, database: Database, m: int):
        super().__init__(queries, database, m)
        self.kept, self.seen = self.m + _SPARE, 0

    def take(self, scores: Tensor, start: int) -> None:
        values, places = scores.topk(min(self.kept, scores.shape[1]), dim=1)
        self.scores, self.ids = torch.cat([self.scores, values], 1), torch.cat([self.ids, places + start], 1)
        self.seen += scores.shape[1]
        if self.scores.shape[1] > self.kept:
            self.scores, places = self.scores.topk(self.kept, dim=1)
            self.ids = self.ids.gather(1, places)

    def is_enough(self) -> bool:
        """Returns whether no row was dropped that may be among the best M."""
        if self.seen <= self.kept:
            return True
        return bool((self.scores.amin(dim=1) < self._lowest()).all())

    def settle(self) -> None:
        """Keeps only the best M by exact scores, in order."""
        keep = int((self.scores >= self._lowest()[:, None]).sum(dim=1).max())
        self.scores, places = self.scores.topk(keep, dim=1)
        self.ids = self.ids.gather(1, places)
        super().settle()

    def _lowest(self) -> Tensor:
        """Returns the lowest score with which a row may be among the best M. (Q,)."""
        lowest = self.scores.topk(self.m, dim=1).values[:, -1]
        return lowest - 2 * _error(lowest, self.queries.shape[1])


class _ListedRanks:
    """Counts, chunk by chunk, how many rows precede each listed row of each query.

    For nearly all scores, a table of narrow bins gives the listed scores between which they lie. Scores
    in a bin with a listed score are compared with it, exactly if the float32 error matters.
    """

    def __init__(self, queries: Tensor, database: Database, listed: Sequence[Tensor]):
        self.queries, self.database, device, n = queries, database, queries.device, len(database)
        self.lengths = [len(ids) for ids in listed]
        self.width = max(self.lengths, default=0)
        keys = torch.full(
            (len(listed), self.width + 1), torch.iinfo(torch.int64).max, device=device
        )  # the last is padding
        for query, (numbers, vector) in enumerate(zip(listed, queries, strict=True)):
            if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < n:
                raise ValueError(f"query {query}: a listed row lies outside the database of {n} rows")
            if len(numbers):
                scores = _exact(vector[None], database.rows, numbers)[0]
                keys[query, : len(numbers)] = _order_keys(scores, numbers.to(device))
        self.keys, self.order = keys.sort(dim=1)  # (Q, L+1)
        padding = torch.arange(self.width + 1, device=device) >= torch.tensor(self.lengths, device=device)[:, None]
        self.scores = _from_order_keys(self.keys)[1].masked_fill(padding, torch.inf)
        # passed[q, i]: number of rows that precede exactly i of the query's listed rows
        self.passed = torch.zeros_like(self.keys)
        # The lists of all queries in one ascending tensor, searched in one call.
        self.flat = _flat_keys(torch.arange(len(listed), device=device)[:, None], self.scores).flatten()
        self.table = self._table(max(256, min(32768, 2**22 // max(len(listed), 1))))
        self.later: list[tuple[Tensor, ...]] = []

    def _table(self, bins: int) -> Tensor:
        """Returns (Q, bins) over [-1, 1]: how many listed scores lie below a bin, or width + 1 if one may lie in it."""
        centres = (torch.arange(bins, device=self.scores.device) + 0.5 - bins / 2) / (bins / 2)
        table = torch.searchsorted(self.scores, centres.repeat(len(self.scores), 1))
        error = _error(self.scores, self.queries.shape[1]).masked_fill(self.scores.isinf(), 0)
        for edge in (-error, torch.zeros_like(error), error):
            for slack in (-0.01, 0.01):  # allows for rounding of the bin number
                place = (self.scores + edge) * (bins / 2) + (bins / 2 + slack)
                table.scatter_(1, place.clamp_(0, bins - 1).long(), self.width + 1)
        return table.to(torch.int32)

    def count(self, scores: Tensor, chunk: Tensor, start: int) -> None:
        if not self.width:
            return
        query, column, above, near = self._count_clear(scores)
        near = near.nonzero().squeeze(1)
        above[near] = self._exactly_above(query[near], column[near], start, chunk.__getitem__)
        self._add(above, query)

    def count_later(self, scores: Tensor, start: int) -> None:
        """Counts as `count` does, but leaves the rows close to a listed score to `settle`."""
        if self.width:
            query, column, above, near = self._count_clear(scores)
            self._add(above.masked_fill(near, self.width + 1), query)
            self.later.append((query, column + start, near))

    def settle(self) -> None:
        """Counts the rows that count_later left."""
        if self.later:
            query, row, near = (torch.cat(parts) for parts in zip(*self.later, strict=True))
            near = near.nonzero().squeeze(1)
            self._add(self._exactly_above(query[near], row[near], 0, self.database.rows), query[near])
            self.later = []

    def _count_clear(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Counts the rows whose bin contains no listed score, and returns the other P pairs.

        Returns:
            query, column: (P,).
            above: (P,), the number of listed rows that each pair's row precedes by its float32 score.
            near: (P,), whether the float32 score leaves that in doubt.
        """
        half = self.table.shape[1] / 2
        places = self.table.gather(1, (scores * half).add_(half).clamp_(0, 2 * half - 1).long())
        self._add(places, torch.arange(len(scores), device=places.device)[:, None])
        query, column = (places > self.width).nonzero(as_tuple=True)
        values = scores[query, column]
        above = torch.searchsorted(self.flat, _flat_keys(query, values)).clamp_(max=len(self.flat) - 1)
        listed = self.scores.flatten()
        distance = torch.minimum((listed[above] - values).abs(), (listed[(above - 1).clamp(min=0)] - values).abs())
        near = distance <= _error(values, self.queries.shape[1])
        return query, column, above - query * (self.width + 1), near

    def _exactly_above(self, query: Tensor, column: Tensor, start: int, rows: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns the number of listed rows that each pair's row precedes by its exact score. (P,), (P,) -> (P,)."""
        above = torch.empty_like(query)
        if len(query):
            unique, inverse = column.unique(return_inverse=True)
            exact = _exact(self.queries, rows, unique)[query, inverse]
            keys = _order_keys(exact, column + start)
            for part in torch.arange(len(query), device=query.device).split(_BLOCK):
                above[part] = torch.searchsorted(self.keys[query[part]], keys[part, None]).squeeze(1)
        return above

    def _add(self, places: Tensor, query: Tensor) -> None:
        bins, size = (places + query * (self.width + 2)).flatten(), len(self.passed) * (self.width + 2)
        if bins.device.type == "cuda":  # bincount would wait to find the largest
            counts = torch.zeros(size, dtype=torch.int64, device=bins.device)
            counts.scatter_add_(0, bins, torch.ones((), dtype=torch.int64, device=bins.device).expand_as(bins))
        else:
            counts = torch.bincount(bins, minlength=size)
        self.passed += counts.view(len(self.passed), -1)[:, : self.width + 1]  # without those in doubt

    def positions(self) -> list[Tensor]:
        ahead = self.passed.flip(1).cumsum(1).flip(1)[:, 1:]
        ahead = torch.nn.functional.pad(ahead, (0, 1))
        positions = torch.empty_like(ahead).scatter_(1, self.order, ahead).cpu()
        return [row[:length] for row, length in zip(positions, self.lengths, strict=True)]


def _sortable(scores: Tensor) -> Tensor:
    """Maps float32 to int64 in the same order: the bits, flipped for negative numbers."""
    bits = scores.view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)


def _order_keys(scores: Tensor, ids: Tensor) -> Tensor:
    """Returns one distinct int64 per score: larger for a higher score, then for a lower row number."""
    return (_sortable(scores) << _INDEX_BITS) | (_INDEX_MASK - ids)


def _from_order_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the row numbers and the scores of order keys."""
    bits = (keys >> _INDEX_BITS).to(torch.int32)
    scores = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)
    return _INDEX_MASK - (keys & _INDEX_MASK), scores


def _flat_keys(query: Tensor, scores: Tensor) -> Tensor:
    """Returns one int64 per score that sorts by query, then score."""
    return (query << _INDEX_BITS) + _sortable(scores) + (1 << (_INDEX_BITS - 1))
