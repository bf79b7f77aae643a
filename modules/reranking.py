"""SuperGlobal reranking: the order of a query's first results, made better by their own descriptors.

Shapes: Q queries, M candidates per query in ranking order, D dimensions, K neighbours. The
candidates come from anywhere (a database, an index, a vector store): only their rows are needed.

Shao et al., "Global Features are All You Need for Image Retrieval and Reranking", ICCV 2023, sec. 4.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RERANK_M = 400
RERANK_K = 9
RERANK_BETA = 0.15

# Candidates' rows at a time: on a CPU what its caches hold, on a GPU what keeps it busy.
_CPU_BYTES, _GPU_BYTES = 16 << 20, 1 << 30
# Rows of a Gram matrix at a time, and columns in which the largest of a row are looked for; measured
# best for 400 candidates.
_STRIP, _COLUMNS = 128, 40


class Reranking(NamedTuple):
    order: Tensor  # (Q, M) int64: the old place, within the candidates, of each new place
    scores: Tensor  # (Q, M): score of each new place, descending


def gram_matrices(candidates: Tensor) -> Tensor:
    """X X^T of each query, in strips up to the diagonal, mirrored. (Q, M, D) -> (Q, M, M)."""
    m = candidates.shape[1]
    gram = candidates.new_empty(len(candidates), m, m)
    for start in range(0, m, _STRIP):
        stop = min(start + _STRIP, m)
        strip = candidates[:, start:stop] @ candidates[:, :stop].transpose(1, 2)
        gram[:, start:stop, :stop] = strip
        gram[:, :start, start:stop] = strip[:, :, :start].transpose(1, 2)
    return gram


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x.topk(k) over the last axis, in less time where k is small.

    The row is laid out in columns. The k largest lie in the k columns with the largest maxima, and
    only these are looked through. (..., M) -> values and indices (..., k), descending.
    """
    size = x.shape[-1]
    if k > _COLUMNS or size < 2 * _COLUMNS:
        return x.topk(k, dim=-1)
    table = F.pad(x, (0, -size % _COLUMNS), value=-torch.inf).unflatten(-1, (-1, _COLUMNS))
    columns = table.amax(dim=-2).topk(k, dim=-1, sorted=False).indices  # (..., k)
    few = table.gather(-1, columns.unsqueeze(-2).expand(*table.shape[:-1], k)).flatten(-2)
    values, places = few.topk(k, dim=-1)
    return values, columns.gather(-1, places % k) + places // k * _COLUMNS


def neighbour_weights(candidates: Tensor, k: int, beta: float) -> tuple[Tensor, Tensor]:
    """The sparse rows of W: each candidate's K + 1 most similar candidates and their shares.

    (Q, M, D) -> neighbours (Q, M, K+1) int64, weights (Q, M, K+1) that sum to 1. The first
    neighbour is the candidate itself with weight 1, the others have beta * (x_i . x_j), before the
    division by the sum. Where M < K + 1 all M are taken.
    """
    gram = gram_matrices(candidates)
    # A candidate is its own first neighbour by rule, not by rounding: a zero row, say, would
    # otherwise tie with all and might take the place of another.
    gram.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    similarity, neighbours = largest(gram, min(k + 1, gram.shape[-1]))
    weights = similarity * beta
    weights[..., 0] = 1
    return neighbours, weights / weights.sum(dim=-1, keepdim=True)


def refined_scores(query: Tensor, candidates: Tensor, neighbours: Tensor, weights: Tensor) -> Tensor:
    """q . x'_i for the refined candidates x' = W X, as W (X q). (Q, D), (Q, M, D) -> (Q, M)."""
    similarity = (query[:, None] @ candidates.transpose(1, 2)).squeeze(1)
    near = similarity.gather(1, neighbours.flatten(1)).view_as(weights)
    return (weights * near).sum(dim=-1)


def expanded_query(candidates: Tensor, neighbours: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Elementwise maximum of the refined rows of the chosen candidates. chosen (Q, C) int64 -> (Q, D)."""
    q = torch.arange(len(chosen), device=chosen.device)[:, None]
    rows = candidates[q[..., None], neighbours[q, chosen]]  # (Q, C, K+1, D)
    return (weights[q, chosen].unsqueeze(2) @ rows).squeeze(2).amax(dim=1)


class SuperGlobalReranker(nn.Module):
    """Reranks a query's first M results with descriptors alone.

    With X the candidates in ranking order, W their neighbour weights (:func:`neighbour_weights`)
    and x' = W X: S1 = x' . q; e = the elementwise maximum of the x' of the first K + 1 in S1 order;
    S2 = x' . e; the new order is by (S1 + S2) / 2. Equal scores keep their order.

    Args:
        m: candidates that are reranked; results after the first m keep their place.
        k: neighbours of a candidate.
        beta: weight of the neighbours, each times its cosine similarity.

    >>> import torch
    >>> SuperGlobalReranker(m=4, k=2)(torch.eye(8)[:1], torch.eye(8)[None, :4]).order
    tensor([[0, 1, 2, 3]])
    """

    def __init__(self, m: int = RERANK_M, k: int = RERANK_K, beta: float = RERANK_BETA):
        super().__init__()
        if not 1 <= k <= m:
            raise ValueError(f"reranking needs 1 <= k <= m, got k = {k}, m = {m}")
        if not beta >= 0:
            raise ValueError(f"beta must not be negative, got {beta}")
        self.m, self.k, self.beta = m, k, beta

    def forward(self, queries: Tensor, candidates: Tensor) -> Reranking:
        """queries (Q, D), candidates (Q, M, D), each query's own in ranking order, all unit rows."""
        if queries.ndim != 2 or candidates.ndim != 3 or candidates.shape[::2] != queries.shape:
            raise ValueError(
                "reranking takes queries (Q, D) and candidates (Q, M, D), "
                f"got {tuple(queries.shape)} and {tuple(candidates.shape)}"
            )
        neighbours, weights = neighbour_weights(candidates, self.k, self.beta)
        s1 = refined_scores(queries, candidates, neighbours, weights)
        first = s1.argsort(dim=1, descending=True, stable=True)[:, : self.k + 1]
        expanded = expanded_query(candidates, neighbours, weights, first)
        s2 = refined_scores(expanded, candidates, neighbours, weights)
        scores, order = ((s1 + s2) / 2).sort(dim=1, descending=True, stable=True)
        return Reranking(order, scores)

    def rerank(
        self,
        queries: Tensor,
        ids: Tensor,
        fetch: Callable[[Tensor], Tensor],
        device: torch.device | str = "cpu",
    ) -> Reranking:
        """Reranks the first m of each query's results, fetching their descriptors a few queries at a time.

        Args:
            queries: (Q, D), unit rows.
            ids: (Q, R) int64, each query's results in ranking order; only the first m are used.
            fetch: gives the descriptors (..., D) of the ids (...), as ``Database.rows`` does.
            device: where the work is done.

        Returns:
            order and scores of shape (Q, min(m, R)), on the CPU.
        """
        if not callable(fetch):
            raise ValueError(f"fetch is a function from ids to rows, Database(rows).rows, say; got {type(fetch)}")
        ids = ids[:, : self.m]
        m, d = ids.shape[1], queries.shape[1]
        limit = _GPU_BYTES if torch.device(device).type == "cuda" else _CPU_BYTES
        block = max(1, limit // (4 * m * max(m, d)))
        block -= block % min(block, torch.get_num_threads())  # so that all threads have as many to do
        done = [
            self(
                queries[start : start + block].to(device, torch.float32),
                fetch(ids[start : start + block]).to(device, torch.float32),
            )
            for start in range(0, len(queries), block)
        ]
        return Reranking(*(torch.cat(column).cpu() for column in zip(*done, strict=True)))

    def extra_repr(self) -> str:
        return f"m={self.m}, k={self.k}, beta={self.beta}"
