"""How a command of this project ends: its exit code, its errors in one line, and output that cannot be written.

Exit codes: 0 success, 1 internal error, 2 bad input, 130 Ctrl-C, 141 the reader of the output has gone. A command may
exit with 1 itself, as tools.reproduce does for a result that differs.

A command imports this file first, so that Ctrl-C ends it without a traceback from the beginning.
"""

# ruff: noqa: E402

import os
import sys


def _end_quietly(kind: type, error: BaseException, trace: object) -> None:
    if issubclass(kind, KeyboardInterrupt):
        os._exit(130)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = _end_quietly  # while the imports of the command run

import errno
import logging
import time
from collections.abc import Callable
from typing import Any, TextIO

from model.errors import InputError, printable

# What a user can mend: permissions, names and places of files, full disks.
_MENDABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.EMFILE, errno.EIO),
)
_MOVE_UP = "\x1b[A"  # what tqdm writes between several bars
_BAR_SECONDS = 60


class _Output:
    """Standard output or error: an error in writing is kept, and what follows is discarded, so that the work goes on.

    Only if the reader of the standard output has closed the pipe is there nobody to work for: BrokenPipeError.
    In a file or pipe, a progress bar has a line a minute, and a shorter one none.
    """

    def __init__(self, stream: TextIO):
        self.stream, self.error = stream, None
        self.bar, self.next_line = "", 0.0  # the latest text of a progress bar, and when it is written
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a file name may not be valid text

    def write(self, text: str) -> int:
        in_file = not self.stream.isatty()
        if in_file and _MOVE_UP in text:
            return len(text)
        of_bar = in_file and (text.startswith("\r") or (self.bar and text == "\n"))
        line = self._bar_line(text) if of_bar else text
        self.bar = self.bar if of_bar else ""
        self._try(lambda: self.stream.write(line))
        return len(text)

    def _bar_line(self, text: str) -> str:
        """Returns what a file gets when a progress bar writes its new state, or ends with a line break."""
        now, bar = time.monotonic(), text.strip() or self.bar
        self.next_line = self.next_line if self.bar else now + _BAR_SECONDS
        self.bar = "" if text == "\n" else bar
        if now < self.next_line:
            return ""
        self.next_line = now + _BAR_SECONDS
        return f"{bar}\n"

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, step: Callable[[], object]) -> None:
        try:
            step()
        except OSError as error:
            self.error = self.error or error
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if isinstance(error, BrokenPipeError) and self is sys.stdout:
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def run_command(main: Callable[[list[str]], None]) -> None:
    """Runs the main function of a command with the words of the command line, and exits unless it succeeds.

    Internal errors pass: Python prints their traceback, and exits with 1.
    """
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:  # it was closed, and the next file to be opened would take its place
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            setattr(sys, name, open(descriptor, "w", closefd=False))  # noqa: SIM115
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Output, before)
    try:
        code = _exit_code(main)
    finally:
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
    if code:
        sys.exit(code)


def _exit_code(main: Callable[[list[str]], None]) -> int:
    try:
        try:
            main(sys.argv[1:])
        finally:
            sys.stdout.flush()
        if sys.stdout.error:
            raise InputError(f"the standard output is cut off ({sys.stdout.error.strerror}); all files are complete")
    except BrokenPipeError:
        return 141
    except KeyboardInterrupt:
        print("\ninterrupted; what was computed is kept, the same command resumes", file=sys.stderr)
        return 130
    except (InputError, OSError) as error:
        if not isinstance(error, InputError) and error.errno not in _MENDABLE:
            raise
        text = str(error) if isinstance(error, InputError) else f"{error.filename or 'a file'}: {error.strerror}"
        text = f"error: {printable(text)}"
        print(text, file=sys.stderr)
        if logging.root.handlers:  # for the log file
            logging.root.error(text)
        return 2
    return 0
