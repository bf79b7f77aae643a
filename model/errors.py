"""The error for what a user can mend, and how a command ends on it."""

import errno
import logging
import sys
from collections.abc import Callable, Sequence

_MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


class InputError(ValueError):
    """Bad input, in one line: what is wrong, where, and what to do."""


def short_list(items: Sequence, shown: int = 5) -> str:
    """The first few items in words: 'a, b, c and 4 more'."""
    text = ", ".join(str(item) for item in items[:shown])
    return text if len(items) <= shown else f"{text} and {len(items) - shown} more"


def run_command(main: Callable[[list[str]], None]) -> None:
    """Runs a command line's main with sys.argv; ends with 2 for what the user can mend, 130 for Ctrl-C.

    Any other exception is a fault of ours: Python prints its traceback and exits with 1.
    """
    try:
        main(sys.argv[1:])
    except (InputError, OSError) as error:
        if not isinstance(error, InputError) and error.errno not in _MENDABLE:
            raise
        text = f"error: {error}" if isinstance(error, InputError) else f"error: {error.filename}: {error.strerror}"
        print(text, file=sys.stderr)
        if logging.root.handlers:  # the log file gets it, too
            logging.root.error(text)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
