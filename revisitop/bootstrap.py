"""Confidence intervals for the difference between two rankings of the same queries."""

from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95
_AT_A_TIME = 500


class Difference(NamedTuple):
    """The mean of B - A over the queries, and its bootstrap interval."""

    mean: float
    low: float
    high: float
    queries: int

    @property
    def is_within_chance(self) -> bool:
        """Whether the interval contains 0: other queries of the same kind could show the opposite."""
        return self.low <= 0 <= self.high

    def __str__(self) -> str:
        """Returns the difference in percentage points, for values between 0 and 1."""
        mean, low, high = (100 * each for each in self[:3])
        return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def paired_difference(a: np.ndarray, b: np.ndarray) -> Difference:
    """Returns the mean difference of two values per query, with its percentile bootstrap interval of 95 %.

    The queries that have both values are resampled with replacement 10,000 times; the interval contains
    the middle 95 % of the means of b - a. The samples are the same each time.

    Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 13; Sakai, "Evaluating Evaluation
    Metrics Based on the Bootstrap", SIGIR 2006, for retrieval.

    Args:
        a, b: (Q,), NaN for a query without a value.

    >>> str(paired_difference(np.array([0.2, 0.5, np.nan]), np.array([0.3, 0.6, 0.9])))
    '+10.00 [+10.00, +10.00]'
    """
    differences = (b - a)[~np.isnan(b - a)]
    if not len(differences):
        return Difference(np.nan, np.nan, np.nan, 0)
    mean = float(differences.mean())
    rng, count = np.random.default_rng(0), len(differences)
    parts = range(RESAMPLES // _AT_A_TIME)
    means = [differences[rng.integers(count, size=(_AT_A_TIME, count))].mean(axis=1) for _ in parts]
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Difference(mean, float(low), float(high), count)
