"""Exact cosine search over descriptors, which need not fit in memory.

Shapes: Q queries, N database descriptors (rows), D dimensions, M results per query, L listed rows per query,
C rows of a chunk.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .checks import Array, as_tensor, warn_of_lengths, whole_number

GRID = 1 << 15  # a range of rows that starts at a multiple of this is computed as in a search of all rows

_BLOCK = 256  # rows that one thread of a CPU multiplies at a time: 2 MB, which its cache can hold
_SCORES = 1 << 21  # scores of a chunk on a CPU: few calls, and 8 MB
_TIES = 256  # listed rows whose ties are counted at a time


class NotFiniteError(ValueError):
    """A score is NaN or infinite: the query, or `row` of the database, is not a valid descriptor."""

    def __init__(self, query: int, row: int):
        super().__init__(f"query {query} and database row {row} have a score that is not finite")
        self.query, self.row = query, row


class Database:
    """The rows of one or more (N_i, D) tensors or NumPy arrays, numbered as if they were concatenated.

    A part may be memory-mapped (``torch.load(..., mmap=True)``, ``np.load(..., mmap_mode="r")``): only the
    rows in use are read.

    Args:
        parts: a tensor or array, or several, of equal D and any floating-point dtype; the rows have unit length.

    Raises:
        ValueError: if there is no part, a part is not a floating-point tensor or array (N, D), or widths differ.
    """

    def __init__(self, parts: Array | Sequence[Array]):
        self.parts = [as_tensor(part, "rows") for part in (parts if isinstance(parts, list | tuple) else [parts])]
        shapes = [tuple(part.shape) for part in self.parts]
        if not shapes or any(len(shape) != 2 or shape[1] != shapes[0][-1] for shape in shapes):
            raise ValueError(f"a database takes one or more (N, D) tensors of equal D, got shapes {shapes}")
        if not all(part.is_floating_point() for part in self.parts):
            raise ValueError(f"a database takes floating-point tensors, got {[part.dtype for part in self.parts]}")

    def __len__(self) -> int:
        return sum(map(len, self.parts))

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
        if sum(part.nbytes for part in self.parts if part.device != device) > share * free:
            return self
        return Database([part.to(device) for part in self.parts])

    def rows(self, ids: Array) -> Array:
        """Returns the rows with these numbers, as float32, on the device of the database. (...) -> (..., D).

        If the numbers are a NumPy array, so are the rows.

        Raises:
            ValueError: if the numbers are not integers, or there is no such row.
        """
        if not isinstance(ids, Tensor):
            return self.rows(as_tensor(ids, "ids")).cpu().numpy()
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"row numbers must be integers, got {ids.dtype}")
        flat = ids.flatten().cpu().long()
        missing = flat[(flat < 0) | (flat >= len(self))]
        if len(missing):
            raise ValueError(f"there is no row {int(missing[0])}; the database has {len(self)} rows")
        out = torch.empty(len(flat), self.dim, device=self.device)
        start = 0
        for part in self.parts:
            inside = ((flat >= start) & (flat < start + len(part))).nonzero().squeeze(1)
            rows = part.index_select(0, (flat[inside] - start).to(part.device)).to(out.device, torch.float32)
            if len(inside) == len(flat):  # nothing to concatenate
                return rows.view(*ids.shape, self.dim)
            out[inside.to(out.device)] = rows
            start += len(part)
        return out.view(*ids.shape, self.dim)

    def chunks(self, size: int, first: int = 0, stop: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Iterates over the rows from `first` to before `stop` as (number of the first row, at most `size` rows).

        All chunks but the first start at a multiple of `size`. Only a chunk that crosses parts is a copy.
        """
        stop = len(self) if stop is None else stop
        while first < stop:
            end, start, pieces = min(first - first % size + size, stop), 0, []
            for part in self.parts:
                pieces.append(part[max(first - start, 0) : max(end - start, 0)])
                start += len(part)
            pieces = [piece.to(self.device) for piece in pieces if len(piece)]
            yield first, pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            first = end


class SearchResult(NamedTuple):
    """The best rows of each query and the ranks of its listed rows; NumPy arrays if the queries were one."""

    ids: Array  # (Q, M) int64, best first
    scores: Array  # (Q, M) float32
    positions: list[Array]  # per query (L,) int64: 0-based rank of each listed row among all N


def merged(results: Sequence[SearchResult], m: int) -> SearchResult:
    """Merges searches of disjoint ranges of rows (`rows` of search) into the result of one search, to the bit.

    Args:
        results: of the same queries and listed rows, as tensors; together the ranges must cover all rows.
        m: number of results per query.
    """
    ids, order = torch.cat([each.ids for each in results], dim=1).sort(dim=1)  # equal scores keep this order
    scores = torch.cat([each.scores for each in results], dim=1).gather(1, order)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    positions = [sum(parts) for parts in zip(*(each.positions for each in results), strict=True)]
    return SearchResult(ids.gather(1, order)[:, :m], scores[:, :m], positions)


@torch.no_grad()
def search(
    queries: Array,
    database: Database | Array,
    m: int,
    listed: Sequence[Array] | None = None,
    device: torch.device | str = "cpu",
    on_chunk: Callable[[int], None] | None = None,
    rows: tuple[int, int] | None = None,
) -> SearchResult:
    """Returns the M best rows per query, and the ranks of the listed rows, in one pass over the database.

    The score is q . x in float32. Higher scores come first; among equal scores, the lower row number. The rows
    are multiplied in blocks of one size, so that the score of a row depends on nothing but the row and the
    queries: equal rows tie wherever they are, and searches of ranges of rows merge into the search of all. Other
    processors may order rows differently whose scores differ by less than 1e-6.
    Nothing of size N x Q is kept or sorted.

    Args:
        queries: (Q, D), unit descriptors.
        database: (N, D), unit descriptors.
        m: number of results per query; all rows if the database is smaller.
        listed: per query, the row numbers (L,) int64 whose rank is wanted; none by default. Ranks need NumPy on a CPU.
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
    q = as_tensor(queries, "queries")
    if q.ndim != 2 or q.shape[1] != database.dim:
        raise ValueError(f"queries must be (Q, {database.dim}) for {database}, got {tuple(q.shape)}")
    first, stop = (0, len(database)) if rows is None else rows
    if not 0 <= first <= stop <= len(database):
        raise ValueError(f"rows must be ascending numbers from 0 to {len(database)}, got {rows}")
    if len(database):
        some = database.rows(torch.linspace(0, len(database) - 1, 8).long())
        warn_of_lengths("search", {"rows": some}, stacklevel=4)
    q = q.to(device).to(_product_type())
    ranks = None if listed is None else _ListedRanks(q, database, [as_tensor(each, "listed") for each in listed])
    best = _Best(len(q), min(whole_number(m, "m"), stop - first), q.device)
    for start, chunk in _on_device(database, _chunk_size(q), q.device, first, stop):
        scores = _products(q, chunk)
        if not scores.sum().isfinite():  # waits for a GPU, which is then ready to count in `take`
            query, column = (~scores.isfinite()).nonzero()[0].tolist()
            raise NotFiniteError(query, start + column)
        best.take(scores, start)
        if ranks is not None:
            ranks.count(scores, start)
        if on_chunk is not None:
            on_chunk(len(chunk))
    ids, best_scores = (each.cpu() for each in best.result())
    positions = [torch.empty(0, dtype=torch.int64)] * len(q) if ranks is None else ranks.positions()
    if isinstance(queries, Tensor):
        return SearchResult(ids, best_scores, positions)
    return SearchResult(ids.numpy(), best_scores.numpy(), [each.numpy() for each in positions])


def _product_type() -> torch.dtype:
    """Returns float32, or float64 if PyTorch is set to compute products of float32 in less (TF32, bfloat16)."""
    try:
        return torch.float32 if torch.get_float32_matmul_precision() == "highest" else torch.float64
    except RuntimeError:  # raised if a precision was set through the newer settings
        return torch.float64


def _least_rows(queries: Tensor) -> int:
    """Returns the number of rows that are multiplied at least, by zeros if there are fewer."""
    return GRID if queries.is_cuda else _BLOCK * max(2, torch.get_num_threads())


def _chunk_size(queries: Tensor) -> int:
    """Returns the number of rows of a chunk, which divides GRID; on a CPU enough for many blocks per thread."""
    most = max(_SCORES // max(1, len(queries)), 8 * _least_rows(queries))
    return min(GRID, 1 << (most.bit_length() - 1))


def _on_device(
    database: Database, size: int, device: torch.device, first: int, stop: int
) -> Iterator[tuple[int, Tensor]]:
    """Yields the chunks on the device; host rows are copied through two pinned buffers, one chunk ahead."""
    if device.type != "cuda" or database.device == device:
        yield from ((start, chunk.to(device)) for start, chunk in database.chunks(size, first, stop))
        return
    work, copies = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    buffers: dict[int, Tensor] = {}
    sent: dict[int, torch.cuda.Event] = {}
    ahead = None
    for number, (start, chunk) in enumerate(database.chunks(size, first, stop)):
        slot = number % 2
        if slot in sent:
            sent[slot].synchronize()  # until the buffer may be overwritten
        if slot not in buffers or buffers[slot].dtype != chunk.dtype:
            buffers[slot] = torch.empty(size, database.dim, dtype=chunk.dtype, pin_memory=True)
        with torch.cuda.stream(copies):
            copy = buffers[slot][: len(chunk)].copy_(chunk).to(device, non_blocking=True)
            sent[slot] = copies.record_event()
        copy.record_stream(work)
        if ahead is not None:
            yield ahead
        ahead = (start, copy)
        work.wait_event(sent[slot])
    if ahead is not None:
        yield ahead


def _products(queries: Tensor, rows: Tensor) -> Tensor:
    """Returns the scores q . x. (Q, D), (C, D) -> (Q, C) float32.

    A row has the same score wherever it is. On a GPU, all products therefore have the same shapes. On a CPU, the rows
    are multiplied in blocks, at least one for each thread: where threads share a block, MKL computes the rows beside
    the border in another order.
    """
    if queries.is_cuda:
        padded = F.pad(rows.to(queries.dtype), (0, 0, 0, -len(rows) % GRID))
        return (queries @ padded.T)[:, : len(rows)].float()
    least = _least_rows(queries)
    size = max(least, len(rows) // _BLOCK * _BLOCK)
    if rows.dtype != queries.dtype:
        size = least  # the converted rows are still in the caches when they are multiplied
    scores = queries.new_empty(len(queries), len(rows) + least)
    buffer = queries.new_empty(least, queries.shape[1])  # what it holds beyond the last row gives no score
    for first, part in zip(range(0, len(rows), size), rows.split(size), strict=True):
        if part.dtype != queries.dtype or len(part) < least:
            buffer[: len(part)] = part
            part = buffer
        blocks = part.reshape(-1, _BLOCK, part.shape[1])
        products = torch.bmm(queries.expand(len(blocks), -1, -1), blocks.transpose(1, 2))
        scores[:, first : first + len(part)].unflatten(1, (-1, _BLOCK)).copy_(products.transpose(0, 1))
    return scores[:, : len(rows)].float()


class _Best:
    """Keeps the best M rows of each of Q queries, of chunks in ascending order."""

    def __init__(self, q: int, m: int, device: torch.device):
        self.q, self.m = q, m
        self.bar = torch.full((q, 1), -torch.inf, device=device)  # rows up to this score are not among the best
        none = torch.empty(0, dtype=torch.int64, device=device)
        # Query, number and score of candidates: the best M up to some chunk, in order, and then later rows.
        self.candidates = [(none, none, none.float())]
        self.count = self.seen = 0

    def take(self, scores: Tensor, start: int) -> None:
        """Adds the rows of a chunk, (Q, C), that may be among the best."""
        if not self.seen and self.m <= scores.shape[1]:
            self.bar = scores.topk(self.m, dim=1).values[:, -1:].nextafter(self.bar)
        query, column = _places(scores > self.bar)
        self.candidates.append((query, column + start, scores[query, column]))
        self.count += len(query)
        self.seen += scores.shape[1]
        if self.seen >= self.m and self.count >= 2 * self.q * self.m:
            self.bar = self.result()[1][:, -1:]

    def result(self) -> tuple[Tensor, Tensor]:
        """Returns numbers and scores of the best M, and drops the other candidates. (Q, M), (Q, M)."""
        query, ids, scores = (torch.cat(parts) for parts in zip(*self.candidates, strict=True))
        order = scores.sort(descending=True, stable=True).indices  # equal scores stay in the order of the rows
        by_query = query[order].sort(stable=True)
        first = torch.searchsorted(by_query.values, torch.arange(self.q, device=query.device))
        best = order[by_query.indices[(first[:, None] + torch.arange(self.m, device=query.device)).flatten()]]
        self.candidates, self.count = [(query[best], ids[best], scores[best])], len(best)
        return ids[best].view(self.q, self.m), scores[best].view(self.q, self.m)


class _ListedRanks:
    """Counts, chunk by chunk, how many rows precede each listed row of each query."""

    def __init__(self, queries: Tensor, database: Database, listed: Sequence[Tensor]):
        if len(listed) != len(queries):
            raise ValueError(f"{len(queries)} queries need {len(queries)} lists of rows, got {len(listed)}")
        for query, ids in enumerate(listed):
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(database):
                raise ValueError(f"query {query}: a listed row lies outside the database of {len(database)} rows")
        self.lengths = [len(ids) for ids in listed]
        flat = [torch.empty(0, dtype=torch.int64), *(ids.cpu().long() for ids in listed)]
        self.host_ids = pad_sequence(flat, batch_first=True, padding_value=-1)[1:]  # (Q, L)
        self.ids = self.host_ids.to(queries.device)
        self.scores = torch.full(self.ids.shape, torch.inf, device=queries.device)
        numbers = torch.cat(flat).unique()
        for some in numbers.split(_least_rows(queries)) if len(numbers) else ():
            query, place = ((self.host_ids >= some[0]) & (self.host_ids <= some[-1])).nonzero(as_tuple=True)
            column = torch.searchsorted(some, self.host_ids[query, place])
            scores = _products(queries, database.rows(some).to(queries.device))
            self.scores[query, place] = scores[query, column]
        self.above = self.scores.nextafter(torch.full_like(self.scores, torch.inf))
        self.ahead = torch.zeros_like(self.ids)

    def count(self, scores: Tensor, start: int) -> None:
        """Adds a chunk, (Q, C), of rows whose numbers begin with `start`."""
        size, ordered = scores.shape[1], _ascending(scores)
        # Rows of the chunk precede a listed row of a later chunk at equal scores, too.
        below = torch.searchsorted(ordered, torch.where(self.ids < start, self.above, self.scores))
        self.ahead += size - below
        inside = (self.host_ids >= start) & (self.host_ids < start + size)
        if not inside.any():
            return
        query, place = (each.to(scores.device) for each in inside.nonzero(as_tuple=True))
        column, score, following = self.ids[query, place] - start, self.scores[query, place], below[query, place] + 1
        # A listed row of this chunk does not precede itself; nor do the later rows of equal score, if there are any.
        self.ahead[query, place] -= (scores[query, column] >= score).long()
        tied = (following < size) & (ordered[query, following.clamp(max=size - 1)] == score)
        for some in tied.nonzero().squeeze(1).split(_TIES):
            equal = scores[query[some]] == score[some, None]
            later = torch.arange(size, device=scores.device) > column[some, None]
            self.ahead[query[some], place[some]] -= (equal & later).sum(dim=1)

    def positions(self) -> list[Tensor]:
        """Returns the 0-based ranks of the listed rows of each query."""
        return [row[:length] for row, length in zip(self.ahead.cpu(), self.lengths, strict=True)]


def _ascending(scores: Tensor) -> Tensor:
    """Returns the scores of each query in ascending order. (Q, C) -> (Q, C)."""
    if scores.device.type != "cpu":
        return scores.sort(dim=1).values
    ordered = scores.clone(memory_format=torch.contiguous_format)
    ordered.numpy().sort(axis=1)  # ten times as fast as PyTorch's
    return ordered


def _places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the places of True as `nonzero` does, faster if they are few: eight are looked at at a time. (Q, C)."""
    words = F.pad(mask, (0, -mask.shape[1] % 8))
    row, word = words.view(torch.int64).nonzero(as_tuple=True)
    hit, bit = words.view(len(mask), words.shape[1] // 8, 8)[row, word].nonzero(as_tuple=True)
    return row[hit], word[hit] * 8 + bit
