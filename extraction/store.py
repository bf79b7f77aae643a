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
import logging
import os
import shutil
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from extraction.files import reserve, write_array, write_atomically, write_json
from extraction.identity import KEY_BYTES, Identity, last_places, rows_fingerprint, stat_record
from extraction.provenance import Provenance, is_unchanged, read_provenance, sidecars
from model.checkpoint import load_tensors
from model.errors import InputError, reason_of, short_list

log = logging.getLogger(__name__)

_BLOCK_ROWS, _BLOCK_SECONDS = 512, 20.0
_HASHED_ROWS = 64  # rows with one hash in a finished file
_CACHED_BLOCKS = 16
FILE_FACTS = ("rows", "fingerprint", "file", "skipped")  # what a provenance file says of its own file
NO_KEY = bytes(KEY_BYTES)  # of a row of zeros, for an image that could not be read


class Records(NamedTuple):
    """What rows were made from: labels (N,) bytes, keys (N, 16) uint8, stats (N, 4) int64.

    Arrays, because a million objects of Python would take more memory than the libraries and the network.
    """

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

    def with_label(self, labels: np.ndarray) -> np.ndarray:
        """Returns the number of the last record with each of the labels, -1 for none. (N,) -> (N,)."""
        return last_places(self.labels, labels)

    def with_key(self, keys: np.ndarray) -> np.ndarray:
        """Returns the number of the last record with each of the keys, -1 for none. (N, 16) -> (N,)."""
        return last_places(*(np.ascontiguousarray(each).view(f"S{KEY_BYTES}").ravel() for each in (self.keys, keys)))


class Store:
    """Rows (D,) float32 by key, in a finished file and in blocks beside it.

    Args:
        path: the finished file, .npy or .pth (one tensor).
        dim: D.
        provenance: what all rows depend on beside their images.
        replace: whether rows of another provenance are replaced; else they are an error.

    A new store has no rows: call :meth:`read` to use existing ones, or :meth:`clear` to start over. A process that
    only adds rows, for another one to finish, needs neither.
    """

    def __init__(self, path: Path, dim: int, provenance: Provenance, replace: bool = True):
        self.path, self.dim, self.provenance, self.replace = path, dim, provenance, replace
        self.folder = Path(f"{path}.blocks")
        self._files: list[Path] = []
        self._cache: OrderedDict[Path, np.ndarray] = OrderedDict()
        self._buffer: list[tuple[bytes, Identity, np.ndarray]] = []
        self._flushed = time.monotonic()
        self._finished = False  # whether there is a finished file, whole and of this provenance
        # For each known row its record, and the numbers of its file and of the row there, in parts.
        self._parts = [(Records.of([], []), np.zeros((0, 2), np.int64))]

    @property
    def records(self) -> Records:
        """The records of all known rows, the newest last."""
        if len(self._parts) > 1:
            records, places = zip(*self._parts, strict=True)
            self._parts = [(Records(*map(np.concatenate, zip(*records, strict=True))), np.concatenate(places))]
        return self._parts[0][0]

    def read(self) -> None:
        """Reads the rows of the finished file and of the blocks.

        Raises:
            InputError: if there are rows of another provenance that are not to be replaced.
        """
        for file in dict.fromkeys((self.path, _rows_file(self.path))):
            _publish(file)
            self._read_finished(file)
        self.read_blocks()

    def clear(self) -> None:
        """Removes the blocks; a finished file is kept until the new one is finished."""
        if self.folder.exists():
            _remove_blocks(self.folder)

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Returns which rows are known. (N, 16) uint8 -> (N,) bool."""
        return self.records.with_key(keys) >= 0

    def rows(self, keys: np.ndarray) -> np.ndarray:
        """Returns the rows with these keys, zeros for unknown ones. (N, 16) uint8 -> (N, D)."""
        return self._rows(self.records.with_key(keys))

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
                write_array(self.folder / "probe.npy", self.provenance.probe)
                write_json(self.folder / "provenance.json", self.provenance.settings)
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
        for file in sorted({*self.folder.glob("*.npz")} - {*self._files}):
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

    def finish(self, records: Records, facts: dict | None = None) -> bool:
        """Makes the finished file of all rows of a list, and removes the blocks. Returns whether its rows changed.

        Args:
            records: of the images, in order; the row of an image with the key NO_KEY is zero.
            facts: added to the provenance file.

        Raises:
            InputError: if there is no room; all rows are kept.
        """
        same: dict[str, bool] = {}
        if self._finished:
            with np.load(sidecars(self.path)[1]) as content:
                same = {name: np.array_equal(each, content[name]) for name, each in records._asdict().items()}
        same_rows = same.get("keys", False)
        try:
            if not same_rows:
                file, numbers = _rows_file(self.path), self.records.with_key(records.keys)
                self._write_file(file, records, facts, lambda out: self._write_rows(out, numbers))
                if file != self.path:
                    self._finished = False
                    self.clear()
                    self._write_file(self.path, records, facts, lambda out: torch.save(load_rows(file), out))
                    for each in (file, *sidecars(file)):
                        each.unlink(missing_ok=True)
            elif not all(same.values()):  # renamed images, or new stat records
                self._describe(self.path, records, facts)
        except OSError as error:
            raise InputError(f"cannot write {self.path} ({error.strerror or error}); all rows are kept") from None
        self.clear()
        self._finished = True
        return not same_rows

    def _write_file(
        self, file: Path, records: Records, facts: dict | None, write: Callable[[BinaryIO], object]
    ) -> None:
        """Writes a file and what belongs to it beside an older one, and then replaces that, see _publish."""
        new = Path(f"{file}.new")
        sidecars(new)[0].unlink(missing_ok=True)  # that of a file which an interrupted run did not publish
        try:
            with new.open("wb") as out:
                write(out)
                out.flush()
                os.fsync(out.fileno())
        except (OSError, RuntimeError) as error:  # the latter is raised by torch.save if the disk is full
            new.unlink(missing_ok=True)  # it would stay in the way there
            raise error if isinstance(error, OSError) else OSError(str(error)) from None
        self._describe(new, records, facts)
        _publish(file)
        _trust(file)

    def _write_rows(self, out: BinaryIO, numbers: np.ndarray) -> None:
        """Writes rows in the format of .npy, and keeps the hashes of their blocks."""
        shape, hashes = (len(numbers), self.dim), []
        np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": shape})
        out.flush()
        reserve(out, out.tell() + 4 * shape[0] * shape[1])
        for start in range(0, len(numbers), _HASHED_ROWS):
            rows = self._rows(numbers[start : start + _HASHED_ROWS])
            out.write(rows.tobytes())
            hashes.append(_hash(rows))
        self._hashes = np.stack(hashes) if hashes else np.zeros((0, KEY_BYTES), np.uint8)

    def _describe(self, file: Path, records: Records, facts: dict | None) -> None:
        """Writes what the file was made from, and the stat record with which it is trusted."""
        provenance, images = sidecars(file)
        content = {**records._asdict(), "hashes": self._hashes, "probe": self.provenance.probe}
        write_atomically(images, lambda out: np.savez(out, **content))
        own = {"rows": len(records.labels), "fingerprint": rows_fingerprint(self._hashes)}
        write_json(provenance, {**self.provenance.settings, **own, **(facts or {}), "file": stat_record(file.stat())})

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
            self._finished, self._hashes = True, hashes

    def _belongs(self, files: Path, provenance: Path, probe: Path) -> bool:
        """Returns whether existing files have the provenance of this store; others are removed, unless finished."""
        # Blocks without a provenance are of unknown settings. In this order: another process may be writing its first.
        absent = not any(files.glob("*.npz")) and not provenance.exists()
        differing = self.provenance.differences(provenance, probe)
        if differing == []:
            return True
        if differing is None and absent:
            if files.is_file() and not self.replace:
                raise InputError(f"{files} exists without its provenance; start over, or choose another file")
            return False
        words = short_list(differing or [f"{provenance} is missing or damaged"])
        if not self.replace and (files.is_file() or any(files.glob("*.npz"))):
            raise InputError(f"{files} was made with other settings ({words}); start over, or choose another file")
        log.warning("%s was made with other settings (%s); it is replaced", files, words)
        if files.is_dir():
            _remove_blocks(files)
        return False

    def _add(self, file: Path, records: Records, usable: np.ndarray | None = None) -> None:
        numbers = np.arange(len(records.labels)) if usable is None else np.flatnonzero(usable)
        if len(numbers) < len(records.labels):
            records = Records(*(each[numbers] for each in records))
        part = records, np.stack([np.full(len(numbers), len(self._files)), numbers], axis=1)
        self._parts = [part] if not self._files else [*self._parts, part]  # the first may have a million rows: no copy
        self._files.append(file)

    def _rows(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the rows with these numbers among the records, zeros for -1. (N,) -> (N, D)."""
        rows, known = np.zeros((len(numbers), self.dim), np.float32), np.flatnonzero(numbers >= 0)
        for row, (file, number) in zip(known, self._parts[0][1][numbers[known]].tolist(), strict=True):
            rows[row] = self._rows_of(self._files[file])[number]
        return rows

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
    (folder / "provenance.json").unlink(missing_ok=True)
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
    if not is_unchanged(file):
        write_json(sidecars(file)[0], {**(read_provenance(file) or {}), "file": stat_record(file.stat())})


def _hashes_of(content: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the hashes of the blocks of rows, (B, KEY_BYTES) uint8."""
    return np.asarray(content["hashes"], np.uint8).reshape(-1, KEY_BYTES)


def damaged_rows(path: Path, rows: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Returns which rows of a finished file differ from the hashes of their blocks, (N,) bool.

    None do as long as the file has the stat record with which it is trusted.
    """
    damaged = np.zeros(len(rows), dtype=bool)
    if not is_unchanged(path):
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
