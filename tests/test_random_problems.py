"""Thousands of small random problems against the textbook: ties, zero rows, duplicates, one query, N below K and M."""

import numpy as np
import pytest
import torch
from oracles import all_protocols, dense_reranking, full_ranking

from modules.reranking import SuperGlobalReranker
from modules.search import Database
from revisitop.dataset import GroundTruth
from revisitop.evaluate import evaluate
from revisitop.retrieve import rerank, retrieve

KINDS = ("easy", "hard", "junk")


def coarse_rows(rng: np.random.Generator, n: int) -> np.ndarray:
    """(n, 4) rows whose products are exact in every dtype, so that many tie; some are zero, some are equal."""
    rows = rng.integers(-1, 2, (n, 4)).astype(np.float32) / 2
    rows[rng.random(n) < 0.1] = 0
    return np.broadcast_to(rows[:1], rows.shape).copy() if rng.random() < 0.05 else rows


def random_truth(rng: np.random.Generator, n: int) -> dict[str, list[int]]:
    """Lists of easy, hard and junk images, any of which may be empty."""
    numbers, ends = rng.permutation(n), np.sort(rng.integers(0, min(n, 12) + 1, 3))
    return {kind: part.tolist() for kind, part in zip(KINDS, np.split(numbers, ends)[:3], strict=True)}


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value encountered")
def test_retrieval_and_its_metrics_are_the_textbooks():
    rng = np.random.default_rng(0)
    for _ in range(500):
        n, q, m = int(rng.integers(1, 60)), int(rng.integers(1, 7)), int(rng.integers(1, 70))
        rows, queries = coarse_rows(rng, n), coarse_rows(rng, q)
        dtype = torch.float16 if rng.random() < 0.3 else torch.float32
        parts = [torch.from_numpy(part).to(dtype) for part in np.split(rows, [int(rng.integers(0, n + 1))])]
        database = Database([part for part in parts if len(part)])
        lists = [random_truth(rng, n) for _ in range(q)]
        truth = [GroundTruth(*(np.array(entry[kind], dtype=np.int64) for kind in KINDS)) for entry in lists]
        listed = [torch.from_numpy(entry.listed) for entry in truth]
        found = retrieve(torch.from_numpy(queries), database, m, listed)
        expected = full_ranking(queries, rows)
        np.testing.assert_array_equal(found.ids, expected[:, : min(m, n)])
        metrics = {name: 100 * each.map for name, each in evaluate(found, truth).items()}
        assert metrics == pytest.approx(all_protocols(expected, lists), abs=1e-9, nan_ok=True)


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value encountered")
def test_reranking_and_its_metrics_are_the_textbooks():
    rng = np.random.default_rng(1)
    for _ in range(500):
        n, d, q = int(rng.integers(1, 50)), int(rng.integers(2, 20)), int(rng.integers(1, 7))
        m, k, beta = int(rng.integers(1, 60)), int(rng.integers(1, 13)), float(rng.uniform(0, 1))
        rows = rng.standard_normal((n, d))
        rows = rows[rng.integers(0, n, n)] if rng.random() < 0.3 else rows  # some rows twice, or more often
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        rows[rng.random(n) < 0.05] = 0
        rows = rows.astype(np.float32).astype(np.float64)
        queries = rng.standard_normal((q, d))
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
        lists = [random_truth(rng, n) for _ in range(q)]
        truth = [GroundTruth(*(np.array(entry[kind], dtype=np.int64) for kind in KINDS)) for entry in lists]
        listed = [torch.from_numpy(entry.listed) for entry in truth]
        tensors, database = torch.from_numpy(queries), Database(torch.from_numpy(rows))
        found = retrieve(tensors, database, n, listed)
        again = rerank(found, SuperGlobalReranker(m, min(k, m), beta), tensors, database)
        ranking = found.ids.numpy().copy()
        for query in range(q):
            first = ranking[query, :m].copy()
            order = dense_reranking(queries[query], rows[first], min(k, m), beta)
            # Rows that are equal may stand for each other.
            np.testing.assert_array_equal(rows[again.ids[query, :m].numpy()], rows[first[order]])
        np.testing.assert_array_equal(again.ids[:, m:], ranking[:, m:])
        metrics = {name: 100 * each.map for name, each in evaluate(again, truth).items()}
        assert metrics == pytest.approx(all_protocols(again.ids.numpy(), lists), abs=1e-9, nan_ok=True)
