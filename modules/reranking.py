"""SuperGlobal reranking: a better order of a query's first results, computed from their descriptors alone.

Shapes: Q queries, M candidates per query in ranking order, D dimensions, K neighbours. The
candidates may come from any database, index or vector store: only their descriptors are needed.

Shao et al., "Global Features are All You Need for Image Retrieval and Reranking", ICCV 2023, sec. 4.
"""

import operator
from typing import NamedTuple

import torch
from torch import Tensor

from .candidates import RERANK_M, CandidateReranker, Found, Reranker, Reranking, check_finite
from .neighbours import gram_matrices, largest, similarities

__all__ = [
    "RERANK_BETA",
    "RERANK_K",
    "RERANK_M",
    "Found",
    "Reranker",
    "Reranking",
    "SuperGlobalReranker",
    "SuperGlobalScores",
    "expanded_query",
    "gram_matrices",
    "largest",
    "neighbour_weights",
    "refined_scores",
    "superglobal_scores",
]

RERANK_K = 9
RERANK_BETA = 0.15
REFINED_OR_ORIGINAL = ("refined", "original")  # which descriptors of the candidates S2 uses


def neighbour_weights(candidates: Tensor, k: int, beta: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns the sparse rows of W: the K + 1 most similar candidates of each candidate, and their weights.

    (Q, M, D) -> neighbours (Q, M, K+1) int64, weights (Q, M, K+1) that sum to 1. Before the division by
    the sum, the first neighbour, which is the candidate itself, has weight 1 and the others have
    beta * (x_i . x_j), or, if these weights would not sum to more than 0, beta * max(x_i . x_j, 0). If
    M < K + 1, all M are taken. Candidates for which the mask (Q, M) is False are no candidate's neighbours.
    """
    gram = gram_matrices(candidates)
    if mask is not None:
        gram.masked_fill_(~mask[:, None], -torch.inf)
    # A candidate is made its own first neighbour explicitly: a zero descriptor, for example, would
    # otherwise tie with all candidates and might not be among its own neighbours.
    gram.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    similarity, neighbours = largest(gram, min(k + 1, gram.shape[-1]))
    weights = similarity * beta
    weights[..., 0] = 1
    if mask is not None:
        weights = weights.masked_fill(similarity == -torch.inf, 0)
    # Dividing by a sum below 0 would reverse the order.
    weights = torch.where(weights.sum(dim=-1, keepdim=True) > 0, weights, weights.clamp(min=0))
    return neighbours, weights / weights.sum(dim=-1, keepdim=True)


def refined_scores(query: Tensor, candidates: Tensor, neighbours: Tensor, weights: Tensor) -> Tensor:
    """Returns q . x'_i for the refined candidates x' = W X, computed as W (X q). (Q, D), (Q, M, D) -> (Q, M)."""
    near = similarities(query, candidates).gather(1, neighbours.flatten(1)).view_as(weights)
    return (weights * near).sum(dim=-1)


def expanded_query(candidates: Tensor, neighbours: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Returns the elementwise maximum of the chosen candidates' refined descriptors. chosen (Q, C) int64 -> (Q, D)."""
    q = torch.arange(len(chosen), device=chosen.device)[:, None]
    rows = candidates[q[..., None], neighbours[q, chosen]]  # (Q, C, K+1, D)
    return (weights[q, chosen].unsqueeze(2) @ rows).squeeze(2).amax(dim=1)


class SuperGlobalScores(NamedTuple):
    """The two similarities of each candidate, and the intermediate results of their computation."""

    s1: Tensor  # (Q, M), -inf for an absent candidate
    s2: Tensor  # (Q, M)
    neighbours: Tensor  # (Q, M, K+1) int64, see neighbour_weights
    weights: Tensor  # (Q, M, K+1)
    chosen: Tensor  # (Q, min(K+1, M)) int64: the candidates whose refined descriptors form the expanded query
    expanded: Tensor  # (Q, D)


def superglobal_scores(
    q: Tensor, x: Tensor, k: int, beta: float, s2: str = "refined", mask: Tensor | None = None
) -> SuperGlobalScores:
    """Returns S1 and S2 of each candidate, see :class:`SuperGlobalReranker`. (Q, D), (Q, M, D), (Q, M) -> (Q, M).

    If a mask leaves fewer than K + 1 candidates, the first of the chosen is repeated.
    """
    neighbours, weights = neighbour_weights(x, k, beta, mask)
    s1 = refined_scores(q, x, neighbours, weights)
    check_finite(s1, q, x)
    if mask is not None:
        s1 = s1.masked_fill(~mask, -torch.inf)
    chosen = s1.argsort(dim=1, descending=True, stable=True)[:, : k + 1]
    if mask is not None:  # repeating the best one in place of absent candidates does not change the maximum
        chosen = torch.where(mask.gather(1, chosen), chosen, chosen[:, :1])
    expanded = expanded_query(x, neighbours, weights, chosen)
    second = similarities(expanded, x) if s2 == "original" else refined_scores(expanded, x, neighbours, weights)
    return SuperGlobalScores(s1, second, neighbours, weights, chosen, expanded)


class SuperGlobalReranker(CandidateReranker):
    """Reranks a query's first M results with descriptors alone.

    With X the candidates in ranking order, W their neighbour weights (:func:`neighbour_weights`)
    and x' = W X: S1 = x' . q; e = the elementwise maximum of the x' of the first K + 1 in S1 order;
    S2 = x' . e. The candidates are sorted by (S1 + S2) / 2. Equal scores keep their order.

    Shao et al., "Global Features are All You Need for Image Retrieval and Reranking", ICCV 2023, sec. 4.

    Args:
        m: number of candidates that are reranked; later results are ignored.
        k: number of neighbours of a candidate.
        beta: weight of the neighbours, each multiplied by its cosine similarity.
        s2: "refined" or "original". The paper's text compares the expanded query e with the candidates'
            own descriptors, S2 = x . e; the paper's released code compares it with the refined ones,
            S2 = x' . e, as above.

    Shape:
        - queries (Q, D), candidates (Q, M', D), mask (Q, M')
        - order and scores (Q, M), where M = min(m, M')

    The module has no state. It computes on the device of the tensors, in float64 if an input is, else in
    float32. The scores have gradients, the order has none.

    >>> import torch
    >>> SuperGlobalReranker(m=4, k=2)(torch.eye(8)[:1], torch.eye(8)[None, :4]).order
    tensor([[0, 1, 2, 3]])
    """

    def __init__(self, m: int = RERANK_M, k: int = RERANK_K, beta: float = RERANK_BETA, s2: str = "refined"):
        try:
            m, k, beta = operator.index(m), operator.index(k), float(beta)
        except (TypeError, ValueError):
            raise ValueError(f"m and k must be whole numbers and beta a number, got {m!r}, {k!r}, {beta!r}") from None
        if not 1 <= k <= m:
            raise ValueError(f"reranking needs 1 <= k <= m, got k = {k}, m = {m}")
        if not 0 <= beta < float("inf"):
            raise ValueError(f"beta must be finite and not negative, got {beta}")
        if s2 not in REFINED_OR_ORIGINAL:
            raise ValueError(f"s2 must be one of {', '.join(REFINED_OR_ORIGINAL)}, got {s2!r}")
        super().__init__(m)
        self.k, self.beta, self.s2 = k, beta, s2

    def _scores(self, q: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """Returns the score of each candidate, in the order of the candidates. (Q, D), (Q, M, D) -> (Q, M)."""
        scores = superglobal_scores(q, x, self.k, self.beta, self.s2, mask)
        return (scores.s1 + scores.s2) / 2

    def extra_repr(self) -> str:
        s2 = "" if self.s2 == "refined" else f", s2={self.s2}"
        return f"m={self.m}, k={self.k}, beta={self.beta}{s2}"
