"""The exception for bad input, how a command exits because of it, and how commands are typed."""

import errno
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

INSTALLED = "superglobal "  # the beginning of sys.argv[0] in the installed command
_MENDABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.EMFILE, errno.EIO),
)


class InputError(ValueError):
    """Bad input; the message is one line that says what is wrong, where, and what to do.

    Args:
        problem: what is wrong, and where.
        **advice: arguments with which the same call would work, such as ``depth=101``; any one of them is
            enough. A command names its option instead, see :meth:`in_options`.
    """

    def __init__(self, problem: str, **advice: Any):
        super().__init__(problem)
        self.problem, self.advice = problem, advice

    def __str__(self) -> str:
        return self._with([f"{name}={value!r}" for name, value in self.advice.items()])

    def in_options(self, options: Mapping[str, Callable[[Any], str]]) -> str:
        """Returns the message for the user of a command.

        Args:
            options: for each argument that is an option of the command, a function from its value to the
                option as it is typed. Advice about other arguments is left out.
        """
        return self._with([options[name](value) for name, value in self.advice.items() if name in options])

    def about(self, subject: str) -> "InputError":
        """Returns the same error prefixed with its subject, for example the name of an option."""
        return InputError(f"{subject}: {self.problem}", **self.advice)

    def _with(self, ways: list[str]) -> str:
        return f"{self.problem}; try {' or '.join(ways)}" if ways else self.problem


def printable(text: object) -> str:
    """Returns the text on one line, with control characters written as escapes."""
    return "".join(
        char if char.isprintable() or 0xDC80 <= ord(char) <= 0xDCFF else char.encode("unicode_escape").decode()
        for char in str(text)
    )


def short_list(items: Sequence, shown: int = 5) -> str:
    """Returns the first few items as text: 'a, b, c and 4 more'."""
    text = ", ".join(str(item) for item in items[:shown])
    return text if len(items) <= shown else f"{text} and {len(items) - shown} more"


def as_typed(text: str) -> str:
    """Returns the text with commands as they are typed in this process: in a checkout or in the installed package."""
    if not sys.argv[0].startswith(INSTALLED):
        return text
    text = re.sub(r"(torchrun\b.*?) (test|extract_rop1m)\.py", rf"\1 --no-python {INSTALLED}\2", text)
    return re.sub(r"python (?:-m tools\.(\w+)|(test|extract_rop1m)\.py)", rf"{INSTALLED}\1\2", text)


def command_line() -> str:
    """Returns the command line of this process, as it can be typed again."""
    if sys.argv[0].startswith(INSTALLED):
        return f"{sys.argv[0]} {shlex.join(sys.argv[1:])}"
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    script = ["-m", spec.name] if spec is not None and spec.name.startswith("tools.") else sys.argv[:1]
    return shlex.join([Path(sys.executable).name, *script, *sys.argv[1:]])


def run_command(main: Callable[[list[str]], None], options: Mapping[str, Callable[[Any], str]] | None = None) -> None:
    """Runs the main function of a command with sys.argv; exits with 2 for bad input, 130 for Ctrl-C.

    Any other exception is an internal error: Python prints the traceback and exits with 1.

    Args:
        main: the function, which takes the arguments.
        options: how the command names the advice of an error, see InputError.in_options.
    """
    for name in ("stdout", "stderr"):  # the first file that is opened would take the place of a closed one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (InputError, OSError) as error:
        if isinstance(error, InputError):
            text = f"error: {printable(as_typed(error.in_options(options or {})))}"
        elif error.errno in _MENDABLE:
            text = f"error: {printable(error.filename or 'a file')}: {error.strerror}"
        else:
            raise
        print(text, file=sys.stderr)
        if logging.root.handlers:  # for the log file
            logging.root.error(text)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
