"""Descriptors by content: a folder for each recipe and list of images, that no other setting ever touches."""

import hashlib
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.store import jsonable, write_json

_MADE_FROM = "made_from.json"


def content_folder(root: Path, name: str, made_from: dict[str, Any]) -> Path:
    """Returns the folder root/<name>-<fingerprint>, made if it is not there, with made_from.json in it.

    Args:
        root: of all such folders.
        name: what a person knows the images by; characters that a file name may not have everywhere become "_".
        made_from: all that the content depends on beside the image files, as JSON can hold it.
    """
    facts = jsonable(made_from)
    folder = root / f"{plain_name(name)}-{fingerprint(facts)}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / _MADE_FROM).exists():
        write_json(folder / _MADE_FROM, facts)
    return folder


def fingerprint(facts: Any) -> str:
    """Returns 12 hexadecimal digits of the SHA-256 of the facts as JSON with sorted keys."""
    text = json.dumps(jsonable(facts), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def plain_name(name: str, longest: int = 60) -> str:
    """Returns the name with letters, digits, dots, plus and minus signs alone, cut to `longest` characters."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", name)[:longest]


@dataclass(frozen=True)
class Kept:
    """A folder of descriptors.

    Attributes:
        folder: its path.
        size: bytes of its files.
        used: when its files were last written, in seconds since 1970.
        complete: whether every file in it is finished.
        made_from: the content of made_from.json; empty if it cannot be read.
    """

    folder: Path
    size: int
    used: float
    complete: bool
    made_from: dict[str, Any]


def kept_descriptors(root: Path) -> list[Kept]:
    """Returns the folders of descriptors below `root`, by name."""
    return [_kept(folder) for folder in sorted(root.iterdir()) if folder.is_dir()] if root.is_dir() else []


def _kept(folder: Path) -> Kept:
    files = [file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")]
    stats = [file.stat() for file in files]
    try:
        made_from = json.loads((folder / _MADE_FROM).read_text())
    except (OSError, ValueError):
        made_from = {}
    return Kept(
        folder,
        sum(stat.st_size for stat in stats),
        max((stat.st_mtime for stat in stats), default=time.time()),
        not any(file.suffix == ".part" for file in files),
        made_from if isinstance(made_from, dict) else {},
    )
