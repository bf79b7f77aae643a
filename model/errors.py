"""The exception for bad input, and texts for messages and logs."""

import difflib
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path


class InputError(ValueError):
    """Bad input; the message is one line that says what is wrong, where, and what to do."""

    def __str__(self) -> str:
        return printable(super().__str__())  # names that it quotes may contain a line break


def reason_of(error: BaseException) -> str:
    """Returns the first line of the message of an exception, or its type if it has no message."""
    return (str(error) or type(error).__name__).splitlines()[0]


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


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns 'did you mean NAME?' with the most similar of the known names; '' if none is similar."""
    lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), lower)
    near.sort(key=lambda other: not other.startswith(name.lower()))
    return f"did you mean {lower[near[0]]}?" if near else ""


def command_line() -> str:
    """Returns the command line of this process, as it can be typed again."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    script = ["-m", spec.name] if spec is not None and spec.name.startswith("tools.") else sys.argv[:1]
    return shlex.join([Path(sys.executable).name, *script, *sys.argv[1:]])
