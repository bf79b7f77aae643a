"""What all rerankers share: candidates from anywhere, fetched a few queries at a time, scored and sorted.

Shapes: Q queries, M candidates per query in ranking order, D dimensions. The candidates come from
anywhere (a database, an index, a vector store): only their rows are needed.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .checks import Array, as_tensor, values_can_be_seen, whole_number

RERANK_M = 400

# Candidates' rows at a time: on a CPU what its caches hold, on a GPU what keeps it busy.
_CPU_BYTES, _GPU_BYTES = 16 << 20, 1 << 30

# Rows this much longer than 1 were surely never normalised; lossy indexes shorten theirs.
_LONGEST = 1.05


class Found(Protocol):
    """What a search found for Q queries, best first: ``modules.search.SearchResult``, or anything with these."""

    ids: Tensor  # (Q, R) int64
    scores: Tensor  # (Q, R)


class Reranker(Protocol):
    """What a reranker has to offer to take the place of any other, see :class:`SuperGlobalReranker`.

    Attributes:
        m: candidates of a query that are put into a new order.
        spare: further candidates that it scores. A benchmark that drops some images from a ranking
            then still finds m to sort. 0 where a score depends on the other candidates, so that the
            first m are sorted whatever they are.
    """

    m: int
    spare: int

    def scores(
        self,
        queries: Tensor,
        found: Found,
        fetch: Callable[[Tensor], Tensor],
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Returns the new scores of the first m + spare candidates, in the order of `found`. (Q, min(m + spare, R)).

        Args:
            queries: (Q, D), unit rows.
            found: the candidates, (Q, R).
            fetch: gives the descriptors (n, D) of the ids (n,), for rerankers that need them.
            device: where the work is done; by default the queries' own.
        """
        ...


class Reranking(NamedTuple):
    """Tensors, or NumPy arrays where the queries were one."""

    order: Array  # (Q, M) int64: the old place, within the candidates, of each new place
    scores: Array  # (Q, M): score of each new place, descending; -inf for a candidate that is not there


class NotFiniteRowError(ValueError):
    """A query (Q, D), or one of its candidates (Q, M, D), has NaN or infinity."""

    def __init__(self, q: Tensor, x: Tensor):
        self.query, self.candidate = int((~q.isfinite()).any(dim=1).long().argmax()), None
        if q[self.query].isfinite().all():
            place = int((~x.isfinite()).any(dim=2).flatten().long().argmax())
            self.query, self.candidate = divmod(place, x.shape[1])
        whose = "" if self.candidate is None else f"candidate {self.candidate} of "
        super().__init__(f"{whose}query {self.query} has NaN or infinity, got {tuple(q.shape)} and {tuple(x.shape)}")

    def of(self, q: Tensor, ids: Tensor, first: int) -> ValueError:
        """The same with the numbers of the whole, of which this was the part from `first` on."""
        query = first + self.query
        whose = "" if self.candidate is None else f"the row with id {ids[query, self.candidate]}, a candidate of "
        return ValueError(f"{whose}query {query} has NaN or infinity, got {tuple(q.shape)} and ids {tuple(ids.shape)}")


def check_finite(values: Tensor, q: Tensor, x: Tensor) -> None:
    """Raises a ValueError that names the query or candidate with NaN or infinity if one of their scores has it."""
    if values_can_be_seen(values) and not values.isfinite().all():
        raise NotFiniteRowError(q, x)


class CandidateReranker(nn.Module):
    """Base of the rerankers that sort a query's first M results by their descriptors.

    It takes candidates of any source and kind, checks them, and sorts their scores. A subclass
    gives the scores: it overrides :meth:`_scores`.

    Args:
        m: candidates that are reranked; results after the first m are not looked at.
    """

    def __init__(self, m: int = RERANK_M):
        super().__init__()
        self.m = whole_number(m, "m")
        self.spare = 0

    def _scores(self, q: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """The score of each candidate, in the candidates' order. (Q, D), (Q, M, D), (Q, M) -> (Q, M).

        Args:
            q: (Q, D), the queries, float32 or float64.
            x: (Q, M, D), their candidates, of the same type; zero where the mask is False.
            mask: (Q, M) bool, False where there is no candidate, or None where all are there. What is
                returned for absent candidates is not used.
        """
        raise NotImplementedError

    def forward(self, queries: Array, candidates: Array, mask: Array | None = None) -> Reranking:
        """Reranks each query's own candidates.

        Args:
            queries: (Q, D), unit rows, tensor or NumPy array.
            candidates: (Q, M', D), unit rows, each query's own in ranking order.
            mask: (Q, M') bool, False where a query has no such candidate (its row may hold anything).
                These end up last, with score -inf.

        Returns:
            order and scores of the first m, of the queries' kind.

        Raises:
            ValueError: where shapes, types or devices do not fit, nothing is there to rerank, or a
                score is not finite.
        """
        q, x = as_tensor(queries, "queries"), as_tensor(candidates, "candidates")
        scores, order = _sorted(self._checked_scores(q, x, None if mask is None else as_tensor(mask, "mask")))
        return Reranking(order, scores) if isinstance(queries, Tensor) else Reranking(order.numpy(), scores.numpy())

    def _checked_scores(self, q: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """The score of each of the first m candidates, in their order. (Q, D), (Q, M', D), (Q, M') -> (Q, M)."""
        q, x, mask = self.checked(q, x, mask)
        _warn_of_long_rows(q, x)
        scores = self._scores(q, x, mask)
        return scores if mask is None else scores.masked_fill(~mask, -torch.inf)

    def checked(self, q: Tensor, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The input as :meth:`_scores` takes it: of one type, cut to the first m, zero where no candidate is."""
        given = f"got {tuple(q.shape)} and {tuple(x.shape)}"
        if q.ndim != 2 or x.ndim != 3 or x.shape[::2] != q.shape:
            raise ValueError(f"reranking takes queries (Q, D) and candidates (Q, M, D), {given}")
        if 0 in x.shape[1:]:
            raise ValueError(f"there are no candidates to rerank: {given}")
        if not (q.is_floating_point() and x.is_floating_point()):
            raise ValueError(f"descriptors are floating numbers, {given} of {q.dtype} and {x.dtype}")
        if q.device != x.device:
            raise ValueError(f"queries and candidates are on different devices, {q.device} and {x.device}")
        dtype = torch.promote_types(torch.promote_types(q.dtype, x.dtype), torch.float32)
        if mask is not None:
            mask = mask.to(x.device)
            if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
                raise ValueError(f"the mask is bool (Q, M), got {mask.dtype} of shape {tuple(mask.shape)}, {given}")
            mask = mask[:, : self.m]
        q, x = q.to(dtype), x[:, : self.m].to(dtype)
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0)
        return q, x, mask

    def scores(
        self,
        queries: Tensor,
        found: Found,
        fetch: Callable[[Tensor], Tensor],
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Returns the scores of the first m candidates in the order of `found`, see :class:`Reranker`."""
        return self._by_blocks(self._checked_scores, queries, found.ids, fetch, device, self.m)

    def rerank(
        self,
        queries: Array,
        ids: Array,
        fetch: Callable[[Array], Array],
        device: torch.device | str | None = None,
    ) -> Reranking:
        """Reranks the first m of each query's results, fetching their descriptors a few queries at a time.

        Args:
            queries: (Q, D), unit rows, tensor or NumPy array.
            ids: (Q, R), each query's results in ranking order; only the first m are used. Integers, with
                -1 where a query has no more results, as in FAISS; or anything that names a row (text,
                UUIDs): an array, or a list of lists of any lengths, with None for no more results.
            fetch: gives the descriptors (n, D) of the ids (n,), from wherever they are: ``Database.rows``,
                FAISS's ``index.reconstruct_batch`` (of an IVF index after ``make_direct_map()``), a function
                of yours. It is given ids of the kind that came in (an int64 tensor or array, an array of
                text, a list), never -1 or None. Rows that several queries of a block name are fetched
                once, of integer ids if that saves a quarter of them.
            device: where the work is done; by default the queries' own.

        Returns:
            order and scores of shape (Q, min(m, R)), of the queries' kind, on their device.

        Raises:
            ValueError: as forward, and where fetch does not give a row per id.
        """
        q, numbers, fetch = as_tensor(queries, "queries"), *numbered_ids(ids, fetch)
        scores, order = _sorted(self._by_blocks(self._checked_scores, q, numbers, fetch, device, self.m))
        return Reranking(order, scores) if isinstance(queries, Tensor) else Reranking(order.numpy(), scores.numpy())

    def _by_blocks(
        self,
        work: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        q: Tensor,
        ids: Tensor,
        fetch: Callable,
        device: torch.device | str | None,
        m: int,
    ) -> Tensor:
        """What `work` gives of (q, x, mask), fetching the first m candidates of a few queries at a time.

        The ids are integers (Q, R); fetch is given tensors. The result has a row per query.
        """
        if not callable(fetch):
            raise ValueError(f"fetch is a function from ids to rows, Database(rows).rows, say; got {type(fetch)}")
        given = f"got queries {tuple(q.shape)} and ids {tuple(ids.shape)} of {ids.dtype}"
        if q.ndim != 2 or ids.ndim != 2 or len(q) != len(ids):
            raise ValueError(f"reranking takes queries (Q, D) and ids (Q, R), {given}")
        if 0 in ids.shape[1:] + q.shape[1:]:
            raise ValueError(f"there are no candidates to rerank: {given}")
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"ids are integers from 0, and -1 for none, {given}")
        device = q.device if device is None else torch.device(device)
        ids = ids.long()
        lowest = int(ids.min()) if len(ids) else 0  # one look, which waits for a GPU
        if lowest < -1:
            raise ValueError(f"ids are integers from 0, and -1 for none, {given}")
        ids = ids[:, :m]
        present = ids >= 0
        mask = None if lowest >= 0 or present.all() else present
        m, d = ids.shape[1], q.shape[1]
        block = max(1, (_GPU_BYTES if device.type == "cuda" else _CPU_BYTES) // (4 * m * max(m, d)))
        block -= block % min(block, torch.get_num_threads())  # so that all threads have as many to do
        done, moved = [], q.to(device)
        for start in range(0, max(1, len(q)), block):
            part = slice(start, start + block)
            there = None if mask is None else mask[part]
            rows = _fetched(fetch, ids[part], there, d).to(device)
            try:
                done.append(work(moved[part], rows, there))
            except NotFiniteRowError as error:
                raise error.of(q, ids, start) from None
        return torch.cat(done).to(q.device)


def _sorted(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (Q, M), descending, and the place that each had; equal scores keep their order."""
    return scores.sort(dim=1, descending=True, stable=True)


def numbered_ids(ids: Any, fetch: Callable) -> tuple[Tensor, Callable]:
    """Ids of any kind as an integer tensor (Q, R), -1 for none, and fetch for such tensors."""
    if isinstance(ids, Tensor) or not callable(fetch):
        return as_tensor(ids, "ids"), fetch
    if getattr(ids, "dtype", None) is not None and ids.dtype.kind in "iufb":
        return as_tensor(ids, "ids"), lambda wanted: fetch(wanted.numpy())
    if getattr(ids, "ndim", 2) != 2 or isinstance(ids, str | bytes):
        raise ValueError(f"ids are an array (Q, R) or a list of lists, got {type(ids).__name__}")
    rows = [list(row) for row in ids]
    width = max(map(len, rows), default=0)
    places: dict[Any, int] = {}
    numbers = [
        [-1 if each is None or each == -1 else places.setdefault(each, len(places)) for each in row]
        + [-1] * (width - len(row))
        for row in rows
    ]
    return torch.tensor(numbers, dtype=torch.int64).view(len(rows), width), _FetchNamed(fetch, ids, list(places))


class _FetchNamed:
    """Fetches rows by number from somebody else's store, which knows them by name: each row is fetched once."""

    def __init__(self, fetch: Callable, ids: Any, names: list):
        self.fetch, self.ids, self.names = fetch, ids, names

    def __call__(self, wanted: Tensor) -> Array:
        chosen = [self.names[number] for number in wanted.tolist()]
        if not hasattr(self.ids, "dtype"):
            return self.fetch(chosen)
        array = self.ids.ravel()[: len(chosen)].repeat(1)  # an array of the ids' own kind, without NumPy's name
        array[:] = chosen
        return self.fetch(array)


def _fetched(fetch: Callable, ids: Tensor, there: Tensor | None, dim: int) -> Tensor:
    """The candidates with these ids, zero where none is there. (Q, M) -> (Q, M, D)."""
    wanted = ids.flatten() if there is None else ids[there]
    named, inverse = wanted.unique(return_inverse=True)
    once = len(named) <= 0.75 * len(wanted) or isinstance(fetch, _FetchNamed)
    asked = named if once else wanted
    rows = as_tensor(fetch(asked), "what fetch gave")
    if rows.shape != (len(asked), dim):
        raise ValueError(f"fetch gave shape {tuple(rows.shape)} for {len(asked)} ids; queries have {dim} dimensions")
    rows = rows[inverse.to(rows.device)] if once else rows
    if there is None:
        return rows.view(*ids.shape, dim)
    candidates = rows.new_zeros(*ids.shape, dim)
    candidates[there.to(rows.device)] = rows
    return candidates


def _warn_of_long_rows(q: Tensor, x: Tensor) -> None:
    if not (values_can_be_seen(x) and len(x)):
        return
    lengths = torch.stack([rows.norm(dim=1).max() for rows in (q, x[:, 0])]).tolist()  # in one look, see _by_blocks
    for name, longest in zip(("queries", "candidates"), lengths, strict=True):
        if longest > _LONGEST:
            warnings.warn(
                f"reranking is for rows of unit length, there are {name} of length {longest:.3g}; "
                "torch.nn.functional.normalize(rows, dim=-1) makes them so",
                stacklevel=6,
            )
