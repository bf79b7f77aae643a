"""What a run says: on the screen, and in log.txt with the date and all that its numbers depend on."""

import importlib.metadata
import logging
import platform
import shlex
import sys
from pathlib import Path
from typing import TextIO

import torch
from yacs.config import CfgNode

from model.errors import InputError

_PACKAGES = ("torch", "torchvision", "numpy", "scipy", "pillow")


def start_log(path: Path, cfg: CfgNode, screen: TextIO | None = None) -> dict:
    """Opens the log (appending) and writes the run's head. Returns the head for results.json.

    Args:
        path: the log file.
        cfg: the run's options.
        screen: where lines are shown; stdout by default.

    Raises:
        InputError: where the file cannot be written.
    """
    screen = screen or sys.stdout
    if hasattr(screen, "reconfigure"):
        screen.reconfigure(errors="backslashreplace")  # a file's name may be no text
    lines = logging.StreamHandler(screen)
    lines.addFilter(lambda record: record.levelno < logging.ERROR)  # errors stand on stderr
    lines.setFormatter(logging.Formatter("%(message)s"))
    try:
        file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise InputError(f"cannot write {path.absolute()} ({error.strerror}); start from a folder of yours") from None
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[lines, file], force=True)
    head = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "config": plain(cfg),
    }
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    for line in (f"command: {head['command']}", f"versions: {versions}", "config:", *cfg.dump().splitlines()):
        file.handle(logging.makeLogRecord({"msg": line, "levelname": "INFO", "levelno": logging.INFO}))
    return head


def device_name(device: torch.device) -> str:
    """The device in words: its kind and the model of the GPU or the number of CPU threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"


def plain(node: CfgNode) -> dict:
    """A config as nested dicts."""
    return {key: plain(value) if isinstance(value, CfgNode) else value for key, value in node.items()}
