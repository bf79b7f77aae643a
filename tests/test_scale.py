import runpy

import pytest
from conftest import ROOT


@pytest.fixture
def scale() -> dict:
    return runpy.run_path(str(ROOT / "benchmarks" / "scale.py"))


def test_costs_follow_from_the_rates(scale):
    lines = scale["table"](extraction=100, search=8192e6, rerank=0.005, reads=1000, memory=8192e6)
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:4] for line in lines if line.startswith("|")}
    assert cells["extraction, GPU hours"] == ["3", "278", "2,778"]
    assert cells["rows, float32"] == ["8.19 GB", "819 GB", "8.19 TB"]
    assert cells["machines that hold them, float32"] == ["1", "100", "1,000"]
    assert cells["exact search with 70 queries on these, float32"] == ["1 s"] * 3
    assert cells["reading its 400 rows from a disk"] == ["400 ms"] * 3


@pytest.mark.parametrize(("size", "words"), [(64, "64 B"), (8192, "8.19 kB"), (2e12, "2 TB"), (5e15, "5e+03 TB")])
def test_sizes_are_formatted_with_units(scale, size, words):
    assert scale["amount"](size) == words
