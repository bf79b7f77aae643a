"""Reranking by k-reciprocal encoding: two images are similar if they share their mutual neighbours.

Shapes: Q queries, M candidates per query, N = M + 1 nodes (the query and its candidates), D dimensions.

Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017.
"""

import torch
from torch import Tensor

from .candidates import RERANK_M, CandidateReranker, check_finite
from .checks import real_number, whole_number
from .neighbours import gram_matrices, membership, nearest, similarities, weighted_sums

K1 = 20
K2 = 6
LAMBDA = 0.3


def node_similarities(queries: Tensor, candidates: Tensor) -> Tensor:
    """Returns the Gram matrices of the nodes, a query and its candidates. (Q, D), (Q, M, D) -> (Q, N, N)."""
    own = (queries * queries).sum(dim=1, keepdim=True)
    first = torch.cat([own, similarities(queries, candidates)], dim=1)
    others = torch.cat([first[:, 1:, None], gram_matrices(candidates)], dim=2)
    return torch.cat([first[:, None], others], dim=1)


def reciprocal_sets(similarity: Tensor, near: Tensor, k1: int) -> Tensor:
    """Returns the expanded k-reciprocal sets R* of the nodes, as rows. (Q, N, N), (Q, N, K) -> bool (Q, N, N).

    `near` has the places of N(i, k1), itself first; those of similarity -inf do not count. R(i, k) is the set
    of all j with j in N(i, k) and i in N(j, k). R*(i) is the union of R(i, k1) and, for each of its members j,
    of R(j, k1 / 2) if at least 2/3 of the latter are in R(i, k1) (eqs. 3 and 4).
    """
    near, near_half = near[..., : k1 + 1], near[..., : round(k1 / 2) + 1]
    members, half = membership(similarity, near), membership(similarity, near_half)
    sets, half = members & members.transpose(1, 2), (half & half.transpose(1, 2)).float()
    shared = weighted_sums(sets.float(), near_half, half.gather(2, near_half))  # |R(j, k1 / 2) and R(i, k1)| at (j, i)
    joins = sets & (3 * shared >= 2 * half.sum(dim=2, keepdim=True)).transpose(1, 2)
    return sets | (weighted_sums(half, near, joins.gather(2, near)) > 0)


def reciprocal_encoding(gram: Tensor, k1: int, k2: int, there: Tensor | None = None) -> Tensor:
    """Returns the vectors V of the nodes: exp(-d) on R*, averaged over the first k2 neighbours. (Q, N, N), same shape.

    Args:
        gram: x_i . x_j of all nodes; d = 1 - x_i . x_j.
        k1: number of neighbours, not counting the node itself, that are tested for reciprocity.
        k2: number of neighbours, including the node itself, over which V is averaged; 1 leaves V as it is.
        there: (Q, N) bool, False for absent nodes, which are no other node's neighbours.
    """
    similarity = gram if there is None else gram.masked_fill(~there[:, None], -torch.inf)
    itself = torch.eye(gram.shape[1], dtype=torch.bool, device=gram.device)
    similarity = similarity.masked_fill(itself, torch.inf)
    near = nearest(similarity, max(k1 + 1, k2))
    encoding = (gram - 1).exp() * reciprocal_sets(similarity, near, k1)
    first = near[..., :k2]
    present = similarity.gather(2, first) > -torch.inf
    return weighted_sums(encoding, first, present / present.sum(dim=2, keepdim=True))


def jaccard_distances(encoding: Tensor) -> Tensor:
    """Returns 1 - sum min(V_0, V_i) / sum max(V_0, V_i) of the first node and each other. (Q, N, N) -> (Q, N - 1)."""
    first, others = encoding[:, :1], encoding[:, 1:]
    shared = torch.minimum(first, others).sum(dim=2)
    return 1 - shared / (first.sum(dim=2) + others.sum(dim=2) - shared)


class KReciprocalReranker(CandidateReranker):
    """Reranks a query's first M results by the Jaccard distance of their k-reciprocal encodings.

    The nodes are the query and its M candidates. N(i, k) consists of node i itself and its k nearest others
    by cosine similarity. The expanded k-reciprocal set R*(i) (:func:`reciprocal_sets`) is encoded as the
    vector V_i, with exp(-d(i, j)) at its members j and 0 elsewhere, d = 1 - cosine. V_i is replaced by the
    mean of V over the first k2 of N(i, .), including i itself (local query expansion). With the Jaccard
    distance J of V_q and V_i (:func:`jaccard_distances`), the candidates are sorted by

        score = -((1 - lambda) J + lambda d(q, i)).

    Equal scores keep their order; among equally near nodes, the query comes first, then the lower place. A descriptor
    of zeros, such as that of an image that was skipped, has no neighbours and is treated as absent: by the formula it
    would be nearer to a query than every image of negative similarity.

    The authors' released code differs in three details from this and from the paper's text: d is the
    squared Euclidean distance divided by the largest of its column, each V_i is divided by its sum, and
    a set joins R* if more than 2/3 of it are shared, instead of at least 2/3.

    Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017, sec. 3.

    Args:
        m: number of candidates that are reranked; later results are ignored.
        k1: number of neighbours that are tested for reciprocity; all if there are fewer. Half of it, for the
            expansion of the sets, is rounded to the nearest whole number, x.5 to the even one.
        k2: number of neighbours over which V is averaged, including the node itself; 1 for no averaging.
        lambda_value: weight of the original distance, from 0 to 1.

    Shape:
        - queries (Q, D), candidates (Q, M', D), mask (Q, M')
        - order and scores (Q, M), where M = min(m, M')

    It keeps a few (M + 1) x (M + 1) matrices per query in memory.

    >>> import torch
    >>> KReciprocalReranker(m=4, k1=2, k2=1)(torch.eye(8)[:1], torch.eye(8)[None, :4]).order
    tensor([[0, 1, 2, 3]])
    """

    def __init__(self, m: int = RERANK_M, k1: int = K1, k2: int = K2, lambda_value: float = LAMBDA):
        super().__init__(m)
        self.k1, self.k2 = whole_number(k1, "k1"), whole_number(k2, "k2")
        self.lambda_value = real_number(lambda_value, "lambda_value", most=1)

    def checked(self, q: Tensor, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the input as :meth:`_scores` expects it, with a mask: descriptors of zeros are absent candidates."""
        q, x, _ = super().checked(q, x, mask)
        return q, x, x.any(dim=2)

    def _scores(self, q: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """Returns the score of each candidate, in the order of the candidates. (Q, D), (Q, M, D) -> (Q, M)."""
        gram = node_similarities(q, x)
        check_finite(gram[:, 0], q, x)
        there = None if mask is None else torch.nn.functional.pad(mask, (1, 0), value=True)
        jaccard = jaccard_distances(reciprocal_encoding(gram, self.k1, self.k2, there))
        return -((1 - self.lambda_value) * jaccard + self.lambda_value * (1 - gram[:, 0, 1:]))

    def extra_repr(self) -> str:
        return f"m={self.m}, k1={self.k1}, k2={self.k2}, lambda_value={self.lambda_value}"
