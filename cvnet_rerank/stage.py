"""Reranking by local features, by the protocol of the published results of CVNet-Rerank."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cvnet_rerank.pair_scores import PairScores
from modules.candidates import places_after

SCORE_WEIGHT = 0.5


@dataclass(frozen=True)
class RerankedByLocalFeatures:
    """Sorts a query's first m candidates by cosine + 0.5 * score; the others keep their places.

    The candidates are counted per protocol, after the images that it ignores are dropped from the ranking, so that
    positions differ by protocol. Implements revisitop.stages.Stage.

    Attributes:
        pairs: provides the scores of the first m candidates, and of as many more as a protocol can drop.
        m: number of candidates that are sorted.
        ignored: by protocol, per query, the database numbers that the protocol drops; empty for no protocol.
    """

    pairs: PairScores
    m: int
    ignored: Mapping[str, Sequence[np.ndarray]]

    @property
    def needed(self) -> int:
        return self.m + most_ignored(self.ignored)

    @property
    def shortlist(self) -> str:
        return f"the first {self.m} results that the protocol does not ignore"

    def __call__(self, searched: Any) -> Any:
        """Returns the new ranking, see revisitop.stages.Stage; `by_protocol` has the positions of each protocol."""
        start, ranking = time.perf_counter(), searched.ranking
        ids = ranking.ids[:, : self.needed]
        pair_scores = self.pairs.of(ranking.ids, torch.device(searched.device))  # of all stages that share them
        scores = ranking.scores[:, : self.needed] + SCORE_WEIGHT * pair_scores[:, : self.needed]
        order = _order(scores[:, : self.m], [np.empty(0)] * len(ids), ids[:, : self.m], self.m)
        new_ids, new_scores = ranking.ids.clone(), ranking.scores.clone()
        new_ids[:, : order.shape[1]] = ids.gather(1, order)
        new_scores[:, : order.shape[1]] = scores.gather(1, order)
        by_protocol = {
            name: _moved(ranking.positions, _order(scores, per_query, ids, self.m))
            for name, per_query in self.ignored.items()
        }
        return replace(
            ranking, ids=new_ids, scores=new_scores, positions=_moved(ranking.positions, order),
            by_protocol=by_protocol, seconds=time.perf_counter() - start,
        )  # fmt: skip


def local_feature_stages(
    counts: Sequence[int], ignored: Mapping[str, Sequence[np.ndarray]], **pairs: Any
) -> dict[int, RerankedByLocalFeatures]:
    """Returns a stage for each number of candidates; they share the scores.

    Args:
        counts: the numbers of candidates.
        ignored: see RerankedByLocalFeatures.
        pairs: the arguments of PairScores, except m.
    """
    scores = PairScores(m=max(counts) + most_ignored(ignored), **pairs)
    return {count: RerankedByLocalFeatures(scores, count, ignored) for count in counts}


def most_ignored(ignored: Mapping[str, Sequence[np.ndarray]]) -> int:
    """Returns the largest number of images that a protocol drops for a query."""
    return max((len(numbers) for per_query in ignored.values() for numbers in per_query), default=0)


def _order(scores: Tensor, ignored: Sequence[np.ndarray], ids: Tensor, m: int) -> Tensor:
    """Returns the candidates in their new order: the first m that are not ignored, sorted; the rest; ignored ones.

    scores, ids (Q, C) -> places (Q, C).
    """
    dropped = torch.stack(
        [torch.from_numpy(np.isin(row.numpy(), numbers)) for row, numbers in zip(ids, ignored, strict=True)]
    )
    sortable = ~dropped & ((~dropped).cumsum(dim=1) <= m)
    # One stable sort: groups by rank of the group, within the first group by score.
    group = torch.where(sortable, 0.0, torch.where(dropped, 2.0, 1.0))
    by_score = torch.where(sortable, scores, 0.0).sort(dim=1, descending=True, stable=True).indices
    return by_score.gather(1, group.gather(1, by_score).sort(dim=1, stable=True).indices)


def _moved(positions: Sequence[Tensor], order: Tensor) -> list[Tensor]:
    return [places_after(where, new) for where, new in zip(positions, order, strict=True)]
