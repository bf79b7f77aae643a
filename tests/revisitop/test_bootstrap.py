import numpy as np
import pytest

from revisitop.bootstrap import paired_difference


def test_the_interval_has_about_its_nominal_coverage():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(100):
        a = rng.random(40)
        difference = paired_difference(a, a + 0.05 + 0.1 * rng.standard_normal(40))
        covered += difference.low <= 0.05 <= difference.high
    assert 88 <= covered <= 99


def test_the_difference_is_paired_antisymmetric_and_reproducible():
    rng = np.random.default_rng(1)
    a = rng.random(70)
    b = a + 0.01 + 0.001 * rng.standard_normal(70)  # tiny, but nearly the same for each query
    forward, back = paired_difference(a, b), paired_difference(b, a)
    assert not forward.is_within_chance
    assert forward == paired_difference(a, b)
    assert (forward.mean, forward.low, forward.high) == pytest.approx((-back.mean, -back.high, -back.low))


def test_queries_without_a_value_in_both_are_left_out():
    a, b = np.array([0.1, np.nan, 0.3, 0.9]), np.array([0.2, 0.9, np.nan, 0.9])
    assert paired_difference(a, b) == paired_difference(a[[0, 3]], b[[0, 3]])
    assert paired_difference(a[1:2], b[1:2]).queries == 0
