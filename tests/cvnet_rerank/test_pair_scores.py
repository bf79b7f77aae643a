import json
import os

import numpy as np
import pytest
import torch
from conftest import Layout, kept, latest
from oracles import all_protocols, full_ranking

from cvnet_rerank.network import load_cvnet_rerank
from cvnet_rerank.pair_scores import CVNetReranker, FeatureMaps, PairScores, equal_sizes
from extraction.images import to_network_input
from model.recipe import Recipe
from modules.search import Database
from revisitop.evaluate import evaluate as metrics_of
from revisitop.evaluate import most_ignored
from revisitop.layouts import load_dataset
from revisitop.retrieve import rerank, retrieve

QUICK = ("TEST.SCALE_LIST", 1, "DATA_LOADER.NUM_WORKERS", 0)


@pytest.fixture(scope="module")
def network(checkpoint_50):
    return load_cvnet_rerank(checkpoint_50, 50)


@pytest.fixture
def evaluate(command, layout, checkpoint_50):
    def run(*arguments):
        return command(
            "test.py", "TEST.WEIGHTS", checkpoint_50, "TEST.DATA_DIR", layout.data_dir,
            "TEST.DATASET_LIST", "roxford5k", *QUICK, *arguments,
        )  # fmt: skip

    return run


def pair_scores(network, layout: Layout) -> np.ndarray:
    """Returns the score of each query with each database image, computed pair by pair, (Q, N)."""
    dataset = load_dataset("roxford5k", layout.data_dir)

    def feature_map(image) -> torch.Tensor:
        return network.feature_map(to_network_input(torch.from_numpy(image.read())[None]))

    with torch.inference_mode():
        keys = [feature_map(image) for image in dataset.database]
        queries = [network.query_inputs(feature_map(image)) for image in dataset.queries]
        return np.array([[network.score(query, key).item() for key in keys] for query in queries])


def by_the_book(ranking, cosine, scores, ground_truth, topk) -> dict[str, float]:
    """Returns the metrics of each protocol, from a ranking that is sorted separately for it."""
    metrics = {}
    for name, ignored in {"E": ("junk", "hard"), "M": ("junk",), "H": ("junk", "easy")}.items():
        rankings = []
        for query, truth in enumerate(ground_truth):
            out = {number for kind in ignored for number in truth[kind]}
            kept = [number for number in ranking[query] if number not in out]
            first = sorted(kept[:topk], key=lambda n, q=query: -(cosine[q, n] + 0.5 * scores[q, n]))
            rankings.append([*first, *kept[topk:], *sorted(out)])
        metrics[name] = all_protocols(np.array(rankings), ground_truth)[name]
    return metrics


def test_metrics_follow_the_protocol_for_each_number_of_candidates(evaluate, layout, network, tmp_path):
    outcome = evaluate("TEST.RERANKER", "cvnet", "TEST.TOPK_LIST", "[6, 400]")
    assert outcome.code == 0, outcome.err
    output = tmp_path / "work" / "output"
    folder = kept(output, "roxford5k")
    queries, rows = (np.load(folder / f"roxford5k_{kind}.npy") for kind in ("query", "db"))
    entry = json.loads((latest(output) / "results.json").read_text())["datasets"]["roxford5k"]
    scores = pair_scores(network, layout)
    for topk in (6, 400):
        expected = by_the_book(full_ranking(queries, rows), queries @ rows.T, scores, layout.gnd["gnd"], topk)
        for name, value in expected.items():
            assert entry[f"reranking of {topk}"][name]["mAP"] == pytest.approx(value, abs=1e-6)
    assert "roxford5k, reranking of 6 " in outcome.out
    assert np.load(latest(output) / "roxford5k_reranking_of_400_ranks.npy").shape == (3, 24)


@pytest.mark.parametrize(
    ("arguments", "stages"),
    [
        ((), {"retrieval", "reranking"}),
        (("TEST.RERANKER", "none"), {"retrieval"}),
        (("SupG.rerank", "False"), {"retrieval"}),
        (("TEST.RERANKER", "cvnet"), {"retrieval", "reranking"}),
    ],
)
def test_the_reranker_is_chosen(evaluate, tmp_path, arguments, stages):
    assert evaluate(*arguments).code == 0
    entry = json.loads((latest(tmp_path / "work" / "output") / "results.json").read_text())["datasets"]["roxford5k"]
    assert {name for name in entry if name.startswith("re")} == stages


def test_scores_are_reused_until_an_image_changes(evaluate, layout):
    first = evaluate("TEST.RERANKER", "cvnet")
    again = evaluate("TEST.RERANKER", "cvnet")
    assert "roxford5k_cvnet.npy: reused" in again.out
    lines = [[line for line in each.out.splitlines() if line.startswith("Reranking")] for each in (first, again)]
    assert lines[0] == lines[1]
    layout.image("db_3").write_bytes(layout.image("db_4").read_bytes())
    assert "roxford5k_cvnet.npy: reused" not in evaluate("TEST.RERANKER", "cvnet").out


def test_an_interrupted_run_resumes_at_the_next_query(layout, checkpoint_50, network, tmp_path):
    dataset = load_dataset("roxford5k", layout.data_dir)
    random = torch.Generator().manual_seed(0)
    queries, rows = (torch.nn.functional.normalize(torch.randn(n, 8, generator=random), dim=1) for n in (3, 24))
    searched = retrieve(queries, Database(rows), listed=dataset.listed)
    spare = most_ignored(dataset.ground_truth)

    def score(folder, build):
        class Prepared(Recipe):
            def pair_network(self, device):
                return build()

        folder.mkdir(exist_ok=True)
        pairs = PairScores(Prepared(checkpoint_50), dataset.queries, dataset.database, folder / "scores.npy", 8 + spare)
        ranking = rerank(searched, CVNetReranker(pairs, 8, spare), queries, Database(rows))
        return ranking, np.load(folder / "scores.npy")

    class Interrupted(type(network)):
        asked = 0

        def query_inputs(self, feature_map):
            type(self).asked += 1
            if self.asked == 3:
                raise KeyboardInterrupt
            return super().query_inputs(feature_map)

    def interrupted():
        copy = Interrupted.__new__(Interrupted)
        copy.__dict__.update(network.__dict__)
        return copy

    whole, scores = score(tmp_path / "a", lambda: network)
    with pytest.raises(KeyboardInterrupt):
        score(tmp_path / "b", interrupted)
    resumed, resumed_scores = score(tmp_path / "b", interrupted)
    assert Interrupted.asked == 4  # only those of the last query
    np.testing.assert_allclose(resumed_scores, scores, atol=1e-6, rtol=0)  # batches may differ
    assert torch.equal(whole.ids, resumed.ids)
    whole_metrics, resumed_metrics = (metrics_of(each, dataset.ground_truth) for each in (whole, resumed))
    assert whole_metrics["M"].map == resumed_metrics["M"].map


def test_maps_on_disk_stay_within_their_limit_and_are_reused(layout, network, tmp_path):
    images = load_dataset("roxford5k", layout.data_dir).database
    (first,) = FeatureMaps(network, {}, tmp_path / "one", 1 << 30).of(images[:1])
    limit = 5 * (first[1].nbytes + 128)
    made = dict(FeatureMaps(network, {}, tmp_path / "maps", limit).of(images))
    files = list((tmp_path / "maps").iterdir())
    assert len(files) == 5
    assert sum(file.stat().st_size for file in files) <= limit

    files[0].write_bytes(b"damaged")
    again = FeatureMaps(network, {}, tmp_path / "maps", limit)
    maps = list(again.of(images))
    assert len([number for number, _ in maps[:4] if number < 5]) == 4  # saved maps come first
    for number, each in maps:
        torch.testing.assert_close(each, made[number])
    assert len(list((tmp_path / "maps").iterdir())) == 5
    assert all(file.read_bytes() != b"damaged" for file in (tmp_path / "maps").iterdir())


def test_batches_are_of_equal_sizes_and_hold_every_map():
    maps = [torch.full((2, 3 + number % 2, 4), float(number)) for number in range(9)]
    batches = list(equal_sizes(enumerate(maps), lambda each: 2))
    assert sorted(number for numbers, _ in batches for number in numbers) == list(range(9))
    for numbers, batch in batches:
        assert len(numbers) <= 2
        assert batch[:, 0, 0, 0].tolist() == numbers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("TEST.RERANKER", "colbert"), "TEST.RERANKER"),
        (("TEST.RERANKER", "cvnet", "TEST.TOPK_LIST", "[0]"), "TEST.TOPK_LIST"),
        (
            ("TEST.RERANKER", "cvnet", "TEST.FEATURES", "x.mat"),
            "TEST.FEATURES",
        ),
    ],
)
def test_invalid_candidates_are_rejected(evaluate, arguments, message):
    outcome = evaluate(*arguments)
    assert outcome.code == 2
    assert message in outcome.err


def test_a_damaged_candidate_is_named(evaluate, layout):
    assert evaluate("TEST.RERANKER", "none").code == 0
    content = layout.image("db_7").read_bytes()
    stat = layout.image("db_7").stat()
    layout.image("db_7").write_bytes(b"x" * len(content))
    os.utime(layout.image("db_7"), ns=(stat.st_atime_ns, stat.st_mtime_ns))  # so that its descriptor is reused
    outcome = evaluate("TEST.RERANKER", "cvnet")
    assert outcome.code == 2
    assert "db_7.jpg: not an image" in outcome.err
