"""The benchmarks that tests/test_gpu_benchmark.py does not run, with the smallest problems."""

import re

import pytest
import torch
from conftest import ROOT


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
    plain = extract.plain_network(checkpoint_50, 50, extract.SCALE_SETS[3], device)
    rows = extract.in_batches(extract.extractor("cvnet", checkpoint_50, scales=3), images, 2)
    torch.testing.assert_close(rows, extract.one_by_one(plain, images, device), rtol=0, atol=1e-6)


def test_a_finished_extraction_restarts(tmp_path, capsys):
    import reliability

    reliability.main(["restart", "--images", "30", "--folder", str(tmp_path)])
    assert len(re.findall(r"start: [\d.]+ s, peak [\d.]+ GB", capsys.readouterr().out)) == 2
    assert "reused" in (tmp_path / "log.txt").read_text()
