"""Why SuperGlobal's reranking puts a candidate where it does: the sums behind its score.

Shapes: M candidates in ranking order, D dimensions, K neighbours. A candidate is named by its place in
the ranking that is reranked, from 0.

Shao et al., "Global Features are All You Need for Image Retrieval and Reranking", ICCV 2023, sec. 4.
"""

from typing import NamedTuple

import torch

from .checks import Array, as_tensor
from .reranking import SuperGlobalReranker, superglobal_scores


class Neighbour(NamedTuple):
    """One term of a candidate's two sums.

    Attributes:
        place: of the neighbour; the first one is the candidate itself.
        weight: its share w_j of the refined row; the shares sum to 1.
        to_query: q . x_j. S1 is the sum of weight * to_query.
        to_expanded: e . x_j. S2 is the sum of weight * to_expanded ("original" S2: that of the candidate itself).
    """

    place: int
    weight: float
    to_query: float
    to_expanded: float


class Explanation(NamedTuple):
    """What one candidate's new place follows from.

    Attributes:
        before, after: its place before and after reranking.
        cosine: q . x, by which it was found.
        s1: q . x', the similarity of the query and the refined row.
        s2: e . x' (or e . x, "original"), that of the expanded query.
        score: (s1 + s2) / 2, which orders the candidates.
        neighbours: the terms of both sums, those that are there: the candidate, then by similarity to it.
        chosen: the places of the candidates whose refined rows make the expanded query, the highest S1 first.
    """

    before: int
    after: int
    cosine: float
    s1: float
    s2: float
    score: float
    neighbours: tuple[Neighbour, ...]
    chosen: tuple[int, ...]


def explain(
    query: Array,
    candidates: Array,
    place: int,
    reranker: SuperGlobalReranker | None = None,
    mask: Array | None = None,
) -> Explanation:
    """Returns the sums behind the new place of one candidate.

    Args:
        query: (D,), of unit length, tensor or NumPy array.
        candidates: (M', D), unit rows in ranking order; those after the first m are not reranked, as in the reranker.
        place: of the candidate that is explained, below min(m, M').
        reranker: whose m, k, beta and s2 are taken; by default the paper's.
        mask: (M',) bool, False where there is no candidate.

    Raises:
        ValueError: if the reranker refuses the input, or no candidate has this place.

    >>> import torch
    >>> why = explain(torch.eye(4)[0], torch.eye(4)[[1, 0, 2]], 1, SuperGlobalReranker(m=3, k=1))
    >>> why.before, why.after, why.chosen
    (1, 0, (1, 0))
    """
    reranker = SuperGlobalReranker() if reranker is None else reranker
    q, x = as_tensor(query, "query")[None], as_tensor(candidates, "candidates")[None]
    q, x, there = reranker.checked(q, x, None if mask is None else as_tensor(mask, "mask")[None])
    count = x.shape[1]
    if not 0 <= place < count or (there is not None and not there[0, place]):
        raise ValueError(f"no candidate has place {place}, counted from 0; {count} are reranked")
    with torch.no_grad():
        scores = superglobal_scores(q, x, reranker.k, reranker.beta, reranker.s2, there)
        total = (scores.s1 + scores.s2) / 2  # -inf where no candidate is, as s1
        order = total.argsort(dim=1, descending=True, stable=True)[0].tolist()
        to_query, to_expanded = x[0] @ q[0], x[0] @ scores.expanded[0]
    near = scores.neighbours[0, place].tolist()
    terms = zip(near, scores.weights[0, place].tolist(), strict=True)
    return Explanation(
        before=place,
        after=order.index(place),
        cosine=to_query[place].item(),
        s1=scores.s1[0, place].item(),
        s2=scores.s2[0, place].item(),
        score=total[0, place].item(),
        neighbours=tuple(
            Neighbour(other, weight, to_query[other].item(), to_expanded[other].item())
            for other, weight in terms
            if there is None or there[0, other]
        ),
        chosen=tuple(dict.fromkeys(scores.chosen[0].tolist())),
    )
