import importlib.util
import sys

import numpy as np
import pytest
from conftest import ROOT

from revisitop.layouts import load_dataset

FEW = {"camera.png": (1, 1), "chelsea.png": (1, 1), "coffee.png": (1, 2), "motorcycle_left.png": (1, 1)}
FEW |= {"china.jpg": (1, 1), "flower.jpg": (1, 1)}
SCRIPT = "benchmarks/photographs.py"


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(ROOT / "benchmarks"))  # for its import of alternate.py
    try:
        spec = importlib.util.spec_from_file_location("photographs", ROOT / SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return module


@pytest.fixture(scope="module")
def drawn(benchmark, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    benchmark.draw_dataset(folder, 0, FEW, views=6, side=96)
    return folder


def test_the_set_is_the_same_every_time_and_for_any_other_landmarks(benchmark, drawn, tmp_path):
    fewer = benchmark.draw_dataset(tmp_path, 0, dict(list(FEW.items())[:3]), views=6, side=96)
    for path in (fewer / "jpg").iterdir():
        assert path.read_bytes() == (drawn / "photographs_0" / "jpg" / path.name).read_bytes()
    other = benchmark.draw_dataset(tmp_path, 1, {"camera.png": (1, 1)}, views=6, side=96)
    assert (other / "jpg" / "camera_0_03.jpg").read_bytes() != (fewer / "jpg" / "camera_0_03.jpg").read_bytes()


def test_every_landmark_has_easy_and_hard_views_and_hard_ones_differ_more(drawn):
    dataset = load_dataset("photographs_0", drawn)
    assert len(dataset.queries) == 7
    listed = np.concatenate([truth.listed for truth in dataset.ground_truth])
    assert listed.tolist() == list(range(len(dataset.database)))
    difference = {"easy": 0.0, "hard": 0.0}
    for query, truth in zip(dataset.queries, dataset.ground_truth, strict=True):
        pixels = query.read().astype(float)
        assert pixels.shape == (96, 96, 3)
        for kind in difference:
            assert len(truth.kinds[kind]) == 3
            difference[kind] += sum(
                np.abs(dataset.database[number].read() - pixels).mean() for number in truth.kinds[kind]
            )
    assert difference["hard"] > 1.2 * difference["easy"]


def test_the_trained_network_finds_the_views_of_a_photograph(benchmark, drawn):
    (found,) = benchmark.evaluate(drawn, ["photographs_0"], benchmark.SETTINGS["+ ReLU+"])
    assert found["retrieval"]["M"]["mAP"] > 70
    line = benchmark.row("GeM+", [found["retrieval"], found["reranking"]])
    assert line.count("|") == 5
    assert f"{max(found[stage]['E']['mAP'] for stage in ('retrieval', 'reranking')):.1f})" in line


@pytest.mark.parametrize("package", ["skimage", "sklearn"])
def test_a_missing_package_is_one_line_that_says_what_to_install(command, monkeypatch, tmp_path, package):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setitem(sys.modules, package, None)
    outcome = command(SCRIPT, "--folder", tmp_path)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert package in outcome.err
    assert "pip install -r tests/requirements.txt" in outcome.err
