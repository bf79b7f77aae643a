"""Query expansion and database-side augmentation: descriptors replaced by means of their neighbourhood.

Shapes: Q queries, N database rows, D dimensions, M candidates per query, n results that expand it,
K rows that augment a row.

Chum et al., "Total Recall", ICCV 2007 (AQE); Radenović et al., "Fine-tuning CNN Image Retrieval with
No Human Annotation", TPAMI 2018, sec. 3.5 (alpha-QE); Arandjelović and Zisserman, "Three things everyone
should know to improve object retrieval", CVPR 2012, sec. 3.3 (DBA).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .candidates import RERANK_M, CandidateReranker, check_finite, numbered_ids
from .checks import Array, as_tensor, real_number, whole_number
from .neighbours import similarities
from .search import Database, search

QE_N = 10
QE_ALPHA = 3.0
DBA_K = 10

_ROWS = 1024  # rows whose neighbours are searched for in one pass over the database
_GATHER_BYTES = 32 << 20  # neighbours of rows that are summed at a time


def expanded_queries(queries: Tensor, rows: Tensor, alpha: float = QE_ALPHA) -> Tensor:
    """q' = normalise(q + sum over i of max(q . x_i, 0)^alpha x_i). (Q, D), (Q, n, D) -> (Q, D).

    The rows are each query's first n results; rows of zeros add nothing. With alpha = 0 every result has
    weight 1, whatever its similarity (average query expansion).
    """
    weights = similarities(queries, rows).relu().pow(alpha)  # relu: at 0 its gradient is 0 in every version of PyTorch
    return F.normalize(queries + (weights[:, None] @ rows).squeeze(1), dim=-1)


class QueryExpansion(CandidateReranker):
    """Scores a query's first M results with the query expanded by the first n (alpha-QE, AQE).

    Score = q' . x with q' as in :func:`expanded_queries`. Equal scores keep their order.

    As its authors use it, query expansion searches the whole database again with q'. Reranking gives the
    same order of the M candidates, without a second search; but a row that is not one of them stays out,
    which the second search might have found. :meth:`expand` gives the q' for such a search.

    Chum et al., "Total Recall", ICCV 2007; Radenović et al., "Fine-tuning CNN Image Retrieval with No Human
    Annotation", TPAMI 2018, sec. 3.5.

    Args:
        n: results that are added to the query; all where there are fewer.
        alpha: exponent of their similarities. 0 is average query expansion (AQE).
        m: candidates that are reranked; results after the first m are not looked at.

    Shape:
        - queries (Q, D), candidates (Q, M', D), mask (Q, M')
        - order and scores (Q, M), where M = min(m, M')

    >>> import torch
    >>> QueryExpansion(n=2, m=4)(torch.eye(8)[:1], torch.eye(8)[None, :4]).order
    tensor([[0, 1, 2, 3]])
    """

    def __init__(self, n: int = QE_N, alpha: float = QE_ALPHA, m: int = RERANK_M):
        super().__init__(m)
        self.n, self.alpha = whole_number(n, "n"), real_number(alpha, "alpha")
        if self.n > self.m:
            raise ValueError(f"query expansion needs n <= m, got n = {self.n}, m = {self.m}")

    def _scores(self, q: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """The score of each candidate, in the candidates' order. (Q, D), (Q, M, D) -> (Q, M)."""
        scores = similarities(self._expanded(q, x, mask), x)
        check_finite(scores, q, x)
        return scores

    def _expanded(self, q: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """The query expanded by the first n candidates that are there. (Q, D), (Q, M, D), (Q, M) -> (Q, D)."""
        first = x[:, : self.n]
        if mask is not None:
            places = (~mask).long().argsort(dim=1, stable=True)[:, : self.n]
            first = x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))
        return expanded_queries(q, first, self.alpha)

    def expand(
        self,
        queries: Array,
        ids: Array,
        fetch: Callable[[Array], Array],
        device: torch.device | str | None = None,
    ) -> Array:
        """Returns the expanded queries (Q, D), for a second search.

        Args:
            queries: (Q, D), unit rows, tensor or NumPy array.
            ids: (Q, R), each query's results in ranking order, of any kind that :meth:`rerank` takes; only
                the first n that are there are used. A query without results is only normalised.
            fetch: gives the descriptors (n, D) of the ids (n,), as for :meth:`rerank`.
            device: where the work is done; by default the queries' own.

        Returns:
            (Q, D), unit rows of the queries' kind, on their device, in float32, or in float64 where an input is.

        Raises:
            ValueError: as :meth:`rerank`.
        """
        q, numbers, fetch = as_tensor(queries, "queries"), *numbered_ids(ids, fetch)
        if numbers.ndim == 2:  # results that are there before those that are not
            numbers = numbers.gather(1, (numbers < 0).long().argsort(dim=1, stable=True))
        expanded = self._by_blocks(self._checked_expansion, q, numbers, fetch, device, self.n)
        return expanded if isinstance(queries, Tensor) else expanded.numpy()

    def _checked_expansion(self, q: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """The expanded queries, of any input that is valid. (Q, D), (Q, n, D), (Q, n) -> (Q, D)."""
        q, x, mask = self.checked(q, x, mask)
        expanded = self._expanded(q, x, mask)
        check_finite(expanded, q, x)
        return expanded

    def extra_repr(self) -> str:
        return f"n={self.n}, alpha={self.alpha}, m={self.m}"


def augmented_rows(
    database: Database | Tensor,
    k: int = DBA_K,
    alpha: float | None = None,
    out: Tensor | None = None,
    device: torch.device | str = "cpu",
    on_rows: Callable[[int], None] | None = None,
) -> Tensor:
    """Returns each row replaced by the mean of its neighbourhood: normalise(sum over r of w_r x_r). (N, D) -> (N, D).

    The neighbourhood is the row itself, r = 0, and its k - 1 nearest rows in order of similarity, r = 1
    to k - 1; equal similarities by row number. The weights are (k - r) / k, or max(x . x_r, 0)^alpha where
    alpha is given. Queries are left as they are, or expanded by the augmented rows.

    Arandjelović and Zisserman, "Three things everyone should know to improve object retrieval", CVPR 2012,
    sec. 3.3; the linear weights are of Gordo et al., "End-to-end Learning of Deep Visual Representations for
    Image Retrieval", IJCV 2017.

    Args:
        database: N rows of D, unit rows; ``Database(parts)`` where they are in several parts, or on disk.
        k: rows that make up a new row, itself included; all where the database is smaller.
        alpha: exponent of the similarities that weigh the rows; by default the weights are linear.
        out: (N, D), where the new rows are written, a memory-mapped tensor say; by default a new float32 tensor.
            It must not be the database's own memory.
        device: where the work is done.
        on_rows: called with the number of new rows as they are made, for a progress bar.

    Every row is searched for among all N, a thousand at a time, in N^2 D multiplications altogether; beside
    `out` the memory does not grow with N.

    Raises:
        ValueError: if k or alpha is invalid, `out` does not fit or is the database's own memory, or a
            similarity is not finite.

    >>> import torch
    >>> augmented_rows(torch.eye(2), k=2)
    tensor([[0.8944, 0.4472],
            [0.4472, 0.8944]])
    """
    database = database if isinstance(database, Database) else Database(database)
    k, size = whole_number(k, "k"), len(database)
    alpha = None if alpha is None else real_number(alpha, "alpha")
    out = torch.empty(size, database.dim) if out is None else out
    _check_out(out, database)
    block = max(1, _GATHER_BYTES // (4 * max(1, min(k, size) * database.dim)))
    for numbers in torch.arange(size).split(_ROWS) if size else ():
        found = search(database.rows(numbers), database, m=k, device=device).ids
        near = _itself_first(numbers, found)
        for own, few in zip(numbers.split(block), near.split(block), strict=True):
            rows = database.rows(few).to(device)  # (B, K, D)
            if alpha is None:
                weights = (k - torch.arange(few.shape[1], device=rows.device)) / k
                total = weights @ rows
            else:
                weights = similarities(rows[:, 0], rows).relu().pow(alpha)
                total = (weights[:, None] @ rows).squeeze(1)
            out[own.to(out.device)] = F.normalize(total, dim=-1).to(out.device, out.dtype)
        if on_rows is not None:
            on_rows(len(numbers))
    return out


def _itself_first(numbers: Tensor, found: Tensor) -> Tensor:
    """Each row's number before those found for it. (B,), (B, K) -> (B, K).

    Equal rows with lower numbers stand before a row in its own results, and may leave it no place.
    """
    others = found.gather(1, (found == numbers[:, None]).long().argsort(dim=1, stable=True))
    return torch.cat([numbers[:, None], others[:, :-1]], dim=1)


def _check_out(out: Tensor, database: Database) -> None:
    shape = (len(database), database.dim)
    if not isinstance(out, Tensor) or out.shape != shape or not out.is_floating_point():
        what = f"{out.dtype} of shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"out must be a floating tensor of shape {shape}, got {what}")
    own = {part.untyped_storage().data_ptr() for part in database.parts if isinstance(part, Tensor)}
    if len(database) and out.untyped_storage().data_ptr() in own:
        raise ValueError(f"out of shape {shape} is the database's own memory, got rows that are still to be read")
