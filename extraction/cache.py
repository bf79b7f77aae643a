"""A cache of descriptors by content: every recipe and list of images has a folder of its own."""

import hashlib
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extraction.files import jsonable, read_json, write_json
from model.errors import InputError

_MADE_FROM = "made_from.json"


def content_folder(root: Path, name: str, made_from: dict[str, Any]) -> Path:
    """Returns the folder root/<name>-<fingerprint>, which is created if needed and contains made_from.json.

    Args:
        root: the parent of all such folders.
        name: a readable name of the images; characters that are not portable in file names become "_".
        made_from: everything the content depends on except the image files, as JSON.
    """
    facts = jsonable(made_from)
    folder = root / f"{plain_name(name)}-{fingerprint(facts)}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / _MADE_FROM).exists():
        write_json(folder / _MADE_FROM, facts)
    return folder


def fingerprint(facts: Any) -> str:
    """Returns the first 12 hexadecimal digits of the SHA-256 of the facts as JSON with sorted keys."""
    text = json.dumps(jsonable(facts), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def plain_name(name: str, longest: int = 60) -> str:
    """Returns the name reduced to letters, digits, dots, plus and minus signs, and cut to `longest` characters."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", name)[:longest]


@dataclass(frozen=True)
class Kept:
    """A folder of descriptors.

    Attributes:
        folder: its path.
        size: the size of its files in bytes.
        used: the time of the last write to its files, in seconds since 1970.
        complete: whether all its files are finished.
        made_from: the content of made_from.json; empty if it cannot be read.
    """

    folder: Path
    size: int
    used: float
    complete: bool
    made_from: dict[str, Any]


def kept_descriptors(root: Path) -> list[Kept]:
    """Returns the folders of descriptors in `root`, sorted by name."""
    return [_kept(folder) for folder in sorted(root.iterdir()) if folder.is_dir()] if root.is_dir() else []


def _kept(folder: Path) -> Kept:
    files = [file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")]
    stats = [file.stat() for file in files]
    try:
        made_from = read_json(folder / _MADE_FROM)
    except InputError:
        made_from = {}
    return Kept(
        folder,
        sum(stat.st_size for stat in stats),
        max((stat.st_mtime for stat in stats), default=time.time()),
        not any(file.suffix == ".part" for file in files),
        made_from,
    )
