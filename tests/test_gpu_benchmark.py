import json

import pytest
from conftest import ROOT


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    return gpu


def test_every_part_runs_on_a_cpu_and_equals_it(gpu, tmp_path, monkeypatch, capsys):
    def broken(run) -> None:
        raise ValueError("a part that fails does not end the others")

    monkeypatch.setattr(gpu, "PARTS", {"broken": broken, **gpu.PARTS})
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
