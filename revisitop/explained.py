"""Which result of a run is explained: one that shows what SuperGlobal's reranking does."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from modules.explanation import Explanation, explain
from modules.reranking import SuperGlobalReranker
from revisitop.retrieve import Ranking
from revisitop.stages import Reranked, Searched, Stage

_FIRST = 10  # results after reranking of which one is explained


@dataclass(frozen=True)
class Explained:
    """Why one result of one query stands where it does.

    Attributes:
        query: the query's number; None where there is no ground truth of it.
        ids: (M,) int64, the database numbers of its candidates as the search had them.
        explanation: its places count these.
        original: whether the expanded query met the candidates' own rows.
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
    """Returns the explanation of one result, or None where SuperGlobal did not rerank.

    The query is the one whose AP changed most, the result the one that gained most places among its first ten.

    Args:
        rankings: of each stage, by its title, the search's first.
        aps: (Q,), the AP of each query after each stage; NaN for none.
        stages: what followed the search, by title.
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
