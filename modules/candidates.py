"""The base of all rerankers: candidates are fetched for a few queries at a time, scored and sorted.

Shapes: Q queries, M candidates per query in ranking order, D dimensions. The candidates may come from
any database, index or vector store: only their descriptors are needed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .checks import Array, as_tensor, values_can_be_seen, warn_of_lengths, whole_number
from .search import Database, search

RERANK_M = 400

# Bytes of candidate descriptors processed at a time: what fits in the caches of a CPU, or keeps a GPU busy.
_CPU_BYTES, _GPU_BYTES = 16 << 20, 1 << 30


class Found(Protocol):
    """The results of a search for Q queries, best first: a ``SearchResult``, or anything with these attributes."""

    ids: Tensor  # (Q, R) int64
    scores: Tensor  # (Q, R)


class Reranker(Protocol):
    """The interface of a reranker, for example of :class:`SuperGlobalReranker`.

    Attributes:
        m: number of candidates per query that are sorted again.
    """

    m: int

    def scores(
        self,
        queries: Tensor,
        found: Found,
        fetch: Callable[[Tensor], Tensor],
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Returns the new scores of the first m candidates, in the order of `found`. (Q, min(m, R)).

        Args:
            queries: (Q, D), unit descriptors.
            found: the candidates, (Q, R).
            fetch: returns the descriptors (n, D) of the ids (n,), for rerankers that need them.
            device: where the scores are computed; by default the device of the queries.
        """
        ...


class Reranking(NamedTuple):
    """The new order of R results: tensors, or NumPy arrays if the queries were one.

    The first M results are sorted by the reranker's scores. The others follow in their previous order, with scores
    that continue below those of the first M. Absent results come last.
    """

    ids: Array  # (Q, R): the ids in the new order, of the kind that was given; the order itself if none were given
    scores: Array  # (Q, R): score of each new place, descending; -inf for an absent result
    order: Array  # (Q, M) int64: for each of the first M new places, the previous place among the results


class NotFiniteRowError(ValueError):
    """A query (Q, D), or one of its candidates (Q, M, D), contains NaN or infinity."""

    def __init__(self, q: Tensor, x: Tensor):
        self.query, self.candidate = int((~q.isfinite()).any(dim=1).long().argmax()), None
        if q[self.query].isfinite().all():
            place = int((~x.isfinite()).any(dim=2).flatten().long().argmax())
            self.query, self.candidate = divmod(place, x.shape[1])
        whose = "" if self.candidate is None else f"candidate {self.candidate} of "
        super().__init__(f"{whose}query {self.query} has NaN or infinity, got {tuple(q.shape)} and {tuple(x.shape)}")

    def of(self, q: Tensor, ids: Tensor, first: int) -> ValueError:
        """Returns the same error with the numbers of the whole input, of which this was the part from `first` on."""
        query = first + self.query
        whose = "" if self.candidate is None else f"the row with id {ids[query, self.candidate]}, a candidate of "
        return ValueError(f"{whose}query {query} has NaN or infinity, got {tuple(q.shape)} and ids {tuple(ids.shape)}")


def check_finite(values: Tensor, q: Tensor, x: Tensor) -> None:
    """Raises a ValueError if a score is NaN or infinite; it names the query or candidate responsible."""
    if values_can_be_seen(values) and not values.isfinite().all():
        raise NotFiniteRowError(q, x)


def reordered(ids: Tensor, scores: Tensor, new_scores: Tensor) -> Reranking:
    """Returns the new order (Q, R) of results, of which the first were scored again; equal scores keep their order.

    The scores of the others are those of the search. If these are not below the lowest new score, all are shifted
    by the same amount, so that sorting by the scores of the whole ranking gives its order.

    Args:
        ids: (Q, R) int64, best first, -1 for an absent result.
        scores: (Q, R), those of the search, descending.
        new_scores: (Q, M), the new scores of the first M results; -inf for an absent result.
    """
    lowest = new_scores.detach().masked_fill(new_scores == -torch.inf, torch.inf).amin(dim=1, keepdim=True)
    below = lowest.nextafter(torch.full_like(lowest, -torch.inf))
    others = scores[:, new_scores.shape[1] :].to(new_scores)
    others = (others + (below - others[:, :1]).clamp(max=0)).minimum(below)
    together = torch.cat([new_scores, others], dim=1).masked_fill(ids.to(new_scores.device) < 0, -torch.inf)
    sorted_scores, order = together.sort(dim=1, descending=True, stable=True)
    return Reranking(ids.gather(1, order.to(ids.device)), sorted_scores, order)


class CandidateReranker(nn.Module):
    """Base class of the rerankers that sort a query's first M results by their descriptors.

    It accepts candidates from any source, checks them, and sorts their scores. A subclass computes
    the scores by overriding :meth:`_scores`.

    Args:
        m: number of candidates that are reranked; later results are ignored.
    """

    def __init__(self, m: int = RERANK_M):
        super().__init__()
        self.m = whole_number(m, "m")

    def _scores(self, q: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """Returns the score of each candidate, in the order of the candidates. (Q, D), (Q, M, D), (Q, M) -> (Q, M).

        Args:
            q: (Q, D), the queries, float32 or float64.
            x: (Q, M, D), their candidates, of the same dtype; zero where the mask is False.
            mask: (Q, M) bool, False where a candidate is absent, or None if all are present. The scores of
                absent candidates are ignored.
        """
        raise NotImplementedError

    def forward(self, queries: Array, candidates: Array, mask: Array | None = None) -> Reranking:
        """Reranks each query's own candidates.

        Args:
            queries: (Q, D), unit descriptors, tensor or NumPy array.
            candidates: (Q, M', D), unit descriptors, those of each query in ranking order.
            mask: (Q, M') bool, False where a candidate is absent (its descriptor may then hold any values).
                Absent candidates are sorted last, with score -inf.

        Returns:
            order and scores of the first m, as tensors or arrays like the queries; the ids are the order.

        Raises:
            ValueError: if shapes, dtypes or devices do not fit, there is no candidate to rerank, or a score is
                not finite.
        """
        q, x = as_tensor(queries, "queries"), as_tensor(candidates, "candidates")
        scores = self._checked_scores(q, x, None if mask is None else as_tensor(mask, "mask"))
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        found = Reranking(order, scores, order)
        return found if isinstance(queries, Tensor) else Reranking(*(each.numpy() for each in found))

    def _checked_scores(self, q: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """Returns the scores of the first m candidates, in their order. (Q, D), (Q, M', D), (Q, M') -> (Q, M)."""
        q, x, mask = self.checked(q, x, mask)
        # Eight or more candidates of each query; all would take 10 % of the time of reranking.
        some = x[:, :: max(1, x.shape[1] // 8)].flatten(0, 1)
        warn_of_lengths("reranking", {"queries": q, "candidates": some}, stacklevel=6)
        scores = self._scores(q, x, mask)
        return scores if mask is None else scores.masked_fill(~mask, -torch.inf)

    def checked(self, q: Tensor, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the input as :meth:`_scores` expects it: of one dtype, cut to the first m, absent candidates zero."""
        given = f"got {tuple(q.shape)} and {tuple(x.shape)}"
        if q.ndim != 2 or x.ndim != 3 or x.shape[::2] != q.shape:
            raise ValueError(f"reranking takes queries (Q, D) and candidates (Q, M, D), {given}")
        if 0 in x.shape[1:]:
            raise ValueError(f"there are no candidates to rerank: {given}")
        if not (q.is_floating_point() and x.is_floating_point()):
            raise ValueError(f"descriptors must be floating-point, {given} of {q.dtype} and {x.dtype}")
        if q.device != x.device:
            raise ValueError(f"queries and candidates are on different devices, {q.device} and {x.device}")
        dtype = torch.promote_types(torch.promote_types(q.dtype, x.dtype), torch.float32)
        if mask is not None:
            mask = mask.to(x.device)
            if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
                raise ValueError(f"mask must be bool (Q, M), got {mask.dtype} of shape {tuple(mask.shape)}, {given}")
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
        scores: Array | None = None,
    ) -> Reranking:
        """Reranks the first m of each query's results, fetching their descriptors a few queries at a time.

        Args:
            queries: (Q, D), unit descriptors, tensor or NumPy array.
            ids: (Q, R), the results of each query in ranking order; the first m are sorted again. Integers, with
                -1 where a query has no more results, as in FAISS; or any other identifiers (text, UUIDs), as an
                array, or a list of lists of any lengths, with None for no more results.
            fetch: returns the descriptors (n, D) of the ids (n,), from any source: ``Database.rows``, FAISS's
                ``index.reconstruct_batch`` (of an IVF index after ``make_direct_map()``, of an IndexIDMap2), or your
                own function.
                It is called with ids of the given kind (an int64 tensor or array, an array of text, a list),
                never with -1 or None. A descriptor that several queries of a block share is fetched once;
                with integer ids, only if that saves a quarter of them.
            device: where the scores are computed; by default the device of the queries.
            scores: (Q, R), those of the search, descending, with any values for no result, which the results after
                the first m continue; negative distances, if the search has distances. By default, the score of each is
                1 below that of the one before.

        Returns:
            ids and scores (Q, R), order (Q, min(m, R)), as tensors or arrays like the queries, on their device.

        Raises:
            ValueError: as forward, if fetch does not return one descriptor per id, or the scores do not fit.
        """
        q, (numbers, fetch) = as_tensor(queries, "queries"), numbered_ids(ids, fetch)
        new_scores = self._by_blocks(self._checked_scores, q, numbers, fetch, device, self.m)
        numbers = numbers.long().to(q.device)
        before = -torch.arange(numbers.shape[1], device=q.device).expand(numbers.shape)
        if scores is not None:
            before = _descending(as_tensor(scores, "scores"), numbers)
        found = reordered(numbers, before, new_scores)
        names = fetch.names_of(found.order) if isinstance(fetch, _FetchNamed) else None
        found = found._replace(order=found.order[:, : self.m])
        if not isinstance(queries, Tensor):
            found = Reranking(*(each.numpy() for each in found))
        return found if names is None else found._replace(ids=names)

    def similarities(self, queries: Array, rows: Database | Array, device: torch.device | str | None = None) -> Array:
        """Returns a score for each row of a database, higher for better ones. (Q, D), (N, D) -> (Q, N).

        The first m rows by cosine similarity have the reranker's scores. The others are below, in the order of
        their cosine similarities.

        Args:
            queries: unit descriptors, a tensor or a NumPy array.
            rows: those of the database, or a Database.
            device: where the scores are computed; by default the device of the queries.
        """
        q, database = as_tensor(queries, "queries"), rows if isinstance(rows, Database) else Database(rows)
        near = search(q, database, len(database), device=q.device if device is None else device)
        found = self.rerank(q, near.ids, database.rows, device, near.scores)
        matrix = torch.empty_like(found.scores).scatter(1, found.ids, found.scores)
        return matrix if isinstance(queries, Tensor) else matrix.numpy()

    def _by_blocks(
        self,
        work: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        q: Tensor,
        ids: Tensor,
        fetch: Callable,
        device: torch.device | str | None,
        m: int,
    ) -> Tensor:
        """Returns the results of `work(q, x, mask)`, fetching the first m candidates of a few queries at a time.

        The ids are integers (Q, R); fetch is called with tensors. The result has a row per query.
        """
        if not callable(fetch):
            raise ValueError(f"fetch must be a function from ids to rows, like Database(rows).rows, got {type(fetch)}")
        given = f"got queries {tuple(q.shape)} and ids {tuple(ids.shape)} of {ids.dtype}"
        if q.ndim != 2 or ids.ndim != 2 or len(q) != len(ids):
            raise ValueError(f"reranking takes queries (Q, D) and ids (Q, R), {given}")
        if 0 in ids.shape[1:] + q.shape[1:]:
            raise ValueError(f"there are no candidates to rerank: {given}")
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"ids must be integers from 0, or -1 for none, {given}")
        device = q.device if device is None else torch.device(device)
        ids = ids.long()
        lowest = int(ids.min()) if len(ids) else 0  # a single wait for a GPU
        if lowest < -1:
            raise ValueError(f"ids must be integers from 0, or -1 for none, {given}")
        ids = ids[:, :m]
        present = ids >= 0
        mask = None if lowest >= 0 or present.all() else present
        m, d = ids.shape[1], q.shape[1]
        block = max(1, (_GPU_BYTES if device.type == "cuda" else _CPU_BYTES) // (4 * m * max(m, d)))
        block -= block % min(block, torch.get_num_threads())  # so that all threads have equal work
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


def numbered_ids(ids: Any, fetch: Callable) -> tuple[Tensor, Callable]:
    """Returns ids of any kind as an integer tensor (Q, R), -1 for none, and a fetch that accepts such tensors."""
    if hasattr(ids, "ids"):
        raise ValueError(f"ids must be the ids of results, got {type(ids).__name__}; give its attribute ids")
    if isinstance(ids, Tensor) or not callable(fetch):
        return as_tensor(ids, "ids"), fetch
    if getattr(ids, "dtype", None) is not None and ids.dtype.kind in "iufb":
        return as_tensor(ids, "ids"), lambda wanted: fetch(wanted.numpy())
    if getattr(ids, "ndim", 2) != 2 or isinstance(ids, str | bytes):
        raise ValueError(f"ids must be an array (Q, R) or a list of lists, got {type(ids).__name__}")
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
    """Fetches descriptors by number from an external store that identifies them by name, each one once."""

    def __init__(self, fetch: Callable, ids: Any, names: list):
        self.fetch, self.ids, self.names = fetch, ids, names

    def __call__(self, wanted: Tensor) -> Array:
        chosen = [self.names[number] for number in wanted.tolist()]
        if not hasattr(self.ids, "dtype"):
            return self.fetch(chosen)
        array = self.ids.ravel()[: len(chosen)].repeat(1)  # an array of the kind of the ids, without importing NumPy
        array[:] = chosen
        return self.fetch(array)

    def names_of(self, order: Array) -> Any:
        """Returns the ids in a new order, (Q, R); of a list of lists, without what fills up the shorter ones."""
        rows = [
            [row[place] for place in places if place < len(row)]
            for row, places in zip(self.ids, order.tolist(), strict=True)
        ]
        if not hasattr(self.ids, "dtype"):
            return rows
        array = self.ids.copy()
        array[:] = rows
        return array


def _descending(scores: Tensor, ids: Tensor) -> Tensor:
    """Returns the scores of results. Raises a ValueError unless they fit, (Q, R), and descend where there are ids."""
    if scores.shape != ids.shape:
        raise ValueError(f"scores must be (Q, R) like ids, got {tuple(scores.shape)} and {tuple(ids.shape)}")
    present = (ids >= 0).to(scores.device)
    wrong = present[:, 1:] & present[:, :-1] & ~(scores[:, 1:] <= scores[:, :-1])  # NaN is wrong, too
    if values_can_be_seen(scores) and wrong.any():
        query, place = wrong.nonzero()[0].tolist()
        pair = scores[query, place : place + 2]
        values = ", ".join(f"{value:g}" for value in pair.tolist())
        advice = "" if pair.isnan().any() else "; negate distances"
        raise ValueError(f"the scores of a search must descend, got {values} for query {query}{advice}")
    return scores


def _fetched(fetch: Callable, ids: Tensor, there: Tensor | None, dim: int) -> Tensor:
    """Returns the candidates with these ids, zero where a candidate is absent. (Q, M) -> (Q, M, D)."""
    wanted = ids.flatten() if there is None else ids[there]
    named, inverse = wanted.unique(return_inverse=True)
    once = len(named) <= 0.75 * len(wanted) or isinstance(fetch, _FetchNamed)
    asked = named if once else wanted
    try:
        rows = as_tensor(fetch(asked), "the result of fetch")
    except RuntimeError as error:
        if not any(words in str(error) for words in ("direct map", "reconstruct not implemented")):
            raise
        raise ValueError(
            "this FAISS index cannot find rows by id: for an IVF index call faiss.extract_index_ivf(index)"
            ".make_direct_map() once, or with ids of your own .set_direct_map_type(faiss.DirectMap.Hashtable); "
            "in place of IndexIDMap use IndexIDMap2"
        ) from error
    if rows.shape != (len(asked), dim):
        raise ValueError(f"fetch gave shape {tuple(rows.shape)} for {len(asked)} ids; queries have {dim} dimensions")
    rows = rows[inverse.to(rows.device)] if once else rows
    if there is None:
        return rows.view(*ids.shape, dim)
    candidates = rows.new_zeros(*ids.shape, dim)
    candidates[there.to(rows.device)] = rows
    return candidates


def places_after(positions: Tensor, order: Tensor) -> Tensor:
    """Returns the positions after the first len(order) places were reordered; later ones are unchanged.

    Args:
        positions: (L,) places in the previous ranking.
        order: (M,) the previous place of each new place.
    """
    if not len(order):
        return positions
    new_place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    inside = positions < len(order)
    return torch.where(inside, new_place[positions.clamp(max=len(order) - 1)], positions)
