"""Metrics of rankings by the protocols of a dataset: Easy / Medium / Hard, GLDv2's mAP@100, recall.

Conventions: positions and ranks count from 0. The ignored images of a query are removed from the
ranking before anything is computed. A query without a positive image has no AP and is left out of
the means; if no query has one, the mean is NaN.

Radenović et al., "Revisiting Oxford and Paris: Large-Scale Image Retrieval Benchmarking", CVPR 2018.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from revisitop.dataset import GroundTruth
from revisitop.measures import CHALLENGE, LAST, RECALL_LEVELS, Measure, interpolated_precision
from revisitop.protocols import REVISITED_PROTOCOLS, Protocol
from revisitop.retrieve import Ranking


@dataclass(frozen=True)
class Metrics:
    """The metrics of one protocol, each between 0 and 1.

    Attributes:
        protocol: the protocol.
        map: mean average precision.
        ap: average precision per query; NaN for a query without a positive, or of another usage.
        at_k: the mean value at each k of the measure, or at the first of them.
        precision: (101,), mean interpolated precision at the recalls 0, 0.01, ... 1.
        first: mean and median rank, from 1, of the first positive, if the measure includes it.
        at_first_k: the value at the first k per query, if this is the main metric, see Measure.
    """

    protocol: Protocol
    map: float
    ap: np.ndarray
    at_k: np.ndarray
    precision: np.ndarray
    first: dict[str, float] = field(default_factory=dict)
    at_first_k: np.ndarray | None = None

    @property
    def values(self) -> np.ndarray:
        """The values per query whose mean is the main metric: AP or, for places, recall@1. (Q,), NaN for none."""
        return self.ap if self.at_first_k is None else self.at_first_k

    @property
    def main(self) -> float:
        """The metric by which results are compared; NaN if no query has a value."""
        return self.map if self.at_first_k is None else float(np.nanmean(self.at_first_k))

    @property
    def at_k_title(self) -> str:
        """The name of the values at k, such as mP@1,5,10."""
        measure = self.protocol.measure
        return f"{measure.at}@{','.join(map(str, measure.kappas[: len(self.at_k)]))}"


def evaluate(
    ranking: Ranking,
    ground_truth: Sequence[GroundTruth],
    protocols: Sequence[Protocol] = REVISITED_PROTOCOLS,
    images: int | None = None,
) -> dict[str, Metrics]:
    """Returns the metrics of each protocol, by its name.

    Args:
        ranking: the ranking, with the positions of ``ground_truth[query].listed`` for each query.
        ground_truth: the ground truth of each query.
        protocols: the protocols of the dataset.
        images: the number of database images; there are no values at larger k. None for no limit.
    """
    metrics: dict[str, Metrics] = {}
    for each in protocols:
        positions = ranking.by_protocol.get(each.name, ranking.positions)
        metrics |= evaluate_positions([np.asarray(where) for where in positions], ground_truth, [each])
    counts = {name: sum(k <= (images or k) for k in each.protocol.measure.kappas) for name, each in metrics.items()}
    return {name: replace(each, at_k=each.at_k[: counts[name]]) for name, each in metrics.items()}


def ignored_images(truth: GroundTruth, protocol: Protocol) -> np.ndarray:
    """Returns the database numbers that are removed from the ranking."""
    return truth.listed[positive_and_ignored(truth, protocol)[1]]


def query_values(metrics: dict[str, Metrics]) -> np.ndarray:
    """Returns the value of each query for the report: that of Medium, or of the first protocol that has one. (Q,)."""
    first, *others = [metrics["M"]] if "M" in metrics else metrics.values()
    values = first.values
    for each in others:
        values = np.where(np.isnan(values), each.values, values)
    return values


def evaluate_positions(
    positions: Sequence[np.ndarray],
    ground_truth: Sequence[GroundTruth],
    protocols: Sequence[Protocol] = REVISITED_PROTOCOLS,
) -> dict[str, Metrics]:
    """Returns the metrics of each protocol, from the positions of the listed images.

    Args:
        positions: per query (L,), the 0-based ranks, among all N images, of ``ground_truth[query].listed``.
        ground_truth: the ground truth of each query.
        protocols: the protocols of the dataset.
    """
    for where, truth in zip(positions, ground_truth, strict=True):
        if len(where) != len(truth.listed):
            raise ValueError(f"{len(where)} positions for {len(truth.listed)} listed images")
    return {each.name: _metrics(positions, ground_truth, each) for each in protocols}


def _metrics(positions: Sequence[np.ndarray], ground_truth: Sequence[GroundTruth], protocol: Protocol) -> Metrics:
    """Returns the metrics of one protocol, see evaluate_positions."""
    measure: Measure = protocol.measure
    ap = np.full(len(ground_truth), math.nan)
    at_k = np.full((len(ap), len(measure.kappas)), math.nan)
    precision = np.full((len(ap), RECALL_LEVELS), math.nan)
    first = []  # ranks, from 1, of the first positives; 101 if it is not within the first 100
    for query, (where, truth) in enumerate(zip(positions, ground_truth, strict=True)):
        if protocol.usage not in (None, truth.usage):
            continue
        positive, ignored = positive_and_ignored(truth, protocol)
        ranks = remove_ignored(np.asarray(where)[positive], np.asarray(where)[ignored])
        if not len(ranks):
            at_k[query] = measure.without_positives
            continue
        ap[query], at_k[query] = measure.ap(ranks), measure.at_k(ranks, measure.kappas)
        precision[query] = interpolated_precision(ranks)
        first.append(min(int(ranks[0]), LAST) + 1)
    if not first:
        return Metrics(protocol, math.nan, ap, np.full(at_k.shape[1], math.nan), np.full(RECALL_LEVELS, math.nan))
    first_ranks = {"mean": float(np.mean(first)), "median": float(np.median(first))} if measure is CHALLENGE else {}
    means = (np.nanmean(values, axis=0) for values in (at_k, precision))
    return Metrics(
        protocol, float(np.nanmean(ap)), ap, *means, first_ranks, at_k[:, 0] if measure.main_is_at_k else None
    )


def positive_and_ignored(truth: GroundTruth, protocol: Protocol) -> tuple[np.ndarray, np.ndarray]:
    """Returns which of truth.listed are positive in a protocol, and which are ignored, as masks (L,)."""
    kinds = np.repeat([*truth.kinds], [len(numbers) for numbers in truth.kinds.values()])
    positive = np.isin(kinds, protocol.positive)
    return positive, ~positive


def evaluate_ranks(
    ranks: np.ndarray, ground_truth: Sequence[GroundTruth], protocols: Sequence[Protocol] = REVISITED_PROTOCOLS
) -> dict[str, Metrics]:
    """Returns the metrics from full rankings, (N, Q), one column per query, as in revisitop's own tools."""
    positions = []
    for ranking, truth in zip(np.asarray(ranks).T, ground_truth, strict=True):
        where = np.empty(len(ranking), dtype=np.int64)
        where[ranking] = np.arange(len(ranking))
        positions.append(where[truth.listed])
    return evaluate_positions(positions, ground_truth, protocols)


def remove_ignored(positive: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """Returns ascending ranks of the positives in the ranking without the ignored images."""
    positive = np.sort(positive)
    return positive - np.searchsorted(np.sort(ignored), positive)
