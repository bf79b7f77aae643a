"""A cache of descriptors by content: every recipe and list of images has a folder of its own."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from extraction.store import jsonable, write_json

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
