import json
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

# Without packages that the machine may lack.
WITHOUT = "import runpy, sys; sys.modules.update(dict.fromkeys(['yacs', 'torchvision', 'timm', 'scipy'], None))\n"
RUN = f"sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); runpy.run_path(sys.argv[0], run_name='__main__')"


def run(*arguments: str) -> str:
    script = str(ROOT / "benchmarks" / "gpu.py")
    environment = {name: value for name, value in os.environ.items() if name != "OUT"}
    program = f"{WITHOUT}sys.argv = [{script!r}, *sys.argv[1:]]\n{RUN}"
    done = subprocess.run(
        [sys.executable, "-c", program, "--device", "cpu", *arguments],
        env={**environment, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[str, dict]:
    file = tmp_path_factory.mktemp("gpu") / "gpu.json"
    return run("--small", "--out", str(file)), json.loads(file.read_text())


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")  # which they set: not for the tests that follow
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def test_every_part_gives_a_result_or_the_reason_for_none(results):
    printed, kept = results
    assert kept["failures"] == {}
    reasons = {name for name, lines in kept["lines"].items() if lines == ["this needs a GPU"]}
    assert reasons == {"synchronisations", "out_of_memory"}
    for name, lines in kept["lines"].items():
        assert f"\n{name} (" in printed
        assert name in reasons or any(re.search(r": [\d,.e+-]+ ", f"{line} ") for line in lines), lines
    assert len(kept["lines"]) == 10


def test_results_equal_to_the_cpus_are_equal_on_a_cpu(results):
    _, kept = results
    equal = {name: value for name, value in kept["figures"].items() if "the CPU's" in name or "the paper's" in name}
    assert len(equal) == 11
    assert set(equal.values()) == {1.0}


def test_the_rows_fit_the_table_of_the_readme(results):
    rows = [line for line in results[0].splitlines() if line.startswith("| ")]
    assert len(rows) == 8
    header = next(line for line in (ROOT / "benchmarks" / "README.md").read_text().splitlines() if "| of the f" in line)
    assert {row.count("|") for row in rows} == {header.count("|")}


def test_a_part_that_would_not_fit_is_skipped_with_a_message():
    printed = run("--minutes", "0")
    assert printed.count("skipped: it takes about") == 10
    assert "FAILED" not in printed


def test_an_error_does_not_end_the_parts_that_follow(benchmarks, tmp_path, capsys):
    from gpu import SMALL, Visit

    visit = Visit(torch.device("cpu"), SMALL, tmp_path)
    visit.lines["a part"] = []
    with visit.attempt("one"):
        torch.zeros(2) @ torch.zeros(3)
    with visit.attempt("other"):
        visit.figure("a figure", 2, "x", at_least=3)
    assert list(visit.failures) == ["one"]
    assert visit.figures == {"a figure": 2}
    assert re.search(r"one FAILED, RuntimeError: .*\n  a figure: 2 x   \[goal >= 3: missed\]", capsys.readouterr().out)


def test_waits_for_the_device_are_counted_by_the_line_that_causes_them(benchmarks):
    from gpu import counted_synchronisations

    def waits() -> None:
        for _ in range(3):
            warnings.warn(
                "called a synchronizing CUDA operation (Triggered internally at CUDAFunctions.cpp)", stacklevel=1
            )
        warnings.warn("something else", stacklevel=1)

    ((where, count),) = counted_synchronisations(waits).items()
    assert count == 3
    assert re.match(r"tests/test_gpu_benchmark\.py:\d+ warnings\.warn", where)


def test_the_counts_are_those_of_the_operators(benchmarks, capsys):
    from count import main

    main(["--size", "64x48", "--batch", "2", "--scales", "1", "--queries", "2", "--m", "40"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    launches = {row[0]: row[2] for row in rows}
    assert launches["convolution"] == "53"  # those of ResNet-50
    assert (launches["shortcut"], launches["bias"], launches["clamp"]) == ("0", "3", "3")  # the others are fused
    assert int(launches["matrix product"]) >= 3
    for table in (rows[1:9], rows[9:]):
        parts = [int(row[2]) for row in table if row[2].isdecimal()]
        assert sum(parts[:-1]) == parts[-1]


def test_bytes_are_those_of_inputs_and_outputs(benchmarks):
    from count import Count

    count = Count(("bias", "any"), lambda name, file: "any")
    with FakeTensorMode(), torch.no_grad():
        x, weight = torch.empty(1, 8, 4, 4, device="cuda:0"), torch.empty(6, 8, 1, 1, device="cuda:0")
        bias, shortcut = torch.empty(6, device="cuda:0"), torch.empty(1, 6, 4, 4, device="cuda:0")
        geometry = ([1, 1], [0, 0], [1, 1], 1)
        with count:
            torch.nn.functional.conv2d(x, weight, bias)
        plain = 4 * (128 + 48 + 6 + 96)
        assert count.moved == {"any": plain, "bias": 4 * 2 * 96}
        with count:
            torch.cudnn_convolution_relu(x, weight, bias, *geometry)
        assert count.moved == {"any": 2 * plain, "bias": 4 * 2 * 96}
        with count:
            out = torch.cudnn_convolution_add_relu(x, weight, shortcut, 1.0, bias, *geometry)
            x.view(8, 16).expand(2, 8, 16)
        assert count.moved == {"any": 3 * plain + 4 * 96, "bias": 4 * 2 * 96}
        assert count.launches == {"any": 3, "bias": 1}
        assert (out.shape, str(out.device)) == ((1, 6, 4, 4), "cuda:0")
        with count:
            out + torch.empty(1, 6, 1, 1, device="cuda:0").expand(1, 6, 4, 4)
        assert count.moved["any"] == 3 * plain + 4 * (96 + 96 + 6 + 96)
