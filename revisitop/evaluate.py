"""The revisited protocol: metrics of rankings, Easy / Medium / Hard.

Conventions: positions and ranks count from 0. A query's ignored images are taken out of the
ranking before anything is counted. A query without a positive image has no AP and is left out of
the means; where no query has one, the mean is NaN.

Radenović et al., "Revisiting Oxford and Paris: Large-Scale Image Retrieval Benchmarking", CVPR 2018.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from revisitop.dataset import GroundTruth
from revisitop.retrieve import Candidates, Ranking, move

KAPPAS = (1, 5, 10)
PROTOCOLS = {"E": ("easy",), "M": ("easy", "hard"), "H": ("hard",)}  # what is positive; the other lists are ignored
RECALL_LEVELS = 101  # 0, 0.01, ... 1


@dataclass(frozen=True)
class Metrics:
    """The metrics of one protocol, each between 0 and 1.

    Attributes:
        map: mean average precision.
        ap: average precision per query; NaN for a query without a positive.
        mp_at_k: mean precision within the first k, for each k of KAPPAS.
        precision: (101,), mean interpolated precision at the recalls 0, 0.01, ... 1.
    """

    map: float
    ap: np.ndarray
    mp_at_k: np.ndarray
    precision: np.ndarray


def evaluate(ranking: Ranking, ground_truth: Sequence[GroundTruth]) -> dict[str, Metrics]:
    """Returns the metrics of each protocol.

    Where a reranker scored candidates beyond those that it sorted, the images that a protocol ignores
    leave the ranking before the first m are taken and sorted, as CVNet-Rerank's published figures have it.

    Args:
        ranking: with the positions of ``ground_truth[query].listed`` for each query.
        ground_truth: per query.
    """
    positions = [np.asarray(where) for where in ranking.positions]
    if ranking.candidates is None:
        return evaluate_positions(positions, ground_truth)
    return {
        name: summarise(
            [_resorted_ranks(ranking.candidates, query, truth, name) for query, truth in enumerate(ground_truth)]
        )
        for name in PROTOCOLS
    }


def most_ignored(ground_truth: Sequence[GroundTruth]) -> int:
    """Returns the most images that a protocol ignores for a query."""
    return max(len(ignored_images(truth, name)) for truth in ground_truth for name in PROTOCOLS)


def ignored_images(truth: GroundTruth, protocol: str) -> np.ndarray:
    """Returns the database numbers that leave the ranking."""
    return truth.listed[positive_and_ignored(truth, protocol)[1]]


def _resorted_ranks(candidates: Candidates, query: int, truth: GroundTruth, protocol: str) -> np.ndarray:
    """Ascending ranks of the positives after the ignored images have left and the first m were sorted."""
    kept = ~np.isin(candidates.ids[query].numpy(), ignored_images(truth, protocol))
    order = candidates.scores[query][torch.from_numpy(kept)][: candidates.m].sort(descending=True, stable=True).indices
    ranks = protocol_ranks(np.asarray(candidates.positions[query]), truth, protocol)
    return np.sort(move(torch.from_numpy(ranks), order).numpy())


def evaluate_positions(
    positions: Sequence[np.ndarray], ground_truth: Sequence[GroundTruth], kappas: Sequence[int] = KAPPAS
) -> dict[str, Metrics]:
    """Returns the metrics of each protocol, from where the listed images stand.

    Args:
        positions: per query (L,), the 0-based rank, in the ranking of all N images, of each of
            ``ground_truth[query].listed`` (easy, then hard, then junk).
        ground_truth: per query.
        kappas: the k of mP@k.
    """
    for where, truth in zip(positions, ground_truth, strict=True):
        if len(where) != len(truth.listed):
            raise ValueError(f"{len(where)} positions for {len(truth.listed)} listed images")
    return {
        name: summarise(
            [protocol_ranks(where, truth, name) for where, truth in zip(positions, ground_truth, strict=True)], kappas
        )
        for name in PROTOCOLS
    }


def positive_and_ignored(truth: GroundTruth, protocol: str) -> tuple[np.ndarray, np.ndarray]:
    """Which of truth.listed are positive in a protocol, and which leave the ranking, as masks (L,)."""
    kinds = np.repeat(["easy", "hard", "junk"], [len(truth.easy), len(truth.hard), len(truth.junk)])
    positive = np.isin(kinds, PROTOCOLS[protocol])
    return positive, ~positive


def protocol_ranks(where: np.ndarray, truth: GroundTruth, protocol: str) -> np.ndarray:
    """Ascending ranks of a query's positives after the ignored images have left. (L,) -> (positives,).

    Args:
        where: its listed images' positions, see evaluate_positions.
    """
    positive, ignored = positive_and_ignored(truth, protocol)
    return remove_ignored(np.asarray(where)[positive], np.asarray(where)[ignored])


def summarise(ranks: Sequence[np.ndarray], kappas: Sequence[int] = KAPPAS) -> Metrics:
    """Returns the metrics of one protocol, from each query's ascending ranks of its positives, without the ignored."""
    ap = np.array([average_precision(r) for r in ranks])
    at_k = np.array([precision_at(r, kappas) for r in ranks])
    at_recall = np.array([interpolated_precision(r) for r in ranks])
    if np.isnan(ap).all():
        return Metrics(float("nan"), ap, np.full(len(kappas), np.nan), np.full(RECALL_LEVELS, np.nan))
    return Metrics(float(np.nanmean(ap)), ap, np.nanmean(at_k, axis=0), np.nanmean(at_recall, axis=0))


def evaluate_ranks(
    ranks: np.ndarray, ground_truth: Sequence[GroundTruth], kappas: Sequence[int] = KAPPAS
) -> dict[str, Metrics]:
    """The same from full rankings, as revisitop's own tools hold them: (N, Q), a column per query."""
    positions = []
    for ranking, truth in zip(np.asarray(ranks).T, ground_truth, strict=True):
        where = np.empty(len(ranking), dtype=np.int64)
        where[ranking] = np.arange(len(ranking))
        positions.append(where[truth.listed])
    return evaluate_positions(positions, ground_truth, kappas)


def remove_ignored(positive: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """Ascending ranks of the positives in the ranking without the ignored images."""
    positive = np.sort(positive)
    return positive - np.searchsorted(np.sort(ignored), positive)


def average_precision(ranks: np.ndarray) -> float:
    """Trapezoid rule over the ascending 0-based ranks of all positives; NaN where there is none.

    The k-th positive (from 0) at rank r adds (k/r + (k+1)/(r+1)) / 2 / n_pos, where k/r is 1 at r = 0.
    """
    if len(ranks) == 0:
        return float("nan")
    k = np.arange(len(ranks))
    before = np.where(ranks == 0, 1.0, k / np.maximum(ranks, 1))
    return float(np.mean((before + (k + 1) / (ranks + 1)) / 2))


def precision_at(ranks: np.ndarray, kappas: Sequence[int]) -> np.ndarray:
    """Precision within the first min(k, rank of the last positive, from 1), for each k; NaN without positives."""
    if len(ranks) == 0:
        return np.full(len(kappas), np.nan)
    first = np.minimum(kappas, ranks[-1] + 1)
    return np.searchsorted(ranks, first) / first


def interpolated_precision(ranks: np.ndarray) -> np.ndarray:
    """Interpolated precision at the recalls 0, 0.01, ... 1; NaN where there is no positive. (n_pos,) -> (101,).

    At recall r it is the highest precision that any cut of the ranking with recall r or more has. The
    k-th positive (from 0) at the ascending 0-based rank r_k gives recall (k+1)/n_pos and precision
    (k+1)/(r_k+1); as everywhere here, ignored images have left the ranking before.
    """
    n = len(ranks)
    if n == 0:
        return np.full(RECALL_LEVELS, np.nan)
    precision = np.arange(1, n + 1) / (ranks + 1)
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    needed = -(-np.arange(RECALL_LEVELS) * n // (RECALL_LEVELS - 1))  # positives for each recall, in whole numbers
    return highest[np.maximum(needed, 1) - 1]
