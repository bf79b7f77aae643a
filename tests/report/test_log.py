"""A run whose screen cannot be written keeps its results and its log."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

RUN = """
import sys
from pathlib import Path
from tqdm import tqdm
from report.command import run_command
from report.log import logging, start_log

def main(argv):
    start_log(Path("log.txt"), {"TEST": {"OPTION": 3}})
    for line in tqdm(["first", "second"]):
        logging.info(line)
    Path("result").write_text("kept")

run_command(main)
"""


@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&-", "> /dev/full", "> /dev/full 2>&-"])
def test_a_closed_or_full_screen_loses_no_results(tmp_path, streams):
    if "/dev/full" in streams and not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    (tmp_path / "run.py").write_text(RUN)
    done = subprocess.run(
        f"'{sys.executable}' run.py {streams}", shell=True, cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode in (0, 2)
    assert (tmp_path / "result").read_text() == "kept"
    assert "Traceback" not in done.stderr
    log = (tmp_path / "log.txt").read_text()
    assert all(text in log for text in ("OPTION: 3", "INFO first", "INFO second"))
