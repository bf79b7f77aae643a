"""The benchmarks, with the smallest problems."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT

from revisitop.layouts import load_dataset

pytestmark = pytest.mark.slow  # runs the benchmarks


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def test_search_streams_to_the_dense_ranking_in_any_number_of_processes(tmp_path, capsys):
    import search

    problem = ["--folder", str(tmp_path), "--rows", "2000", "--dim", "16", "--queries", "3", "--repeat", "1"]
    search.main(["stream", *problem])
    search.main(["indexes", *problem, "--indexes", "Flat", "IVF8,Flat", "--plot", str(tmp_path / "plot.svg")])
    out = capsys.readouterr().out
    assert "the same results: True" in out
    places, ranks = re.search(r"([\d.]+)% of the places .* (\d+) at most", out).groups()
    assert float(places) > 99
    assert int(ranks) <= 1
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| `")]
    assert len(rows) == 4
    assert rows[0][2:5] == ["1.000", "10.00", "10.00"]  # of the exact index
    assert (tmp_path / "plot.svg").exists()


def test_the_baseline_of_extraction_computes_the_same_descriptors(checkpoint_50):
    import extract

    device = torch.device("cpu")
    images = extract.draw_images(2, 64, 48, device)
    plain = extract.PlainNetwork(checkpoint_50, 50, extract.SCALE_SETS[3]).to(device)
    rows = extract.in_batches(extract.extractor("cvnet", checkpoint_50, scales=3), images, 2)
    torch.testing.assert_close(rows, extract.one_by_one(plain, images, device), rtol=0, atol=1e-6)


def test_a_finished_extraction_restarts(tmp_path, capsys):
    import reliability

    reliability.main(["restart", "--images", "30", "--folder", str(tmp_path)])
    assert len(re.findall(r"start: [\d.]+ s, peak [\d.]+ GB", capsys.readouterr().out)) == 2
    assert "reused" in (tmp_path / "log.txt").read_text()


def test_every_part_runs_on_a_cpu_and_equals_it(tmp_path, monkeypatch, capsys):
    """But for the extraction of files, which starts commands that have tests of their own."""
    import gpu

    def broken(run) -> None:
        raise ValueError("a part that fails does not end the others")

    parts = {name: part for name, part in gpu.PARTS.items() if name != "files"}
    monkeypatch.setattr(gpu, "PARTS", {"broken": broken, **parts})
    gpu.main(["--device", "cpu", "--small", "--out", str(tmp_path / "gpu.json")])
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert list(kept["failures"]) == ["broken"]
    equal = {name: value for name, value in kept["figures"].items() if "the CPU's" in name or "the paper's" in name}
    assert len(equal) == 15
    assert set(equal.values()) == {1.0}
    out = capsys.readouterr().out
    assert [name for name in gpu.PARTS if f"\n{name} (" not in out] == []
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    header = next(line for line in (ROOT / "benchmarks" / "README.md").read_text().splitlines() if "| of the f" in line)
    assert len(rows) == 9
    assert {row.count("|") for row in rows} == {header.count("|")}


FEW = {"camera.png": (1, 1), "chelsea.png": (1, 1), "coffee.png": (1, 2), "motorcycle_left.png": (1, 1)}
FEW |= {"china.jpg": (1, 1), "flower.jpg": (1, 1)}


def test_the_trained_network_finds_the_views_of_a_photograph(tmp_path):
    import photographs

    photographs.draw_dataset(tmp_path, 0, FEW, views=6, side=96)
    dataset = load_dataset("photographs_0", tmp_path)
    difference = {"easy": 0.0, "hard": 0.0}
    for query, truth in zip(dataset.queries, dataset.ground_truth, strict=True):
        for kind in difference:
            views = [dataset.database[number].read().astype(float) for number in truth.kinds[kind]]
            difference[kind] += sum(np.abs(view - query.read()).mean() for view in views)
    assert difference["hard"] > 1.2 * difference["easy"]
    (found,) = photographs.evaluate(tmp_path, ["photographs_0"], photographs.SETTINGS["+ ReLU+"])
    assert found["retrieval"]["M"]["mAP"] > 70
