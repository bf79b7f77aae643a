"""The error for bad input, how a command ends on it, and how it is typed."""

import errno
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

INSTALLED = "superglobal "  # starts sys.argv[0] where the installed command runs
_MENDABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.EMFILE, errno.EIO),
)


class InputError(ValueError):
    """Bad input, in one line: what is wrong, where, and what to do.

    Args:
        problem: what is wrong, and where.
        **advice: arguments with which the same call would work, ``depth=101`` say; any one of them will
            do. A command says its own option instead, see :meth:`in_options`.
    """

    def __init__(self, problem: str, **advice: Any):
        super().__init__(problem)
        self.problem, self.advice = problem, advice

    def __str__(self) -> str:
        return self._with([f"{name}={value!r}" for name, value in self.advice.items()])

    def in_options(self, options: Mapping[str, Callable[[Any], str]]) -> str:
        """Returns the line for a command's user.

        Args:
            options: for each argument that the command has an option for, the option with that value as it
                is typed. Advice that the command has no option for is left out.
        """
        return self._with([options[name](value) for name, value in self.advice.items() if name in options])

    def about(self, subject: str) -> "InputError":
        """Returns the same error with what it is about before it: an option's name, say."""
        return InputError(f"{subject}: {self.problem}", **self.advice)

    def _with(self, ways: list[str]) -> str:
        return f"{self.problem}; try {' or '.join(ways)}" if ways else self.problem


def printable(text: object) -> str:
    """Returns the text on one line, without characters that a terminal would obey: they are written as escapes."""
    return "".join(
        char if char.isprintable() or 0xDC80 <= ord(char) <= 0xDCFF else char.encode("unicode_escape").decode()
        for char in str(text)
    )


def short_list(items: Sequence, shown: int = 5) -> str:
    """The first few items in words: 'a, b, c and 4 more'."""
    text = ", ".join(str(item) for item in items[:shown])
    return text if len(items) <= shown else f"{text} and {len(items) - shown} more"


def as_typed(text: str) -> str:
    """Returns the text with our commands as they are typed here: in a checkout, or those of the installed package."""
    if not sys.argv[0].startswith(INSTALLED):
        return text
    text = re.sub(r"(torchrun\b.*?) (test|extract_rop1m)\.py", rf"\1 --no-python {INSTALLED}\2", text)
    return re.sub(r"python (?:-m tools\.(\w+)|(test|extract_rop1m)\.py)", rf"{INSTALLED}\1\2", text)


def command_line() -> str:
    """The command line of this process, as it can be typed again."""
    if sys.argv[0].startswith(INSTALLED):
        return f"{sys.argv[0]} {shlex.join(sys.argv[1:])}"
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    script = ["-m", spec.name] if spec is not None and spec.name.startswith("tools.") else sys.argv[:1]
    return shlex.join([Path(sys.executable).name, *script, *sys.argv[1:]])


def run_command(main: Callable[[list[str]], None], options: Mapping[str, Callable[[Any], str]] | None = None) -> None:
    """Runs a command line's main with sys.argv; exits with 2 for bad input, 130 for Ctrl-C.

    Any other exception is an internal error: Python prints its traceback and exits with 1.

    Args:
        main: takes the arguments.
        options: how the command says what an error advises, see InputError.in_options.
    """
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # who reads our lines has enough of them
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
        if logging.root.handlers:  # the log file gets it, too
            logging.root.error(text)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
