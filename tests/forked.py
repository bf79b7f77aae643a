"""Commands in processes of their own that need not import PyTorch, which takes seconds: forks of the test process."""

import logging
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import free_port


class Forked:
    """A script that runs in a folder as `python SCRIPT ARGUMENTS` would, with one thread.

    Args:
        environment: variables that are added to those of this process.
        prepare: called in the new process before the script.
    """

    def __init__(
        self,
        script: Path,
        arguments: list,
        folder: Path,
        environment: dict[str, str] | None = None,
        prepare: Callable[[], object] = lambda: None,
    ):
        self.pid, self.code = os.fork(), None
        self._files = [folder / f".{self.pid or os.getpid()}.{name}" for name in ("out", "err")]
        if self.pid == 0:
            self._become([str(script), *map(str, arguments)], folder, environment or {}, prepare)

    def _become(self, words: list[str], folder: Path, environment: dict[str, str], prepare: Callable) -> None:
        code: object = 1
        try:
            os.setsid()
            for number, path in enumerate(self._files, 1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
            sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115 - for good
            logging.root.handlers[:] = []
            torch.set_num_threads(1)  # the threads of this library do not survive a fork
            os.environ.update(environment)
            os.chdir(folder)
            sys.argv = words
            prepare()
            runpy.run_path(words[0], run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)

    def poll(self) -> int | None:
        """Returns the exit code, or None while it runs."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        """Waits for the end; returns the exit code."""
        return self._wait(0)

    def _wait(self, how: int) -> int | None:
        if self.code is None and (ended := os.waitpid(self.pid, how))[0]:
            self.code = os.waitstatus_to_exitcode(ended[1])
        return self.code

    def kill(self) -> None:
        """Kills it and all processes that it started."""
        os.killpg(self.pid, signal.SIGKILL)
        self.wait()

    @property
    def out(self) -> str:
        return self._files[0].read_text()

    @property
    def err(self) -> str:
        return self._files[1].read_text()


def ranks(
    count: int, script: Path, arguments: list, folder: Path, prepare: Callable[[], object] = lambda: None
) -> list[Forked]:
    """Starts the processes of a torchrun without its launcher; one process is started without any."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    numbers = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count))
    return [Forked(script, arguments, folder, place | own if count > 1 else None, prepare) for own in numbers]
