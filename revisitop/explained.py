"""Choose the result of a run that the report explains: one that shows the effect of SuperGlobal's reranking."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from modules.explanation import Explanation, explain
from modules.reranking import SuperGlobalReranker
from revisitop.retrieve import Ranking
from revisitop.stages import Reranked, Searched, Stage

_FIRST = 10  # number of first results after reranking, one of which is explained


@dataclass(frozen=True)
class Explained:
    """The explanation of the place of one result.

    Attributes:
        query: the number of the query; None if it has no ground truth.
        ids: (M,) int64, the database numbers of its candidates in the order of the search.
        explanation: the explanation, whose places refer to `ids`.
        original: whether S2 compares the expanded query with the candidates' own descriptors.
    """

    query: int | None
    ids: Tensor
    explanation: Explanation
    original: bool


def explain_largest(
    rankings: Mapping[str, Ranking],
    aps: Mapping[str, np.ndarray],
    stages: Mapping[str, Stage],
    searched: Searched,
) -> Explained | None:
    """Returns the explanation of one result, or None if SuperGlobal did not rerank.

    The query is the one whose AP changed most; the result is the one of its first ten that gained most places.

    Args:
        rankings: the ranking of each stage by title, that of the search first.
        aps: (Q,), the AP of each query by stage; NaN for none.
        stages: the stages after the search, by title.
        searched: the search.
    """
    own = [title for title, each in stages.items() if isinstance(each, Reranked)]
    own = [title for title in own if isinstance(stages[title].reranker, SuperGlobalReranker)]
    if not own:
        return None
    title, reranker = own[0], stages[own[0]].reranker
    first = next(iter(rankings))
    changes = np.nan_to_num(np.abs(aps[title] - aps[first]), nan=-1)
    query = int(np.argmax(changes))
    before = rankings[first].ids[query, : reranker.m]
    place = {number: rank for rank, number in enumerate(before.tolist())}
    after = rankings[title].ids[query, : min(_FIRST, len(before))].tolist()
    chosen = max(enumerate(after), key=lambda ranked: place[ranked[1]] - ranked[0])[1]
    explanation = explain(searched.queries[query].cpu(), searched.database.rows(before).cpu(), place[chosen], reranker)
    return Explained(query, before, explanation, reranker.s2 == "original")
