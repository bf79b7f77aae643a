"""Query expansion and database-side augmentation: descriptors are replaced by the mean of their neighbourhood.

Shapes: Q queries, N database descriptors, D dimensions, M candidates per query, n results that expand it,
K descriptors that augment a descriptor.

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

_ROWS = 1024  # descriptors whose neighbours are searched for in one pass over the database
_GATHER_BYTES = 32 << 20  # bytes of neighbours that are summed at a time


def expanded_queries(queries: Tensor, rows: Tensor, alpha: float = QE_ALPHA) -> Tensor:
    """Returns q' = normalise(q + sum over i of max(q . x_i, 0)^alpha x_i). (Q, D), (Q, n, D) -> (Q, D).

    The rows are the first n results of each query; rows of zeros add nothing. With alpha = 0 every result has
    weight 1, regardless of its similarity (average query expansion).
    """
    weights = similarities(queries, rows).relu().pow(alpha)  # relu has gradient 0 at 0 in every version of PyTorch
    return F.normalize(queries + (weights[:, None] @ rows).squeeze(1), dim=-1)


class QueryExpansion(CandidateReranker):
    """Reranks a query's first M results by similarity to the query expanded by the first n (alpha-QE, AQE).

    Score = q' . x with q' as in :func:`expanded_queries`. Equal scores keep their order.

    The authors of query expansion search the whole database again with q'. Reranking puts the M candidates
    into the same order without a second search, but does not find images outside the M candidates, as the
    second search might. :meth:`expand` returns the q' for such a search.

    Chum et al., "Total Recall", ICCV 2007; Radenović et al., "Fine-tuning CNN Image Retrieval with No Human
    Annotation", TPAMI 2018, sec. 3.5.

    Args:
        n: number of results that are added to the query; all if there are fewer.
        alpha: exponent of their similarities; 0 is average query expansion (AQE).
        m: number of candidates that are reranked; later results are ignored.

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
        """Returns the score of each candidate, in the order of the candidates. (Q, D), (Q, M, D) -> (Q, M)."""
        scores = similarities(self._expanded(q, x, mask), x)
        check_finite(scores, q, x)
        return scores

    def _expanded(self, q: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """Returns the queries expanded by their first n present candidates. (Q, D), (Q, M, D), (Q, M) -> (Q, D)."""
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
            queries: (Q, D), unit descriptors, tensor or NumPy array.
            ids: (Q, R), the results of each query in ranking order, of any kind that :meth:`rerank` accepts;
                only the first n present ones are used. A query without results is only normalised.
            fetch: returns the descriptors (n, D) of the ids (n,), as for :meth:`rerank`.
            device: where the expansion is computed; by default the device of the queries.

        Returns:
            (Q, D), unit descriptors, a tensor or array like the queries, on their device; float64 if an input is,
            else float32.

        Raises:
            ValueError: as :meth:`rerank`.
        """
        q, numbers, fetch = as_tensor(queries, "queries"), *numbered_ids(ids, fetch)
        if numbers.ndim == 2:  # present results first, then absent ones
            numbers = numbers.gather(1, (numbers < 0).long().argsort(dim=1, stable=True))
        expanded = self._by_blocks(self._checked_expansion, q, numbers, fetch, device, self.n)
        return expanded if isinstance(queries, Tensor) else expanded.numpy()

    def _checked_expansion(self, q: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """Checks the input and returns the expanded queries. (Q, D), (Q, n, D), (Q, n) -> (Q, D)."""
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
    """Replaces each descriptor by the mean of its neighbourhood: normalise(sum over r of w_r x_r). (N, D) -> (N, D).

    The neighbourhood is the descriptor itself, r = 0, and its k - 1 nearest ones in order of similarity, r = 1
    to k - 1; equal similarities are ordered by row number. The weights are (k - r) / k, or
    max(x . x_r, 0)^alpha if alpha is given. Rows of zeros, such as those of skipped images, stay zero. Queries are
    used as they are, or expanded by augmented descriptors.

    Arandjelović and Zisserman, "Three things everyone should know to improve object retrieval", CVPR 2012,
    sec. 3.3; the linear weights are from Gordo et al., "End-to-end Learning of Deep Visual Representations for
    Image Retrieval", IJCV 2017.

    Args:
        database: (N, D), unit descriptors; a ``Database(parts)`` if they are in several parts, or on disk.
        k: number of descriptors in a neighbourhood, itself included; all if the database is smaller.
        alpha: exponent of the similarities that are the weights; by default the weights are linear.
        out: (N, D), the tensor for the result, for example a memory-mapped one; by default a new float32 tensor.
            It must not share memory with the database.
        device: where the means are computed.
        on_rows: called with the number of descriptors after each block, for a progress bar.

    Every descriptor is compared with all N, a thousand at a time, in N^2 D multiplications altogether; apart
    from `out`, the memory does not grow with N.

    Raises:
        ValueError: if k or alpha is invalid, `out` does not fit or shares memory with the database, or a
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
            total = total.masked_fill(~rows[:, 0].any(dim=1, keepdim=True), 0)
            out[own.to(out.device)] = F.normalize(total, dim=-1).to(out.device, out.dtype)
        if on_rows is not None:
            on_rows(len(numbers))
    return out


def _itself_first(numbers: Tensor, found: Tensor) -> Tensor:
    """Moves the number of each row to the front of its own results. (B,), (B, K) -> (B, K).

    Equal rows with lower numbers precede a row in its own results, and may push it out of them.
    """
    others = found.gather(1, (found == numbers[:, None]).long().argsort(dim=1, stable=True))
    return torch.cat([numbers[:, None], others[:, :-1]], dim=1)


def _check_out(out: Tensor, database: Database) -> None:
    shape = (len(database), database.dim)
    if not isinstance(out, Tensor) or out.shape != shape or not out.is_floating_point():
        what = f"{out.dtype} of shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"out must be a floating-point tensor of shape {shape}, got {what}")
    own = {part.untyped_storage().data_ptr() for part in database.parts}
    if len(database) and out.untyped_storage().data_ptr() in own:
        raise ValueError(f"out of shape {shape} shares memory with the database, whose rows are still to be read")
