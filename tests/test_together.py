"""Several simultaneous runs in one folder: each ends with the correct metrics."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from forked import Forked

pytestmark = pytest.mark.slow  # starts processes


def test_simultaneous_runs_give_the_results_of_single_runs(layout, two_layers, command, tmp_path):
    settings = [(), ("SupG.gemp", "False"), ("TEST.RESUME", "False")]
    data = ("TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k", *two_layers)
    (tmp_path / "together").mkdir()
    runs = [Forked(ROOT / "test.py", [*data, *words], tmp_path / "together") for words in settings]
    assert [run.wait() for run in runs] == [0, 0, 0], [run.err for run in runs]
    for words, run in zip(settings, runs, strict=True):
        alone = command("test.py", *data, *words, "TEST.OUT_DIR", f"alone{words}").out
        lines = [line for line in run.out.splitlines() if "results: mAP" in line]
        assert lines == [line for line in alone.splitlines() if "results: mAP" in line]
        assert len(lines) == 2
    runs = [path for path in (tmp_path / "together" / "output" / "runs").iterdir() if not path.is_symlink()]
    assert len(runs) == len(settings)
    for run in runs:
        assert list(json.loads((run / "results.json").read_text())["datasets"]) == ["roxford5k"]


OWN = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from extraction.owner import owned
keep = owned(Path("."))
keep.__enter__()
"""


def owner(work, then: str) -> subprocess.Popen:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", OWN + then], cwd=work, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )


def test_a_second_run_waits_for_the_first_and_names_it(tmp_path):
    first = owner(tmp_path, "print('owned', flush=True); input()")
    assert first.stdout.readline() == "owned\n"
    second = owner(tmp_path, "print('owned')")
    line = second.stderr.readline()
    assert re.match(rf"\. is in use by process {first.pid} on \S+, started \S+ \(.*\); waiting for it to finish", line)
    first.communicate("\n")
    assert second.communicate() == ("owned\n", "")


def test_a_lock_left_by_a_killed_process_does_not_block(tmp_path):
    first = owner(tmp_path, "print('owned', flush=True); input()")
    first.stdout.readline()
    first.kill()
    first.communicate()
    assert (tmp_path / ".lock.owner").exists()
    assert owner(tmp_path, "print('owned')").communicate(timeout=60) == ("owned\n", "")
