"""Diffusion: similarity to the query spreads over the graph of mutual neighbours among the candidates.

Shapes: Q queries, M candidates per query, D dimensions.

Iscen et al., "Efficient Diffusion on Region Manifolds: Recovering Small Objects with Compact CNN
Representations", CVPR 2017.
"""

import torch
from torch import Tensor

from .candidates import RERANK_M, CandidateReranker, check_finite
from .checks import real_number, whole_number
from .neighbours import gram_matrices, membership, nearest, similarities

K = 50
KQ = 10
GAMMA = 3.0
ALPHA = 0.99


def mutual_affinities(gram: Tensor, k: int, gamma: float) -> Tensor:
    """Returns A_ij = max(x_i . x_j, 0)^gamma if i and j are mutual k-nearest neighbours, else 0. (Q, M, M), same shape.

    No candidate is its own neighbour, so that the diagonal is zero. Absent candidates have rows of zeros: they
    never displace a neighbour whose affinity is above 0.
    """
    itself = torch.eye(gram.shape[1], dtype=torch.bool, device=gram.device)
    similarity = gram.masked_fill(itself, -torch.inf)
    near = membership(similarity, nearest(similarity, k))
    return gram.relu().pow(gamma).masked_fill(~(near & near.transpose(1, 2)), 0)


def normalized_affinities(affinities: Tensor) -> Tensor:
    """Returns S = D^(-1/2) A D^(-1/2), D the row sums of A; zero rows stay zero. (Q, M, M) -> (Q, M, M)."""
    degree = affinities.sum(dim=2)
    scale = degree.rsqrt().masked_fill(degree == 0, 0)
    return affinities * scale[:, :, None] * scale[:, None]


def diffused(s: Tensor, y: Tensor, alpha: float) -> Tensor:
    """Solves (I - alpha S) f = y for f. (Q, M, M), (Q, M) -> (Q, M)."""
    identity = torch.eye(s.shape[1], dtype=s.dtype, device=s.device)
    return torch.linalg.solve_ex(identity - alpha * s, y[..., None]).result.squeeze(2)


class DiffusionReranker(CandidateReranker):
    """Reranks a query's first M results by diffusion on their graph.

    With A the mutual affinities of the candidates (:func:`mutual_affinities`), S = D^(-1/2) A D^(-1/2) and
    y_i = max(q . x_i, 0)^gamma for the first kq candidates, 0 for the others, the scores f solve

        (I - alpha S) f = y.

    Equal scores keep their order: all candidates without a path to the first kq have score 0. Among equally
    near candidates, the one with the lower place is the neighbour.

    The authors diffuse over the graph of the whole database, or of its first results if it is large; this is
    the latter, with descriptors of whole images.

    Iscen et al., "Efficient Diffusion on Region Manifolds: Recovering Small Objects with Compact CNN
    Representations", CVPR 2017, sec. 3 and 4.

    Args:
        m: number of candidates that are reranked; later results are ignored.
        k: number of neighbours of a candidate, not counting itself; all if there are fewer.
        kq: number of first candidates from which the similarity to the query spreads.
        gamma: exponent of the similarities, above 0.
        alpha: share of a score that comes from the neighbours, from 0 to below 1.

    Shape:
        - queries (Q, D), candidates (Q, M', D), mask (Q, M')
        - order and scores (Q, M), where M = min(m, M')

    It keeps a few M x M matrices per query in memory.

    >>> import torch
    >>> DiffusionReranker(m=4, k=2)(torch.eye(8)[:1], torch.eye(8)[None, :4]).order
    tensor([[0, 1, 2, 3]])
    """

    def __init__(self, m: int = RERANK_M, k: int = K, kq: int = KQ, gamma: float = GAMMA, alpha: float = ALPHA):
        super().__init__(m)
        self.k, self.kq = whole_number(k, "k"), whole_number(kq, "kq")
        self.gamma, self.alpha = real_number(gamma, "gamma"), real_number(alpha, "alpha")
        if self.gamma == 0:
            raise ValueError(f"gamma must be above 0, got {gamma}")
        if self.alpha >= 1:
            raise ValueError(f"alpha must be below 1, got {alpha}")

    def _scores(self, q: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """Returns the score of each candidate, in the order of the candidates. (Q, D), (Q, M, D) -> (Q, M)."""
        similarity = similarities(q, x)
        check_finite(similarity, q, x)
        there = torch.ones_like(similarity, dtype=torch.bool) if mask is None else mask
        first = there & (there.cumsum(dim=1) <= self.kq)
        y = similarity.relu().pow(self.gamma).masked_fill(~first, 0)
        s = normalized_affinities(mutual_affinities(gram_matrices(x), self.k, self.gamma))
        return diffused(s, y, self.alpha)

    def extra_repr(self) -> str:
        return f"m={self.m}, k={self.k}, kq={self.kq}, gamma={self.gamma}, alpha={self.alpha}"
