"""Explain the place that SuperGlobal's reranking gives a candidate: the sums behind its score.

Shapes: M candidates in ranking order, D dimensions, K neighbours. A candidate is identified by its place,
from 0, in the ranking before reranking.

Shao et al., "Global Features are All You Need for Image Retrieval and Reranking", ICCV 2023, sec. 4.
"""

from typing import NamedTuple

import torch

from .checks import Array, as_tensor, whole_number
from .reranking import SuperGlobalReranker, superglobal_scores


class Neighbour(NamedTuple):
    """One term of a candidate's two sums.

    Attributes:
        place: the place of the neighbour; the first neighbour is the candidate itself.
        weight: its weight w_j in the refined descriptor; the weights sum to 1.
        to_query, to_expanded: q . x_j and e . x_j; S1 and S2 are the sums of their products with the weights.
    """

    place: int
    weight: float
    to_query: float
    to_expanded: float


class Explanation(NamedTuple):
    """The values that determine the new place of one candidate.

    Attributes:
        before, after: its places before and after reranking.
        cosine: q . x, the similarity in the search.
        s1, s2: q . x' and e . x', the similarities of its refined descriptor to the query and to the expanded query.
        score: (s1 + s2) / 2, by which the candidates are sorted.
        neighbours: the terms of both sums: the candidate itself, then its neighbours by similarity.
        expansion: the places of the candidates whose refined descriptors form the expanded query, highest S1 first.
        s2_descriptors: "refined", or "original" if s2 is e . x, with the candidate's own descriptor.
    """

    before: int
    after: int
    cosine: float
    s1: float
    s2: float
    score: float
    neighbours: tuple[Neighbour, ...]
    expansion: tuple[int, ...]
    s2_descriptors: str


def explain(
    query: Array,
    candidates: Array,
    place: int,
    reranker: SuperGlobalReranker | None = None,
    mask: Array | None = None,
) -> Explanation:
    """Returns the values behind the new place of one candidate.

    Args:
        query: (D,), of unit length, tensor or NumPy array.
        candidates: (M', D), unit descriptors in ranking order; as in the reranker, only the first m are reranked.
        place: the place of the candidate to explain, below min(m, M').
        reranker: the reranker whose m, k, beta and s2 are used; by default the paper's.
        mask: (M',) bool, False where a candidate is absent.

    Raises:
        ValueError: if the input is invalid for the reranker, or there is no candidate at this place.

    >>> import torch
    >>> why = explain(torch.eye(4)[0], torch.eye(4)[[1, 0, 2]], 1, SuperGlobalReranker(m=3, k=1))
    >>> why.before, why.after, why.expansion
    (1, 0, (1, 0))
    """
    reranker = SuperGlobalReranker() if reranker is None else reranker
    if not isinstance(reranker, SuperGlobalReranker):
        raise ValueError(f"explain takes a SuperGlobalReranker of this package, got {type(reranker)}")
    q, x = as_tensor(query, "query"), as_tensor(candidates, "candidates")
    if q.ndim != 1 or x.ndim != 2:
        raise ValueError(f"explain takes a query (D,) and candidates (M, D), got {tuple(q.shape)} and {tuple(x.shape)}")
    q, x, place = q[None], x[None], whole_number(place, "place", least=0)
    q, x, present = reranker.checked(q, x, None if mask is None else as_tensor(mask, "mask")[None])
    count = x.shape[1]
    if not place < count or (present is not None and not present[0, place]):
        raise ValueError(f"there is no candidate at place {place}, counted from 0, of the {count} that are reranked")
    with torch.no_grad():
        scores = superglobal_scores(q, x, reranker.k, reranker.beta, reranker.s2, present)
        total = (scores.s1 + scores.s2)[0] / 2  # -inf for absent candidates, like s1
        to_query, to_expanded = x[0] @ q[0], x[0] @ scores.expanded[0]
    near = scores.neighbours[0, place]
    if present is not None:  # absent candidates are the last neighbours
        near = near[present[0, near]]
    terms = zip(near, scores.weights[0, place], to_query[near], to_expanded[near], strict=False)
    return Explanation(
        before=place,
        after=total.argsort(descending=True, stable=True).tolist().index(place),
        cosine=to_query[place].item(),
        s1=scores.s1[0, place].item(),
        s2=scores.s2[0, place].item(),
        score=total[place].item(),
        neighbours=tuple(Neighbour(*(value.item() for value in term)) for term in terms),
        expansion=tuple(dict.fromkeys(scores.chosen[0].tolist())),
        s2_descriptors=reranker.s2,
    )
