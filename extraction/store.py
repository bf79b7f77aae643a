"""Rows on disk that survive an interruption at any moment, and are found by the key of what they were made from.

While a list is incomplete, its rows are in a folder of blocks, some hundreds each, in any order, by any number of
processes or machines:

    NAME.npy.blocks/provenance.json, probe.npy      the settings, and the descriptors of two drawn images
    NAME.npy.blocks/<random>.npz                    rows, and for each its key, the label of its image, its stat record

When all rows exist, they become, in the order of the list:

    NAME.npy (or .pth)          (N, D) float32
    NAME.npy.json               its provenance, and the file's own stat record
    NAME.npy.images.npz         keys, labels and stat records of the rows, hashes of blocks of rows, the probe

Rows are used again only if the settings are equal and the probe, computed anew, is the same: code is a setting, too.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from extraction.files import jsonable, reserve, write_array, write_atomically, write_json
from extraction.identity import KEY_BYTES, Identity, file_identity, rows_fingerprint, stat_record
from model.checkpoint import load_tensors
from model.errors import InputError, reason_of, short_list

log = logging.getLogger(__name__)

_BLOCK_ROWS, _BLOCK_SECONDS = 512, 20.0
_HASHED_ROWS = 64  # rows with one hash in a finished file
_CACHED_BLOCKS = 16
FILE_FACTS = ("rows", "fingerprint", "file", "skipped")  # what a provenance file says of its own file
NO_KEY = bytes(KEY_BYTES)  # of a row of zeros, for an image that could not be read


class Records(NamedTuple):
    """What rows were made from: labels (N,) bytes, keys (N, 16) uint8, stats (N, 4) int64."""

    labels: np.ndarray
    keys: np.ndarray
    stats: np.ndarray

    @classmethod
    def of(cls, labels: Sequence[bytes], identities: Sequence[Identity]) -> "Records":
        keys = np.frombuffer(b"".join(each.key for each in identities), np.uint8).reshape(-1, KEY_BYTES)
        stats = np.array([each.stat for each in identities], np.int64).reshape(-1, 4)
        return cls(np.array(labels, np.bytes_), keys, stats)

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> "Records":
        """Returns the records in the arrays of a file. Raises ValueError if they are not records."""
        labels, keys, stats = arrays = [np.asarray(content[name]) for name in cls._fields]
        shapes = [(labels.size,), (labels.size, KEY_BYTES), (labels.size, 4)]
        kinds = [labels.dtype.kind, keys.dtype, stats.dtype]
        if [each.shape for each in arrays] != shapes or kinds != ["S", np.uint8, np.int64]:
            raise ValueError("it has other arrays than records of images")
        return cls(labels, keys, stats)

    def items(self) -> Iterator[tuple[bytes, Identity]]:
        """Iterates over the labels and identities, of which there may be a million."""
        for label, key, stat in zip(self.labels, self.keys, self.stats, strict=True):
            yield bytes(label), Identity(bytes(key), tuple(stat.tolist()))


class Store:
    """Rows (D,) float32 by key, in a finished file and in blocks beside it.

    Args:
        path: the finished file, .npy or .pth (one tensor).
        dim: D.
        provenance: the settings of all rows, as JSON.
        probe: (P, D'), unit rows that depend on the code that computes the rows.
        tolerance: the largest difference from 1 of the cosine of the same probe.
        replace: whether rows of other settings are replaced; else they are an error.

    A new store has no rows: call :meth:`read` to use existing ones, or :meth:`clear` to start over. A process that
    only adds rows, for another one to finish, needs neither.

    Attributes:
        identities: by label, the identity that its row had when it was made.
    """

    def __init__(
        self,
        path: Path,
        dim: int,
        provenance: dict[str, Any],
        probe: np.ndarray,
        tolerance: float = 1e-8,
        replace: bool = True,
    ):
        self.path, self.dim, self.provenance, self.probe = path, dim, jsonable(provenance), probe
        self.tolerance, self.replace = tolerance, replace
        self.folder = Path(f"{path}.blocks")
        self.identities: dict[bytes, Identity] = {}
        self._places: dict[bytes, tuple[Path, int]] = {}  # the file and the number of the row of each key
        self._cache: OrderedDict[Path, np.ndarray] = OrderedDict()
        self._buffer: list[tuple[bytes, Identity, np.ndarray]] = []
        self._flushed = time.monotonic()
        self._finished: Records | None = None
        self._known_blocks: set[Path] = set()

    def read(self) -> None:
        """Reads the rows of the finished file and of the blocks.

        Raises:
            InputError: if there are rows of other settings that are not to be replaced.
        """
        for file in dict.fromkeys((self.path, _rows_file(self.path))):
            _publish(file)
            self._read_finished(file)
        self.read_blocks()

    def clear(self) -> None:
        """Removes the blocks; a finished file is kept until the new one is finished."""
        if self.folder.exists():
            _remove_blocks(self.folder)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def row(self, key: bytes) -> np.ndarray:
        """Returns the row with this key, (D,)."""
        file, number = self._places[key]
        return self._rows_of(file)[number]

    def identity(self, label: bytes, stat: tuple[int, ...]) -> Identity | None:
        """Returns the identity of an image if its label and stat record are known; else it must be read."""
        known = self.identities.get(label)
        return known if known is not None and known.stat == stat else None

    def write(self, label: bytes, identity: Identity, row: np.ndarray) -> None:
        """Adds a row; rows are written to disk together, every few seconds."""
        self._buffer.append((label, identity, row))
        if len(self._buffer) >= _BLOCK_ROWS or time.monotonic() - self._flushed > _BLOCK_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes the buffered rows to disk, as a block."""
        self._flushed = time.monotonic()
        if not self._buffer:
            return
        labels, identities, rows = zip(*self._buffer, strict=True)
        records, file = Records.of(labels, identities), self.folder / f"{uuid.uuid4().hex}.npz"
        try:
            if not (self.folder / "provenance.json").exists():
                self.folder.mkdir(exist_ok=True)
                write_array(self.folder / "probe.npy", self.probe)
                write_json(self.folder / "provenance.json", self.provenance)
            content = {**records._asdict(), "rows": np.stack(rows).astype(np.float32)}
            write_atomically(file, lambda out: np.savez(out, **content))
        except OSError as error:
            raise InputError(f"{self.folder} cannot be written ({error.strerror or error})") from None
        self._buffer = []
        self._add(file, records)

    def read_blocks(self) -> None:
        """Reads the blocks that were written since the last call, by this process or others."""
        if not self._belongs(self.folder, self.folder / "provenance.json", self.folder / "probe.npy"):
            return
        for file in sorted(set(self.folder.glob("*.npz")) - self._known_blocks):
            try:
                with np.load(file) as content:  # verifies a checksum of each array
                    rows, records = content["rows"], Records.read(content)
                if rows.shape != (len(records.labels), self.dim) or rows.dtype != np.float32:
                    raise ValueError("its shape does not fit")
            except Exception as error:  # damaged archives raise almost any exception
                log.warning("%s is damaged (%s); its rows are extracted again", file, error)
                file.unlink()
                continue
            self._add(file, records)

    @property
    def finished_keys(self) -> list[bytes]:
        """The keys of the finished file, in order; empty without an intact one."""
        return [] if self._finished is None else [bytes(key) for key in self._finished.keys]

    def finish(self, labels: Sequence[bytes], identities: Sequence[Identity], facts: dict | None = None) -> bool:
        """Makes the finished file of all rows of a list, and removes the blocks. Returns whether its rows changed.

        Args:
            labels: the labels of the images, in order.
            identities: their identities; the row of an image with the key NO_KEY is zero.
            facts: added to the provenance file.

        Raises:
            InputError: if there is no room; all rows are kept.
        """
        records, done = Records.of(labels, identities), self._finished
        same_rows = done is not None and np.array_equal(records.keys, done.keys)
        if done is not None and same_rows:
            if not all(map(np.array_equal, records, done)):  # renamed images, or new stat records
                self._describe(self.path, records, facts)
        else:
            file = _rows_file(self.path)
            try:
                self._write_rows(file, records, facts)
                if file != self.path:
                    self._finished = None
                    self.clear()
                    _save_tensor(self.path, load_rows(file))
                    self._describe(self.path, records, facts)
                    for each in (file, *sidecars(file)):
                        each.unlink(missing_ok=True)
            except OSError as error:
                reason = error.strerror or reason_of(error)
                raise InputError(f"cannot write {self.path} ({reason}); all rows are kept") from None
        self.clear()
        self._finished = records
        return not same_rows

    def _write_rows(self, file: Path, records: Records, facts: dict | None) -> None:
        new, shape, hashes = Path(f"{file}.new"), (len(records.labels), self.dim), []
        sidecars(new)[0].unlink(missing_ok=True)  # that of a file which an interrupted run did not publish
        with new.open("wb") as out:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(out, header)
            out.flush()
            reserve(out, out.tell() + 4 * shape[0] * shape[1])
            for start in range(0, shape[0], _HASHED_ROWS):
                rows = np.zeros((min(_HASHED_ROWS, shape[0] - start), self.dim), np.float32)
                for row, key in zip(rows, map(bytes, records.keys[start : start + len(rows)]), strict=True):
                    if key != NO_KEY:
                        row[:] = self.row(key)
                out.write(rows.tobytes())
                hashes.append(_hash(rows))
            out.flush()
            os.fsync(out.fileno())
        self._hashes = np.stack(hashes) if hashes else np.zeros((0, KEY_BYTES), np.uint8)
        self._describe(new, records, facts)
        _publish(file)
        _trust(file)

    def _describe(self, file: Path, records: Records, facts: dict | None) -> None:
        """Writes what the file was made from, and the stat record with which it is trusted."""
        provenance, images = sidecars(file)
        content = {**records._asdict(), "hashes": self._hashes, "probe": self.probe}
        write_atomically(images, lambda out: np.savez(out, **content))
        own = {"rows": len(records.labels), "fingerprint": rows_fingerprint(self._hashes)}
        write_json(provenance, {**self.provenance, **own, **(facts or {}), "file": stat_record(file.stat())})

    def _read_finished(self, file: Path) -> None:
        """Adds the rows of a finished file, without those that are damaged."""
        provenance, images = sidecars(file)
        if not file.is_file() or not self._belongs(file, provenance, images):
            return
        try:
            with np.load(images) as content:
                records, hashes = Records.read(content), _hashes_of(content)
            rows = load_rows(file).numpy()
            if rows.shape != (len(records.labels), self.dim) or rows.dtype != np.float32:
                raise ValueError("its shape does not fit")
        except Exception as error:  # NumPy's and PyTorch's readers raise almost any exception
            log.warning("%s is damaged (%s); its rows are extracted again", file, reason_of(error))
            return
        intact = ~damaged_rows(file, rows, hashes)
        if intact.all():
            _trust(file)
        else:
            log.warning("%s: %d rows are damaged; they are extracted again", file, (~intact).sum())
        self._cache[file] = rows
        self._add(file, records, intact & records.keys.any(axis=1))
        if intact.all() and file == self.path:
            self._finished, self._hashes = records, hashes

    def _belongs(self, files: Path, provenance: Path, probe: Path) -> bool:
        """Returns whether existing files have the settings of this store, and were computed by the same code."""
        try:
            before = json.loads(provenance.read_text())
            if not isinstance(before, dict):
                raise ValueError("it has no JSON object")
            with_probe = np.load(probe)
            old_probe = with_probe["probe"] if isinstance(with_probe, np.lib.npyio.NpzFile) else with_probe
        except FileNotFoundError:
            before = old_probe = None
        except Exception:  # damaged files raise almost any exception
            log.warning("%s is damaged", provenance)
            before = old_probe = None
        if before is None or old_probe is None:
            if files.exists() and not self.replace and not files.is_dir():
                raise InputError(f"{files} exists without its provenance; start over, or choose another file")
            if provenance.exists() and files.is_dir():  # rows of unknown settings
                _remove_blocks(files)
            return False
        differing = differences(before, self.provenance) or _code_differs(old_probe, self.probe, self.tolerance)
        if not differing:
            return True
        if not self.replace:
            raise InputError(
                f"{files} was made with other settings ({short_list(differing)}); start over, or choose another file"
            )
        log.warning("%s was made with other settings (%s); it is replaced", files, short_list(differing))
        if files.is_dir():
            _remove_blocks(files)
        return False

    def _add(self, file: Path, records: Records, usable: np.ndarray | None = None) -> None:
        self._known_blocks.add(file)
        for number, (label, identity) in enumerate(records.items()):
            if usable is None or usable[number]:
                self._places[identity.key] = file, number
                self.identities[label] = identity

    def _rows_of(self, file: Path) -> np.ndarray:
        if file not in self._cache:
            with np.load(file) as content:
                self._cache[file] = content["rows"]
            while len(self._cache) > _CACHED_BLOCKS:
                self._cache.pop(next(each for each in self._cache if each.suffix == ".npz"))
        return self._cache[file]


def _remove_blocks(folder: Path) -> None:
    """Removes a folder of blocks; it may be interrupted: the provenance stays as long as there is a block."""
    for block in folder.glob("*.npz"):
        block.unlink()
    shutil.rmtree(folder)


def _publish(file: Path) -> None:
    """Replaces a file by the one that was written beside it, if that is complete; it may be interrupted.

    The provenance of the new file is written last and renamed last.
    """
    new = Path(f"{file}.new")
    provenance, images = sidecars(new)
    if provenance.exists():
        for source, target in zip((images, new, provenance), (sidecars(file)[1], file, sidecars(file)[0]), strict=True):
            if source.exists():
                os.replace(source, target)


def _trust(file: Path) -> None:
    """Records the stat record with which the file is trusted."""
    provenance, stat = read_provenance(file) or {}, list(stat_record(file.stat()))
    if provenance.get("file") != stat:
        write_json(sidecars(file)[0], {**provenance, "file": stat})


def sidecars(path: Path) -> tuple[Path, Path]:
    """Returns the files beside a finished file: of its provenance, and of its images."""
    return Path(f"{path}.json"), Path(f"{path}.images.npz")


def content_folder(root: Path, name: str, provenance: dict[str, Any]) -> Path:
    """Returns the folder root/<name>-<fingerprint>, which is created if needed.

    Args:
        root: the parent of all such folders.
        name: a readable name; characters that are not portable in file names become "_".
        provenance: everything that the content depends on except code and images, as JSON.
    """
    folder = root / f"{plain_name(name)}-{fingerprint(provenance)}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fingerprint(facts: Any) -> str:
    """Returns the first 12 hexadecimal digits of the SHA-256 of the facts as JSON with sorted keys."""
    text = json.dumps(jsonable(facts), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def plain_name(name: str, longest: int = 60) -> str:
    """Returns the name reduced to letters, digits, dots, plus and minus signs, and cut to `longest` characters."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", name)[:longest]


def read_provenance(path: Path) -> dict | None:
    """Returns the provenance of a finished file, or None if it has no provenance file."""
    try:
        content = json.loads(sidecars(path)[0].read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _hashes_of(content: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the hashes of the blocks of rows, (B, KEY_BYTES) uint8."""
    return np.asarray(content["hashes"], np.uint8).reshape(-1, KEY_BYTES)


def damaged_rows(path: Path, rows: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Returns which rows of a finished file differ from the hashes of their blocks, (N,) bool.

    None do as long as the file has the stat record with which it is trusted.
    """
    damaged = np.zeros(len(rows), dtype=bool)
    if (read_provenance(path) or {}).get("file") != list(stat_record(path.stat())):
        for number, start in enumerate(range(0, len(rows), _HASHED_ROWS)):
            block = rows[start : start + _HASHED_ROWS]
            damaged[start : start + len(block)] = not np.array_equal([_hash(block)], hashes[number : number + 1])
    return damaged


def check_rows(path: Path, rows: np.ndarray) -> None:
    """Compares the rows of a file with the hashes beside it, if there are any.

    Raises:
        InputError: if rows are damaged.
    """
    try:
        with np.load(sidecars(path)[1]) as content:
            hashes = _hashes_of(content)
    except Exception:  # missing or damaged, for which NumPy raises many exceptions
        return
    if count := damaged_rows(path, rows, hashes).sum():
        raise InputError(f"{path}: {count} of {len(rows)} rows are damaged or were replaced; extract them again")


def file_fingerprint(path: Path) -> str:
    """Returns the fingerprint of the rows in a file: from its provenance while that stands, else of its content."""
    provenance = read_provenance(path) or {}
    if provenance.get("fingerprint") and provenance.get("file") == list(stat_record(path.stat())):
        return provenance["fingerprint"]
    with path.open("rb") as file:
        return file_identity(file).key.hex()


def provenance_differences(path: Path, provenance: dict, probe: np.ndarray, tolerance: float) -> list[str] | None:
    """Returns in what a finished file differs from these settings and this probe, or None without a provenance."""
    before = read_provenance(path)
    if before is None:
        return None
    differing = differences(before, jsonable(provenance))
    try:
        with np.load(sidecars(path)[1]) as content:
            old_probe = content["probe"]
    except Exception:  # missing or damaged: only the settings are compared
        return differing
    return differing or _code_differs(old_probe, probe, tolerance)


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


def _code_differs(before: np.ndarray, now: np.ndarray, tolerance: float) -> list[str]:
    """Returns in one entry that the code differs, if the probes of equal settings do; else nothing."""
    distance = probe_distance(before, now)
    if distance <= tolerance:
        return []
    return [f"the code: the same settings give other descriptors now, cosine {1 - distance:.6f}"]


def probe_distance(before: np.ndarray, now: np.ndarray) -> float:
    """Returns the largest 1 - cosine of two probes of unit rows; infinity if they have other shapes, or NaN."""
    if not isinstance(before, np.ndarray) or before.shape != now.shape or before.dtype.kind != "f":
        return np.inf
    distance = float(((before.astype(np.float64) - now) ** 2).sum(axis=1).max() / 2)
    return np.inf if np.isnan(distance) else distance


def _hash(rows: np.ndarray) -> np.ndarray:
    return np.frombuffer(hashlib.blake2b(rows.tobytes(), digest_size=KEY_BYTES).digest(), np.uint8)


def _rows_file(path: Path) -> Path:
    """Returns the .npy file in which rows are collected: the finished file, or one beside NAME.pth."""
    return path if path.suffix == ".npy" else Path(f"{path}.npy")


def load_rows(path: Path) -> Tensor:
    """Returns the rows of a finished file, memory-mapped."""
    rows = load_tensors(path) if path.suffix == ".pth" else torch.from_numpy(np.load(path, mmap_mode="c"))
    if not isinstance(rows, Tensor):
        raise ValueError("it is not one tensor")
    return rows


def _save_tensor(path: Path, rows: Tensor) -> None:
    """Writes rows as one tensor, atomically. torch.save writes the file's name into it: a fixed one is used."""
    folder = Path(f"{path}.new")
    folder.mkdir(exist_ok=True)
    try:
        torch.save(rows, folder / "descriptors.pth")
        with (folder / "descriptors.pth").open("rb") as file:
            os.fsync(file.fileno())
        os.replace(folder / "descriptors.pth", path)
    except RuntimeError as error:  # raised by torch.save if the disk is full
        raise OSError(str(error)) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
