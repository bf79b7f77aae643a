import numpy as np
import pytest

from revisitop.dataset import GroundTruth
from revisitop.evaluate import evaluate_positions, evaluate_ranks
from revisitop.measures import interpolated_precision


def truth(lists: dict) -> GroundTruth:
    return GroundTruth({kind: np.array(lists[kind], dtype=np.int64) for kind in ("easy", "hard", "junk")})


def test_metrics_equal_revisitops(evaluation):
    ground_truth = [truth(lists) for lists in evaluation["gnd"]]
    metrics = evaluate_ranks(np.array(evaluation["ranks"]).T, ground_truth)
    for protocol, expected in evaluation["expected"].items():
        result = metrics[protocol]
        assert result.map == pytest.approx(expected["map"], abs=1e-12)
        np.testing.assert_allclose(result.at_k, expected["mp_at_k"], atol=1e-12)
        np.testing.assert_allclose(result.ap, np.array(expected["ap"], dtype=float), atol=1e-12)


def test_positions_give_the_same_metrics_as_rankings(evaluation):
    ground_truth = [truth(lists) for lists in evaluation["gnd"]]
    ranks = np.array(evaluation["ranks"])
    positions = [np.argsort(row)[t.listed] for row, t in zip(ranks, ground_truth, strict=True)]
    by_positions, by_ranks = evaluate_positions(positions, ground_truth), evaluate_ranks(ranks.T, ground_truth)
    for protocol, result in by_positions.items():
        assert result.map == by_ranks[protocol].map


def test_a_protocol_without_any_positive_has_no_metrics():
    metrics = evaluate_positions([np.array([3, 0])], [truth({"easy": [1, 2], "hard": [], "junk": []})])
    assert np.isnan(metrics["H"].map)
    assert not np.isnan(metrics["E"].map)


def test_positions_of_another_number_of_images_are_refused():
    with pytest.raises(ValueError, match="1 positions for 2 listed"):
        evaluate_positions([np.array([3])], [truth({"easy": [1, 2], "hard": [], "junk": []})])


def test_precision_over_recall_equals_a_calculation_by_hand():
    # Found at the ranks 0, 3 and 4: precision 1, 2/4, 3/5 at recall 1/3, 2/3, 1; up to 2/3 the 3/5 that follows counts.
    expected = np.repeat([1, 0.6, 0.6], [34, 33, 34])
    np.testing.assert_allclose(interpolated_precision(np.array([0, 3, 4])), expected, atol=1e-15)


def test_curves_are_means_over_the_queries_without_their_ignored_images():
    # Easy: without junk and hard, the positive of the first ranking comes first; in the second it has rank 3.
    ground_truth = [truth({"easy": [5], "hard": [6], "junk": [7]}), truth({"easy": [5], "hard": [], "junk": []})]
    metrics = evaluate_positions([np.array([2, 0, 1]), np.array([3])], ground_truth)
    np.testing.assert_allclose(metrics["E"].precision, np.full(101, (1 + 1 / 4) / 2))
    np.testing.assert_allclose(metrics["M"].precision, np.full(101, (1 + 1 / 4) / 2))  # 6 precedes 5: ranks 0, 1
    np.testing.assert_allclose(metrics["H"].precision, np.ones(101))  # the second query has no hard image
