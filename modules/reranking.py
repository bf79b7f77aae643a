"""SuperGlobal reranking: the order of a query's first results, made better by their own descriptors.

Shapes: Q queries, M candidates per query in ranking order, D dimensions, K neighbours. The
candidates come from anywhere (a database, an index, a vector store): only their rows are needed.

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
REFINED_OR_ORIGINAL = ("refined", "original")  # the candidates' rows that S2 takes


def neighbour_weights(candidates: Tensor, k: int, beta: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The sparse rows of W: each candidate's K + 1 most similar candidates and their shares.

    (Q, M, D) -> neighbours (Q, M, K+1) int64, weights (Q, M, K+1) that sum to 1. The first
    neighbour is the candidate itself with weight 1, the others have beta * (x_i . x_j), before the
    division by the sum. Where M < K + 1 all M are taken. With a mask (Q, M), candidates where it
    is False are nobody's neighbours.
    """
    gram = gram_matrices(candidates)
    if mask is not None:
        gram.masked_fill_(~mask[:, None], -torch.inf)
    # A candidate is its own first neighbour by rule, not by rounding: a zero row, say, would
    # otherwise tie with all and might take the place of another.
    gram.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    similarity, neighbours = largest(gram, min(k + 1, gram.shape[-1]))
    weights = similarity * beta
    weights[..., 0] = 1
    if mask is not None:
        weights = weights.masked_fill(similarity == -torch.inf, 0)
    return neighbours, weights / weights.sum(dim=-1, keepdim=True)


def refined_scores(query: Tensor, candidates: Tensor, neighbours: Tensor, weights: Tensor) -> Tensor:
    """q . x'_i for the refined candidates x' = W X, as W (X q). (Q, D), (Q, M, D) -> (Q, M)."""
    near = similarities(query, candidates).gather(1, neighbours.flatten(1)).view_as(weights)
    return (weights * near).sum(dim=-1)


def expanded_query(candidates: Tensor, neighbours: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Elementwise maximum of the refined rows of the chosen candidates. chosen (Q, C) int64 -> (Q, D)."""
    q = torch.arange(len(chosen), device=chosen.device)[:, None]
    rows = candidates[q[..., None], neighbours[q, chosen]]  # (Q, C, K+1, D)
    return (weights[q, chosen].unsqueeze(2) @ rows).squeeze(2).amax(dim=1)


class SuperGlobalScores(NamedTuple):
    """The two similarities of each candidate, and what they were computed from."""

    s1: Tensor  # (Q, M), -inf for a candidate that is not there
    s2: Tensor  # (Q, M)
    neighbours: Tensor  # (Q, M, K+1) int64, see neighbour_weights
    weights: Tensor  # (Q, M, K+1)
    chosen: Tensor  # (Q, min(K+1, M)) int64: the candidates whose refined rows make the expanded query
    expanded: Tensor  # (Q, D)


def superglobal_scores(
    q: Tensor, x: Tensor, k: int, beta: float, s2: str = "refined", mask: Tensor | None = None
) -> SuperGlobalScores:
    """S1 and S2 of each candidate, see :class:`SuperGlobalReranker`. (Q, D), (Q, M, D), (Q, M) -> (Q, M).

    Where a mask leaves fewer than K + 1 candidates, the first of the chosen stands there several times.
    """
    neighbours, weights = neighbour_weights(x, k, beta, mask)
    s1 = refined_scores(q, x, neighbours, weights)
    check_finite(s1, q, x)
    if mask is not None:
        s1 = s1.masked_fill(~mask, -torch.inf)
    chosen = s1.argsort(dim=1, descending=True, stable=True)[:, : k + 1]
    if mask is not None:  # once more the best one, instead of one that is not there, leaves the maximum as it is
        chosen = torch.where(mask.gather(1, chosen), chosen, chosen[:, :1])
    expanded = expanded_query(x, neighbours, weights, chosen)
    second = similarities(expanded, x) if s2 == "original" else refined_scores(expanded, x, neighbours, weights)
    return SuperGlobalScores(s1, second, neighbours, weights, chosen, expanded)


class SuperGlobalReranker(CandidateReranker):
    """Reranks a query's first M results with descriptors alone.

    With X the candidates in ranking order, W their neighbour weights (:func:`neighbour_weights`)
    and x' = W X: S1 = x' . q; e = the elementwise maximum of the x' of the first K + 1 in S1 order;
    S2 = x' . e; the new order is by (S1 + S2) / 2. Equal scores keep their order.

    Shao et al., "Global Features are All You Need for Image Retrieval and Reranking", ICCV 2023, sec. 4.

    Args:
        m: candidates that are reranked; results after the first m are not looked at.
        k: neighbours of a candidate.
        beta: weight of the neighbours, each times its cosine similarity.
        s2: "refined" or "original". The paper's text compares the expanded query e with the candidates'
            own rows, S2 = x . e; the paper's released code compares it with the refined ones,
            S2 = x' . e, as above.

    Shape:
        - queries (Q, D), candidates (Q, M', D), mask (Q, M')
        - order and scores (Q, M), where M = min(m, M')

    It has no state. It works on the tensors' own device, in float32, or in float64 where an input is;
    the scores have gradients, the order has none.

    >>> import torch
    >>> SuperGlobalReranker(m=4, k=2)(torch.eye(8)[:1], torch.eye(8)[None, :4]).order
    tensor([[0, 1, 2, 3]])
    """

    def __init__(self, m: int = RERANK_M, k: int = RERANK_K, beta: float = RERANK_BETA, s2: str = "refined"):
        try:
            m, k, beta = operator.index(m), operator.index(k), float(beta)
        except (TypeError, ValueError):
            raise ValueError(f"m and k are whole numbers, beta a number, got {m!r}, {k!r}, {beta!r}") from None
        if not 1 <= k <= m:
            raise ValueError(f"reranking needs 1 <= k <= m, got k = {k}, m = {m}")
        if not 0 <= beta < float("inf"):
            raise ValueError(f"beta must not be negative, and finite, got {beta}")
        if s2 not in REFINED_OR_ORIGINAL:
            raise ValueError(f"s2 is one of {', '.join(REFINED_OR_ORIGINAL)}, got {s2!r}")
        super().__init__(m)
        self.k, self.beta, self.s2 = k, beta, s2

    def _scores(self, q: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """The score of each candidate, in the candidates' order. (Q, D), (Q, M, D) -> (Q, M)."""
        scores = superglobal_scores(q, x, self.k, self.beta, self.s2, mask)
        return (scores.s1 + scores.s2) / 2

    def extra_repr(self) -> str:
        s2 = "" if self.s2 == "refined" else f", s2={self.s2}"
        return f"m={self.m}, k={self.k}, beta={self.beta}{s2}"
