"""Thousands of small random problems against the textbook: ties, zero rows, duplicates, one query, N below K and M."""

import numpy as np
import pytest
import torch
from oracles import all_protocols, dense_reranking, full_ranking, mean_average_precision

from cvnet_rerank.stage import RerankedByLocalFeatures
from modules.reranking import SuperGlobalReranker
from modules.search import Database
from revisitop.dataset import GroundTruth
from revisitop.evaluate import evaluate, ignored_images
from revisitop.protocols import REVISITED_PROTOCOLS
from revisitop.retrieve import rerank, retrieve
from revisitop.stages import search_for

KINDS = ("easy", "hard", "junk")


def coarse_rows(rng: np.random.Generator, n: int) -> np.ndarray:
    """Returns (n, 4) rows whose products are exact in every dtype, so that many tie; some are zero, some equal."""
    rows = rng.integers(-1, 2, (n, 4)).astype(np.float32) / 2
    rows[rng.random(n) < 0.1] = 0
    return np.broadcast_to(rows[:1], rows.shape).copy() if rng.random() < 0.05 else rows


def random_truth(rng: np.random.Generator, n: int) -> dict[str, list[int]]:
    """Returns lists of easy, hard and junk images, any of which may be empty."""
    numbers, ends = rng.permutation(n), np.sort(rng.integers(0, min(n, 12) + 1, 3))
    return {kind: part.tolist() for kind, part in zip(KINDS, np.split(numbers, ends)[:3], strict=True)}


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value encountered")
def test_retrieval_and_its_metrics_are_the_textbooks():
    rng = np.random.default_rng(0)
    for _ in range(200):
        n, q, m = int(rng.integers(1, 60)), int(rng.integers(1, 12)), int(rng.integers(1, 70))
        rows, queries = coarse_rows(rng, n), coarse_rows(rng, q)
        dtype = torch.float16 if rng.random() < 0.3 else torch.float32
        parts = [torch.from_numpy(part).to(dtype) for part in np.split(rows, [int(rng.integers(0, n + 1))])]
        database = Database([part for part in parts if len(part)])
        lists = [random_truth(rng, n) for _ in range(q)]
        truth = [GroundTruth({kind: np.array(entry[kind], dtype=np.int64) for kind in KINDS}) for entry in lists]
        listed = [torch.from_numpy(entry.listed) for entry in truth]
        found = retrieve(torch.from_numpy(queries), database, m, listed)
        expected = full_ranking(queries, rows)
        np.testing.assert_array_equal(found.ids, expected[:, : min(m, n)])
        metrics = {name: 100 * each.map for name, each in evaluate(found, truth).items()}
        assert metrics == pytest.approx(all_protocols(expected, lists), abs=1e-9, nan_ok=True)


def test_reranking_of_equal_scores_keeps_the_lower_place_first():
    """With beta = 0 every score is exact, in the order of sums of the textbook and of the project."""
    rng = np.random.default_rng(2)
    for _ in range(100):
        n, q, m = int(rng.integers(1, 60)), int(rng.integers(1, 12)), int(rng.integers(1, 70))
        k, dtype = int(rng.integers(1, min(m, 13) + 1)), torch.float16 if rng.random() < 0.3 else torch.float32
        rows, queries = coarse_rows(rng, n), coarse_rows(rng, q)
        tensors, database = torch.from_numpy(queries), Database(torch.from_numpy(rows).to(dtype))
        found = retrieve(tensors, database, n)
        again = rerank(found, SuperGlobalReranker(m, k, beta=0), tensors, database)
        for query, ranking in enumerate(found.ids.numpy()):
            first = ranking[:m]
            order = dense_reranking(queries[query].astype(np.float64), rows[first].astype(np.float64), k, 0)
            np.testing.assert_array_equal(again.ids[query], np.concatenate([first[order], ranking[m:]]))


class TabledScores:
    """Scores of pairs as cvnet_rerank.pair_scores.PairScores gives them, from a table (Q, N)."""

    def __init__(self, table: torch.Tensor):
        self.table = table

    def of(self, ids: torch.Tensor, device: torch.device) -> torch.Tensor:
        return self.table.gather(1, ids)


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value encountered")
def test_local_features_sort_the_first_m_images_that_a_protocol_does_not_ignore():
    rng = np.random.default_rng(3)
    for _ in range(100):
        n, q, m = int(rng.integers(1, 60)), int(rng.integers(1, 12)), int(rng.integers(1, 70))
        rows, queries = coarse_rows(rng, n), coarse_rows(rng, q)
        lists = [random_truth(rng, n) for _ in range(q)]
        truth = [GroundTruth({kind: np.array(entry[kind], dtype=np.int64) for kind in KINDS}) for entry in lists]
        table = rng.integers(0, 4, (q, n)).astype(np.float32)
        listed = [torch.from_numpy(entry.listed) for entry in truth]
        searched = search_for((), torch.from_numpy(queries), Database(torch.from_numpy(rows)), listed)
        ignored = {each.name: [ignored_images(entry, each) for entry in truth] for each in REVISITED_PROTOCOLS}
        stage = RerankedByLocalFeatures(TabledScores(torch.from_numpy(table)), m, ignored)
        metrics = evaluate(stage(searched), truth)
        totals = queries @ rows.T + 0.5 * table
        for protocol in REVISITED_PROTOCOLS:
            rankings = []
            for total, entry, ranking in zip(totals, lists, full_ranking(queries, rows), strict=True):
                dropped = {number for kind in KINDS if kind not in protocol.positive for number in entry[kind]}
                kept = [number for number in ranking if number not in dropped]
                rankings.append(sorted(kept[:m], key=lambda number: -total[number]) + kept[m:])
            expected = mean_average_precision(rankings, lists, protocol.positive, ())
            assert 100 * metrics[protocol.name].map == pytest.approx(expected, abs=1e-9, nan_ok=True)
