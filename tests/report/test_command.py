"""How commands end: exit codes, one line for what a user can mend, and output that is closed, full or not read."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

COMMAND = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from report.command import run_command\n"
# Writes a line on both streams, into the log and on a progress bar between two steps of its work.
WORK = """
from pathlib import Path
from tqdm import tqdm
from report.log import logging, start_log
def main(argv):
    start_log(Path("log.txt"), {"TEST": {"OPTION": 3}})
    print("a", flush=True)
    print("b", file=sys.stderr)
    for line in tqdm(["first", "second"]):
        logging.info(line)
    open("done", "w").write(argv[0])
"""


def run(code: str, how: str = "", cwd: object = None) -> subprocess.CompletedProcess:
    """Runs a command in a shell, with its streams redirected."""
    words = [f'exec {sys.executable} -c "$CODE" text {how}']
    environment = {**os.environ, "CODE": f"{COMMAND}{code}\nrun_command(main)"}
    return subprocess.run(words, shell=True, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("body", "code", "err"),
    [
        ("print('done')", 0, ""),
        ("from model.errors import InputError; raise InputError('no file \\x1b x')", 2, "error: no file \\x1b x\n"),
        ("open('/nowhere/x')", 2, "error: /nowhere/x: No such file or directory\n"),
        ("raise KeyboardInterrupt", 130, "\ninterrupted; what was computed is kept, the same command resumes\n"),
        ("raise BrokenPipeError", 141, ""),
    ],
)
def test_the_exit_code_tells_how_a_command_ended(body, code, err):
    done = run(f"def main(argv):\n {body}")
    assert (done.returncode, done.stderr) == (code, err)


def test_an_internal_error_has_a_traceback():
    done = run("def main(argv):\n 1 / 0")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_ctrl_c_during_the_imports_leaves_no_traceback():
    done = run(f"import os; os.kill(os.getpid(), {signal.SIGINT:d})\nwhile True: pass")  # 3.10 takes a moment
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.parametrize("how", [">&-", "2>&-", "<&- >&- 2>&-", "> /dev/full", "2> /dev/full", "> /dev/full 2>&-"])
def test_output_that_cannot_be_written_loses_no_work(how, tmp_path):
    done = run(WORK, how, tmp_path)
    assert (tmp_path / "done").read_text() == "text"
    assert done.returncode == (2 if how.startswith("> /dev/full") else 0)
    assert "Traceback" not in done.stderr
    log = (tmp_path / "log.txt").read_text()
    assert all(text in log for text in ("OPTION: 3", "INFO first", "INFO second"))


def test_a_pipe_that_its_reader_has_closed_ends_the_command_quietly():
    code = f"{COMMAND}def main(argv):\n while True: print('a' * 1000)\nrun_command(main)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_in_a_file_a_progress_bar_has_a_line_a_minute_and_nothing_stands_before_an_error():
    bars = "[x for leave in (True, False) for x in tqdm(range(9), mininterval=0, miniters=1, leave=leave)]"
    code = f"from tqdm import tqdm\ndef main(argv):\n {bars}\n raise InputError('no bar')"
    assert run(f"from model.errors import InputError\n{code}").stderr == "error: no bar\n"
    lines = run(f"import report.command as c\nc._BAR_SECONDS = 0\nfrom model.errors import InputError\n{code}").stderr
    assert "\r" not in lines
    assert lines.count("9/9") >= 2
