"""The log of a run: on the screen, and in log.txt with the date and everything its results depend on."""

import importlib.metadata
import logging
import platform
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import yaml

from model.errors import InputError, command_line, printable

_PACKAGES = ("torch", "torchvision", "numpy", "scipy", "pillow")


class _LogFile(logging.FileHandler):
    """A log file that, if it cannot be written, ends the run with one message instead of a traceback per line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            logging.root.removeHandler(self)
            raise InputError(f"cannot write {self.baseFilename} ({error.strerror}); all other files are kept")
        super().handleError(record)


class _Screen(logging.StreamHandler):
    """Log lines on the screen, see report.command: only a pipe that its reader has closed raises an exception."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            raise
        super().handleError(record)


class _OneLine(logging.Formatter):
    """Escapes control characters and line breaks, which may occur in file names."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def start_log(path: Path, config: dict[str, Any], screen: TextIO | None = None) -> dict[str, Any]:
    """Opens the log for appending, writes the head of the run, and returns it: date, command, versions, config.

    Args:
        path: the log file.
        config: the options of the run, as nested dicts.
        screen: where lines are shown; stdout by default.

    Raises:
        InputError: if the file cannot be written.
    """
    lines = _Screen(screen or sys.stdout)
    lines.addFilter(lambda record: record.levelno < logging.ERROR)  # errors go to stderr
    lines.setFormatter(_OneLine("%(message)s"))
    try:
        file = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise InputError(
            f"cannot write {path.absolute()} ({error.strerror}); start from a folder that you can write to"
        ) from None
    file.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[file, lines], force=True)
    versions = package_versions()
    date, command = datetime.now().isoformat(timespec="seconds"), command_line()
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    for line in (f"command: {command}", f"versions: {listed}", "config:", *yaml.safe_dump(config).splitlines()):
        file.handle(logging.makeLogRecord({"msg": line, "levelname": "INFO", "levelno": logging.INFO}))
    return {"date": date, "command": command, "versions": versions, "config": config}


def package_versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that results depend on, by name."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _PACKAGES}}
