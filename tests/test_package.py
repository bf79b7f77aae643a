"""The package as pip installs it: `superglobal` from the folder modules/, and the command `superglobal`."""

import importlib
import os
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT

NAMES = ("GeMPlus", "RegionalGeM", "ScaleGeM", "ReLUPlus", "SuperGlobalReranker", "attach")


BENCH = ("test.py", "extract_rop1m.py", "config.py", "assembly.py", "*/*.py", "*/*.html", "*/*.css")
BENCH += ("revisitop/published.json", "modules/py.typed")
COMMANDS = {
    "test", "extract_rop1m", "cache", "check", "compare", "demo", "download", "evaluate", "rerank", "search",
    "tables", "tune", "whiten",
}  # fmt: skip


@pytest.fixture(scope="session")
def wheel(built) -> dict[str, bytes]:
    """The files in the wheel."""
    with zipfile.ZipFile(built[0]) as file:
        return {name: file.read(name) for name in file.namelist()}


def test_the_wheel_holds_the_modules_and_the_code_of_the_commands(wheel):
    files = {name for name in wheel if ".dist-info/" not in name}
    bench = {path.relative_to(ROOT) for pattern in BENCH for path in ROOT.glob(pattern)}
    bench = {path for path in bench if path.parts[0] not in ("tests", "docs", "benchmarks", "examples")}
    modules = ["py.typed", *(path.name for path in (ROOT / "modules").glob("*.py"))]
    assert files == {f"superglobal/{name}" for name in modules} | {f"superglobal_bench/{path}" for path in bench}


def test_the_modules_need_torch_alone_and_the_commands_the_requirements(wheel):
    (metadata,) = (text.decode() for name, text in wheel.items() if name.endswith("METADATA"))
    needed = re.findall("^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    assert [each for each in needed if ";" not in each] == ["torch>=2.6"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    expected = [f'{line}; extra == "bench"' for line in lines if line and not line.startswith("#")]
    assert [each for each in needed if ";" in each] == expected


def test_the_sdist_installs_what_the_wheel_holds(wheel, site):
    installed = {path.relative_to(site).as_posix(): path.read_bytes() for path in site.rglob("*") if path.is_file()}
    assert [name for name in wheel if not name.endswith("RECORD") and installed.get(name) != wheel[name]] == []
    others = [
        name for name in installed.keys() - wheel.keys() if "__pycache__" not in name and ".dist-info" not in name
    ]
    assert others == ["bin/superglobal"]


def installed_command(site, folder, *words, python=(), path=()) -> subprocess.CompletedProcess:
    """Runs `superglobal WORDS` in a folder."""
    return subprocess.run(
        [sys.executable, *python, site / "bin" / "superglobal", *words], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, site)))}, check=False,
    )  # fmt: skip


def test_the_command_lists_its_commands_without_waiting_for_torch(site, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('PyTorch is loaded')")
    shown = installed_command(site, tmp_path, path=[tmp_path])
    lines = re.findall(r"^  (\w+) +[A-Z]\S* \w.*[a-z)]", shown.stdout, re.MULTILINE)
    assert (shown.returncode, set(lines)) == (0, COMMANDS), shown
    usage = installed_command(site, tmp_path, "test", "--help", path=[tmp_path]).stdout
    assert usage.startswith("usage: superglobal test ")
    assert "\nsuperglobal test TEST.DATASET_LIST" in usage
    assert "python " not in usage.replace("--no-python ", "")


def test_an_unknown_command_is_refused_in_one_line_with_the_valid_names(site, tmp_path):
    done = installed_command(site, tmp_path, "serach")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert set(re.findall(r"\w+", line)) > COMMANDS


def test_without_the_extra_the_command_says_what_to_install(site, tmp_path):
    done = installed_command(site, tmp_path, "rerank", python=["-S"])
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "scipy" in line
    assert 'pip install "superglobal[bench]"' in line


def test_an_installed_command_runs_and_writes_in_the_current_folder_alone(site, tmp_path):
    def code() -> dict:
        return {path: path.stat().st_mtime_ns for path in site.rglob("*") if "__pycache__" not in path.parts}

    before = code()
    rows = np.eye(8, dtype=np.float32)
    np.save(tmp_path / "q.npy", rows[:2])
    np.save(tmp_path / "d.npy", rows[::-1])
    words = ["--queries", "q.npy", "--database", "d.npy", "--out", "ranks.npy", "SupG.rerank_k", "3"]
    done = installed_command(site, tmp_path, "rerank", *words)
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "ranks.npy")[:, 0].tolist() == [7, 6]
    assert {path.name for path in tmp_path.iterdir()} == {"q.npy", "d.npy", "ranks.npy", "log.txt"}
    assert "command: superglobal rerank --queries" in (tmp_path / "log.txt").read_text()
    assert code() == before


def run_installed(site, folder, code: str) -> str:
    """Returns the output of the code in a new process with PyTorch and the installed package, outside the checkout."""
    hidden = "import sys\nsys.modules.update(dict.fromkeys(['torchvision', 'yacs', 'modules', 'model', 'PIL'], None))\n"
    done = subprocess.run(
        [sys.executable, "-c", hidden + code], cwd=folder, env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_imports_without_torchvision_yacs_and_this_checkout(site, tmp_path):
    out = run_installed(site, tmp_path, f"from superglobal import {', '.join(NAMES)}\nprint(attach.__module__)")
    assert out == "superglobal.attach\n"


def test_the_readmes_ten_lines_run(site, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "from superglobal import" in block]
    assert len(code.splitlines()) <= 12
    out = run_installed(site, tmp_path, code)
    assert "1: ReLU() -> ReLUPlus(threshold=0.014)" in out
    assert "tensor([[" in out


def test_the_installed_package_computes_the_papers_values(site, monkeypatch, reference):
    monkeypatch.syspath_prepend(site)
    installed = importlib.import_module("superglobal")
    assert str(site) in installed.__file__
    layers = [
        (installed.RegionalGeM(), "pool_in", "rgem_out"),
        (installed.GeMPlus(), "pool_in", "gemp_out"),
        (installed.ScaleGeM(), "sgem_in", "sgem_max_out"),
        (installed.ScaleGeM(p=10), "sgem_in", "sgem_p10_out"),
        (installed.ReLUPlus(), "relup_in", "relup_out"),
    ]
    for layer, given, expected in layers:
        out = layer(torch.from_numpy(reference[given]))
        np.testing.assert_allclose(out.numpy(), reference[expected], atol=2e-6, rtol=0)
        assert layer.state_dict() == {}
    queries, rows = reference["rerank_Q"], reference["rerank_X"]
    ids = installed.search(torch.from_numpy(queries), torch.from_numpy(rows), m=len(rows)).ids.numpy()
    reranker = installed.SuperGlobalReranker(m=400, k=9, beta=0.15)
    order = reranker.rerank(queries, ids, lambda wanted: rows[wanted]).order
    ids[:, :400] = np.take_along_axis(ids, order, axis=1)
    np.testing.assert_array_equal(ids.T, reference["rerank_ranks_M400_K9_b0.15"])
