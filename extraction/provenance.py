"""What rows were made from beside their images: settings, and the code, which a probe stands for.

The settings are a JSON file beside the rows. The probe is the descriptors of small drawn images, which the extractor
computes anew before rows are used again: if they differ, something else computes now.
"""

import hashlib
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from extraction.files import jsonable, read_json
from extraction.identity import file_identity, stat_record
from model.errors import InputError


class Provenance(NamedTuple):
    """What rows depend on beside their images.

    Attributes:
        settings: as JSON.
        probe: (P, D), unit rows that depend on the code that computes the rows.
        tolerance: the largest difference from 1 of the cosine of two probes of the same code.
    """

    settings: dict[str, Any]
    probe: np.ndarray
    tolerance: float = 1e-8

    def differences(self, provenance: Path, probe: Path | None) -> list[str] | None:
        """Returns in what saved rows differ, as text; None if their provenance file is missing or damaged.

        Args:
            provenance: their settings, a JSON file.
            probe: the .npy file of their probe, or the .npz file that contains it; None compares the settings only.
        """
        try:
            before = read_json(provenance)
        except InputError:
            return None
        return differences(before, jsonable(self.settings)) or ([] if probe is None else self._differs(probe))

    def _differs(self, file: Path) -> list[str]:
        """Returns in one entry that the code differs, if the probes of equal settings do; else nothing."""
        try:
            content = np.load(file)
            before = content["probe"] if isinstance(content, np.lib.npyio.NpzFile) else content
            if before.shape != self.probe.shape:
                raise ValueError
            distance = float(((before.astype(np.float64) - self.probe) ** 2).sum(axis=1).max() / 2)
        except Exception:  # missing or damaged, for which NumPy raises many exceptions
            return ["the probe of the code is missing, damaged, or of another shape"]
        if distance <= self.tolerance:  # which NaN is not
            return []
        return [f"the code: the same settings give other descriptors now, cosine {1 - distance:.6f}"]


def differences(before: dict, now: dict) -> list[str]:
    """Returns the entries of `now` whose values differ in `before`, as text. Extra keys in `before` are ignored."""

    def shown(value: Any) -> str:
        if value is None:
            return "off"
        return f"{value[:12]}…" if isinstance(value, str) and len(value) > 20 else str(value)

    return [
        f"{key}: {shown(before.get(key))} before, {shown(value)} now"
        for key, value in now.items()
        if before.get(key) != value
    ]


def sidecars(path: Path) -> tuple[Path, Path]:
    """Returns the files beside a finished file: of its provenance, and of its images."""
    return Path(f"{path}.json"), Path(f"{path}.images.npz")


def read_provenance(path: Path) -> dict | None:
    """Returns the content of the provenance file of a finished file, or None if it is missing or damaged."""
    with suppress(InputError):
        return read_json(sidecars(path)[0])
    return None


def is_unchanged(path: Path) -> bool:
    """Returns whether a finished file has the stat record with which it is trusted."""
    return (read_provenance(path) or {}).get("file") == list(stat_record(path.stat()))


def file_fingerprint(path: Path) -> str:
    """Returns the fingerprint of the rows in a file: from its provenance while that stands, else of its content."""
    if is_unchanged(path) and (fingerprint_of_rows := (read_provenance(path) or {}).get("fingerprint")):
        return fingerprint_of_rows
    with path.open("rb") as file:
        return file_identity(file).key.hex()


def content_folder(root: Path, name: str, settings: dict[str, Any]) -> Path:
    """Returns the folder root/<name>-<fingerprint>, which is created if needed.

    Args:
        root: the parent of all such folders.
        name: a readable name; characters that are not portable in file names become "_".
        settings: everything that the content depends on except code and images, as JSON.
    """
    folder = root / f"{plain_name(name)}-{fingerprint(settings)}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fingerprint(facts: Any) -> str:
    """Returns the first 12 hexadecimal digits of the SHA-256 of the facts as JSON with sorted keys."""
    text = json.dumps(jsonable(facts), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def plain_name(name: str) -> str:
    """Returns the name reduced to letters, digits, dots, plus and minus signs, and cut to 60 characters."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", name)[:60]
