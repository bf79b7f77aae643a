"""Measures of one query: average precision in its three forms, and values at k.

Every function takes the ascending 0-based ranks of all positives of a query, of which there is at least one, in the
ranking without the ignored images.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

KAPPAS = (1, 5, 10)
RECALL_LEVELS = 101  # 0, 0.01, ... 1
NOT_FOUND = 1 << 40  # the rank of an image that was not found: it adds nothing to any metric
LAST = 100  # number of results per query that GLDv2's metric uses


class Measure(NamedTuple):
    """The measures of a protocol.

    Attributes:
        title: the name of the mean average precision: mAP.
        at: the name of the mean value at k: mP (as in mP@k).
        kappas: the values of k.
        ap: the average precision, a function of a query's ranks.
        at_k: the values at each k, a function of a query's ranks and the kappas.
        depth: number of results per query beyond which nothing counts; 0 if all count.
        main_is_at_k: whether the published metric is the mean value at the first k, and not the mean average precision.
        without_positives: the value at each k of a query without a positive; NaN if it is left out of the mean.
    """

    title: str
    at: str
    kappas: tuple[int, ...]
    ap: Callable[[np.ndarray], float]
    at_k: Callable[[np.ndarray, Sequence[int]], np.ndarray]
    depth: int = 0
    main_is_at_k: bool = False
    without_positives: float = math.nan

    @property
    def main_title(self) -> str:
        """The name of the metric by which results are compared, such as mAP, or recall@1 for places."""
        return f"{self.at}@{self.kappas[0]}" if self.main_is_at_k else self.title


def average_precision(ranks: np.ndarray) -> float:
    """Returns the AP by the trapezoid rule over the ascending 0-based ranks of all positives.

    The k-th positive (from 0) at rank r adds (k/r + (k+1)/(r+1)) / 2 / n_pos, where k/r is 1 at r = 0.

    Radenović et al., "Revisiting Oxford and Paris: Large-Scale Image Retrieval Benchmarking", CVPR 2018.
    """
    k = np.arange(len(ranks))
    before = np.where(ranks == 0, 1.0, k / np.maximum(ranks, 1))
    return float(np.mean((before + (k + 1) / (ranks + 1)) / 2))


def average_precision_at(ranks: np.ndarray, last: int) -> float:
    """Returns AP@last: the sum over positives in the first `last` of (positives so far) / rank, over min(n_pos, last).

    Ranks in this formula count from 1.

    Weyand et al., "Google Landmarks Dataset v2", CVPR 2020, sec. 4.1, with 100; Kordopatis-Zilos et al., "ILIAS:
    Instance-Level Image retrieval At Scale", CVPR 2025, with 1000.
    """
    within = ranks[ranks < last]
    return float(np.sum(np.arange(1, len(within) + 1) / (within + 1)) / min(len(ranks), last))


def precision_until_last(ranks: np.ndarray, kappas: Sequence[int]) -> np.ndarray:
    """Returns the precision within the first min(k, rank of the last positive, from 1)."""
    first = np.minimum(kappas, ranks[-1] + 1)
    return np.searchsorted(ranks, first) / first


def precision_at(ranks: np.ndarray, kappas: Sequence[int]) -> np.ndarray:
    """Returns the share of positives within the first k, for each k."""
    return np.searchsorted(ranks, kappas) / np.array(kappas)


def recall_at(ranks: np.ndarray, kappas: Sequence[int]) -> np.ndarray:
    """Returns 1 if there is a positive within the first k, else 0, for each k."""
    return (ranks[0] < np.array(kappas)).astype(float)


def interpolated_precision(ranks: np.ndarray) -> np.ndarray:
    """Returns interpolated precision at the recalls 0, 0.01, ... 1. (n_pos,) -> (101,).

    At recall r it is the highest precision at any cutoff of the ranking with recall r or more. The
    k-th positive (from 0) at the ascending 0-based rank r_k gives recall (k+1)/n_pos and precision
    (k+1)/(r_k+1).
    """
    n = len(ranks)
    precision = np.arange(1, n + 1) / (ranks + 1)
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    needed = -(-np.arange(RECALL_LEVELS) * n // (RECALL_LEVELS - 1))  # positives for each recall, in integers
    return highest[np.maximum(needed, 1) - 1]


REVISITED = Measure("mAP", "mP", KAPPAS, average_precision, precision_until_last)
RECALL = Measure("mAP", "recall", KAPPAS, average_precision, recall_at)
CHALLENGE = Measure("mAP@100", "P", (1, 5, 10, 50, 100), partial(average_precision_at, last=LAST), precision_at, LAST)
INSTANCES = Measure("mAP@1000", "recall", KAPPAS, partial(average_precision_at, last=1000), recall_at, 1000)
# As in VPR-methods-evaluation (Berton et al., "Deep Visual Geo-localization Benchmark", CVPR 2022), recall is the mean
# over all queries, and the only metric; the mean average precision beside it is ours.
PLACES = Measure("our mAP", "recall", (1, 5, 10, 20), average_precision, recall_at, 0, True, 0.0)
