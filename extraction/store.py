"""Descriptors on disk that survive an interruption at any moment, a power cut included.

While a list of images is being extracted, two files exist beside the future `NAME.npy` or `NAME.pth`:

    NAME.npy.part       the rows in their final order, in NumPy's format
        NAME.npy.journal    first line: the provenance as JSON, and its CRC-32; then one line per block of rows
                            that is safely on disk: first row, rows, CRC-32 of their bytes, CRC-32 of the line

The rows of a block are synced to disk before its line is written, so that a line is never ahead of its rows. A
row is valid only if its line is complete and its bytes match. When all rows are present, the file is renamed to
its final name, and a small `NAME.npy.json` keeps its provenance: what it was made from. Processes that share the
work write into one part, each with its own journal (`NAME.npy.journal.RANK`); the next start joins the journals.
"""

import errno
import glob
import json
import logging
import math
import os
import shutil
import tempfile
import time
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from model.errors import InputError, short_list

log = logging.getLogger(__name__)

FLUSH_ROWS = 256
FLUSH_SECONDS = 20.0


def scratch_rows(rows: int, dim: int, folder: Path | None = None) -> torch.Tensor:
    """Returns a new (rows, dim) float32 tensor on disk, in a file that is deleted together with the tensor.

    Args:
        folder: the folder of the file; by default the system's folder for temporary files.

    Raises:
        InputError: if there is no room for it.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            _reserve(file, max(1, 4 * rows * dim))
            return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=(rows, dim)))
    except OSError as error:
        where = folder or tempfile.gettempdir()
        raise InputError(f"{where} has no room for {rows:,} rows of {dim} ({error.strerror})") from None


def _reserve(file: IO[bytes], size: int) -> None:
    """Reserves `size` bytes on the disk: writing to a mapped file on a full disk would kill the process."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except AttributeError:  # not on every system
        file.truncate(size)
    except OSError as error:  # nor on every file system
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        file.truncate(size)


class DescriptorStore:
    """Descriptors (rows, dim) float32 in the file `path`, some of which may exist from an earlier run.

    Args:
        path: the file to write, .npy or .pth (one tensor).
        rows, dim: its shape.
        provenance: what all rows are made from (checkpoint, settings, list of images), as JSON.
        resume: False starts over.
        fingerprints: per row, the fingerprint of its image (name, size, time). Rows whose fingerprint existed
            before are kept, wherever in the list they were; the others are missing.

    Raises:
        InputError: if an interrupted run had a different provenance (the message names the differences), its
            files cannot be read, or the disk has no room for the rows.
    """

    def __init__(
        self,
        path: Path,
        rows: int,
        dim: int,
        provenance: dict,
        resume: bool = True,
        fingerprints: list[str] | None = None,
    ):
        self._prepare(path, rows, dim, provenance, fingerprints)
        if not resume:
            for file in (
                self.part,
                self._next_journal,
                *self._journals(),
            ):  # a finished file is kept until the new one is finished
                file.unlink(missing_ok=True)
        self.complete = resume and self._is_complete()
        if not self.complete:
            self._open()

    @classmethod
    def of_rank(
        cls, path: Path, dim: int, provenance: dict, rank: int, done: np.ndarray, fingerprints: list[str] | None = None
    ) -> "DescriptorStore":
        """Returns the store for another process that shares the work, after rank 0 has opened it.

        Args:
            rank: the number of this process, from 1.
            done: the rows that are done, as in rank 0.
        """
        store = cls.__new__(cls)
        store._prepare(path, len(done), dim, provenance, fingerprints, f".{rank}")
        store.done = done
        return store

    def _prepare(
        self, path: Path, rows: int, dim: int, provenance: dict, fingerprints: list[str] | None, suffix: str = ""
    ) -> None:
        self.path, self.rows, self.dim = path, rows, dim
        self.provenance = jsonable(provenance)
        self.fingerprints = fingerprints
        self.part = Path(f"{path}.part")
        self.journal = Path(f"{path}.journal{suffix}")
        self._buffer: list[np.ndarray] = []
        self._buffer_start = 0
        self._flushed = time.monotonic()
        self.done = np.zeros(rows, dtype=bool)
        self.failed = np.zeros(0, dtype=np.int64)
        self.gone = 0  # rows of an earlier run whose images are no longer in the list
        self.complete = False

    def missing(self) -> np.ndarray:
        """Returns the numbers of the rows that are missing, ascending."""
        return np.flatnonzero(~self.done)

    def write(self, row: int, vector: np.ndarray) -> None:
        """Adds one row; consecutive rows are written to disk together, every few seconds."""
        if self._buffer and row != self._buffer_start + len(self._buffer):
            self.flush()
        if not self._buffer:
            self._buffer_start = row
        self._buffer.append(vector)
        if len(self._buffer) >= FLUSH_ROWS or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes the buffered rows to disk, then records them in the journal."""
        if not self._buffer:
            return
        start, block = self._buffer_start, np.stack(self._buffer).astype("<f4").tobytes()
        with self.part.open("r+b") as file:
            file.seek(self._offset(start))
            file.write(block)
            _sync(file)
        if not self.journal.exists():
            self._write_journal([])
        with self.journal.open("ab") as file:
            file.write(_line(start, len(self._buffer), zlib.crc32(block)))
            _sync(file)
        self.done[start : start + len(self._buffer)] = True
        self._buffer = []
        self._flushed = time.monotonic()

    def part_rows(self) -> np.ndarray:
        """Returns the rows of the part, memory-mapped."""
        return np.load(self.part, mmap_mode="c")

    def finish(self, facts: dict | None = None) -> None:
        """Renames the part to its final name; no row may be missing. `facts` are added to the provenance file."""
        self.flush()
        if not self.done.all():
            raise RuntimeError(f"{self.path}: {len(self.missing())} rows are missing")
        self.path.unlink(missing_ok=True)  # a file with other settings must not remain beside the new JSON
        write_json(provenance_path(self.path), {**self._head(), **(facts or {})})
        if self.path.suffix == ".pth":
            # torch.save writes the file name into the file; a fixed name makes files with equal rows identical.
            folder = Path(f"{self.path}.new")
            new = folder / "descriptors.pth"
            try:
                folder.mkdir(exist_ok=True)
                torch.save(torch.from_numpy(self.part_rows()), new)
            except (OSError, RuntimeError) as error:  # torch.save raises a RuntimeError if the disk is full
                shutil.rmtree(folder, ignore_errors=True)
                reason = str(error).splitlines()[0]
                raise InputError(f"cannot write {self.path} ({reason}); all rows are safe in {self.part}") from None
            with new.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(new, self.path)
            folder.rmdir()
            self.part.unlink()
        else:
            os.replace(self.part, self.path)
        for journal in self._journals():
            journal.unlink()
        self.complete = True

    def reopen(self, rows: np.ndarray) -> None:
        """Begins a new part without these rows, which become missing; the finished file is kept until then."""
        again = np.ones(self.rows, dtype=bool)
        again[rows] = False
        self._carry_over(self._fingerprints_of(self._head()), np.load(self.path, mmap_mode="r"), again)
        self.complete = False

    def _is_complete(self) -> bool:
        """Returns whether an earlier run with the same provenance finished this file; sets `failed`, its zero rows."""
        if self._finished_fingerprints() != self._fingerprints_of(self._head()):
            return False
        self.done[:] = True
        if self.fingerprints is not None:
            self.failed = np.flatnonzero(~nonzero_rows(np.load(self.path, mmap_mode="r")))
        return True

    def _finished_fingerprints(self) -> list[str] | None:
        """Returns the fingerprints of a finished file of the same provenance; None if no such file is usable."""
        if not self.path.is_file():
            return None
        differing = provenance_differences(self.path, self.provenance)
        if differing:
            log.info("%s: extracted with other settings (%s); it will be replaced", self.path, short_list(differing))
        if differing != []:
            return None
        fingerprints = self._fingerprints_of(read_provenance(self.path) or {})
        if self.path.suffix == ".npy":
            try:
                rows = _load(self.path)
            except ValueError as error:
                log.warning("%s is damaged (%s); it will be replaced", self.path, error)
                return None
            if rows.shape != (len(fingerprints), self.dim) or rows.dtype != np.float32:
                return None
        return fingerprints

    def _head(self) -> dict:
        return self.provenance if self.fingerprints is None else {**self.provenance, "stamps": self.fingerprints}

    def _fingerprints_of(self, head: dict) -> list[str]:
        """Returns the fingerprints in the head of a file; empty ones if this store or the head has none."""
        fingerprints = head.get("stamps")
        return fingerprints if self.fingerprints is not None and isinstance(fingerprints, list) else [""] * self.rows

    def _carry_over(self, fingerprints: list[str], rows: np.ndarray, done: np.ndarray) -> None:
        """Creates a new part with the rows whose fingerprints match, wherever in the list they were before.

        Its journal is written first, under another name: whenever the process is killed, either the old part
        or the new one has a matching journal, see _finish_carrying_over.
        """
        new = Path(f"{self.part}.new")
        self._allocate(new)
        own = self.fingerprints or [""] * self.rows
        place = {fingerprint: row for row, fingerprint in enumerate(fingerprints) if done[row] and fingerprint}
        self.gone = len(set(fingerprints) - set(own))
        carried = np.load(new, mmap_mode="r+")
        self.done[:] = [fingerprint in place for fingerprint in own]
        for row in np.flatnonzero(self.done):
            carried[row] = rows[place[own[row]]]
        carried.flush()
        self._write_journal(_blocks(carried, self.done), self._next_journal)
        os.replace(new, self.part)
        self._finish_carrying_over()

    def _finish_carrying_over(self) -> None:
        """Renames the next journal to its final name if it belongs to the part, and otherwise deletes it."""
        if not self._next_journal.exists():
            return
        try:
            head, *lines = self._next_journal.read_bytes().split(b"\n")
            rows = len(self._fingerprints_of(_parse_head(head)))
            blocks = [block for line in lines[:-1] if (block := _parse(line))]
            its_part = self.part.stat().st_size == self._offset(rows) and len(self._intact(blocks)[0]) == len(blocks)
        except (OSError, ValueError):
            its_part = False
        if its_part:
            os.replace(self._next_journal, self.journal)
            for journal in self._journals():
                if journal != self.journal:
                    journal.unlink()
        else:
            self._next_journal.unlink()

    @property
    def _next_journal(self) -> Path:
        return Path(f"{self.path}.next-journal")

    def _intact(self, blocks: list[tuple[int, int, int]]) -> tuple[list[tuple[int, int, int]], list[np.ndarray]]:
        """Returns the blocks whose bytes match, and for each which rows are descriptors, in one pass over the file."""
        intact, there = [], []
        with self.part.open("rb") as file:
            for start, count, checksum in blocks:
                file.seek(self._offset(start))
                content = file.read(count * 4 * self.dim)
                if zlib.crc32(content) == checksum:
                    intact.append((start, count, checksum))
                    there.append(nonzero_rows(np.frombuffer(content, "<f4").reshape(-1, self.dim)))
        return intact, there

    def _journals(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.journal*"))

    def _open(self) -> None:
        try:
            self._finish_carrying_over()
            if self._begun():
                self._resume()
            elif self.fingerprints is not None and (fingerprints := self._finished_fingerprints()) is not None:
                rows = np.load(self.path, mmap_mode="r")
                self._carry_over(fingerprints, rows, nonzero_rows(rows))
            else:
                self._create()
        except OSError as error:
            raise InputError(f"{self.part}: cannot be written ({error.strerror or error})") from None

    def _begun(self) -> bool:
        """Returns whether an earlier run left rows; a part without any does not conflict with other settings."""
        return self.part.exists() and any(b"\n" in journal.read_bytes()[:-1] for journal in self._journals())

    def _create(self) -> None:
        """Creates an empty part of full size, so that a full disk is noticed now, and a journal without rows."""
        for journal in self._journals():
            journal.unlink()
        self._allocate(self.part)
        self._write_journal([])

    def _allocate(self, path: Path) -> None:
        with path.open("wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (self.rows, self.dim)}
            np.lib.format.write_array_header_1_0(file, header)
            file.flush()
            _reserve(file, self._offset(self.rows))
            _sync(file)

    def _resume(self) -> None:
        """Keeps the intact blocks of all journals, and joins the journals into one."""
        blocks, damaged, fingerprints = [], 0, []
        for journal in self._journals():
            first, *lines = journal.read_bytes().split(b"\n")
            try:
                before = _parse_head(first)
            except ValueError:
                raise InputError(f"{journal} is damaged; start over, without resuming") from None
            if differing := differences(before, self.provenance):
                raise InputError(
                    f"{self.part} was started with other settings ({short_list(differing)}); give these again, or "
                    "start over, without resuming"
                )
            fingerprints = self._fingerprints_of(before)
            parsed = [_parse(line) for line in lines[:-1]]  # an incomplete last line is dropped
            blocks += [block for block in parsed if block is not None]
            damaged += parsed.count(None)
        if self.part.stat().st_size != self._offset(len(fingerprints)) and self.fingerprints is not None:
            log.warning("%s: interrupted while its list changed; starting over", self.part)
            return self._create()
        if self.part.stat().st_size != self._offset(len(fingerprints)):
            raise InputError(
                f"{self.part} is not {self._offset(len(fingerprints))} bytes long; start over, without resuming"
            )
        (intact, there), done = self._intact(blocks), np.zeros(len(fingerprints), dtype=bool)
        for (start, count, _), mask in zip(intact, there, strict=True):
            done[start : start + count] = mask  # retries images that could not be read
        damaged += len(blocks) - len(intact)
        try:
            rows = _load(self.part)
        except ValueError:
            raise InputError(f"{self.part} is damaged; start over, without resuming") from None
        if rows.shape != (len(fingerprints), self.dim) or rows.dtype != np.float32:
            raise InputError(f"{self.part} is damaged; start over, without resuming")
        if fingerprints != self._fingerprints_of(self._head()):
            self._carry_over(fingerprints, rows, done)
        else:
            self.done = done
            self._write_journal(intact if all(mask.all() for mask in there) else _blocks(rows, done))
        for journal in self._journals():
            if journal != self.journal:
                journal.unlink()
        if damaged:
            log.warning("%s: %d damaged blocks are ignored; their rows are extracted again", self.part, damaged)
        if not self.done.all():
            log.info("%s: %d of %d rows exist from an earlier run", self.path, self.done.sum(), self.rows)

    def _write_journal(self, blocks: list[tuple[int, int, int]], journal: Path | None = None) -> None:
        journal = journal or self.journal
        new = Path(f"{self.path}.new-{journal.name}")
        with new.open("wb") as file:
            head = json.dumps(self._head()).encode()
            file.write(head + f" {zlib.crc32(head):08x}\n".encode())
            file.writelines(_line(*block) for block in blocks)
            _sync(file)
        os.replace(new, journal)

    def _offset(self, row: int) -> int:
        return 128 + row * 4 * self.dim  # NumPy's header of a small array is 128 bytes


def provenance_path(path: Path) -> Path:
    """Returns the provenance file of a finished file: NAME.npy.json for NAME.npy."""
    return Path(f"{path}.json")


def provenance_differences(path: Path, provenance: dict) -> list[str] | None:
    """Returns the settings in which a finished file differs from `provenance`, or None without a provenance file."""
    before = read_provenance(path)
    return None if before is None else differences(before, jsonable(provenance))


def read_provenance(path: Path) -> dict | None:
    """Returns the provenance of a finished file, or None if it has no provenance file.

    Older versions wrote NAME.json for both NAME.npy and NAME.pth, which is read if there is no other.
    """
    candidates = [provenance_path(path)]
    others = [path.with_suffix(suffix) for suffix in (".npy", ".pth") if suffix != path.suffix]
    if path.exists() and not any(other.exists() for other in others):
        candidates.append(path.with_suffix(".json"))
    for file in candidates:
        try:
            content = json.loads(file.read_text())
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None
    return None


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


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file atomically; processes that write it at the same time do not disturb each other."""
    new = Path(f"{path}.{os.getpid()}.new")
    with new.open("wb") as file:
        file.write(json.dumps(jsonable(content), indent=1).encode() + b"\n")
        _sync(file)
    os.replace(new, path)


def jsonable(value: Any) -> Any:
    """Returns the value in JSON types: NaN becomes null, infinity the text 'inf', an array a list."""
    if isinstance(value, dict):
        return {key: jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [jsonable(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value.item() if isinstance(value, np.generic) else value


def _load(path: Path) -> np.ndarray:
    """Returns the rows of a file, memory-mapped. Raises ValueError if it cannot be read."""
    try:
        return np.load(path, mmap_mode="r")
    except Exception as error:  # NumPy's header parser raises many exceptions
        raise ValueError(str(error).splitlines()[0] if str(error) else type(error).__name__) from None


def nonzero_rows(rows: np.ndarray, chunk: int = 8192) -> np.ndarray:
    """Returns which rows are descriptors, that is, not all zeros. (N, D) -> (N,) bool."""
    parts = [rows[start : start + chunk].any(axis=1) for start in range(0, len(rows), chunk)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=bool)


def _blocks(rows: np.ndarray, done: np.ndarray) -> list[tuple[int, int, int]]:
    """Returns the first row, number of rows and checksum of each run of rows that are done."""
    ends = np.flatnonzero(np.diff(done, prepend=False, append=False)).reshape(-1, 2).tolist()
    return [(start, end - start, zlib.crc32(rows[start:end].tobytes())) for start, end in ends]


def _line(start: int, count: int, checksum: int) -> bytes:
    text = f"{start} {count} {checksum:08x}".encode()
    return text + f" {zlib.crc32(text):08x}\n".encode()


def _parse_head(line: bytes) -> dict:
    """Parses the first line of a journal; older versions wrote no checksum. Raises ValueError if it is damaged."""
    if not line.endswith(b"}"):
        line, _, checksum = line.rpartition(b" ")
        if zlib.crc32(line) != int(checksum, 16):
            raise ValueError("the checksum does not match")
    head = json.loads(line)
    if not isinstance(head, dict):
        raise ValueError("no head")
    return head


def _parse(line: bytes) -> tuple[int, int, int] | None:
    text, _, checksum = line.rpartition(b" ")
    try:
        start, count, block_checksum = text.split()
        if zlib.crc32(text) == int(checksum, 16):
            return int(start), int(count), int(block_checksum, 16)
    except ValueError:
        pass
    return None


def _sync(file: IO) -> None:
    file.flush()
    os.fsync(file.fileno())
