"""Descriptors on disk that survive an interruption at any moment, a power cut included.

While a list of images is being extracted, two files stand beside the coming `NAME.npy` or `NAME.pth`:

    NAME.npy.part       the rows, in place, in NumPy's format
    NAME.npy.journal    first line: JSON, what the rows are made from, and its CRC-32; then one line per block of
                        rows that is safely on disk: first row, rows, CRC-32 of their bytes, CRC-32 of the line

A block's rows are synced to disk before its line is written, so a line never promises too much. A
row counts only if its line is whole and its bytes match. When all rows are there, the file gets its
name, and a small `NAME.npy.json` keeps its provenance: what it was made from. Processes that share the work write into
one part, each with a journal of its own (`NAME.npy.journal.RANK`); the next start joins them.
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
    """Returns a new (rows, dim) float32 tensor on disk, in a file that is gone when the tensor is.

    Args:
        folder: where there is room for it; by default where the system keeps temporary files.

    Raises:
        InputError: if there is none.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            _reserve(file, max(1, 4 * rows * dim))
            return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=(rows, dim)))
    except OSError as error:
        where = folder or tempfile.gettempdir()
        raise InputError(f"{where} has no room for {rows:,} rows of {dim} ({error.strerror})") from None


def _reserve(file: IO[bytes], size: int) -> None:
    """Makes room for `size` bytes on the disk: a mapped file that turns out to have none would end the process."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except AttributeError:  # not on every system
        file.truncate(size)
    except OSError as error:  # nor on every file system
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        file.truncate(size)


class DescriptorStore:
    """(rows, dim) float32 descriptors at `path`, some of which may be there from an earlier run.

    Args:
        path: the coming file, .npy or .pth (one tensor).
        rows, dim: its shape.
        provenance: what all rows are made from (checkpoint, settings, list of images), as JSON can hold it.
        stamps: per row, what tells its image and whether it is the same as before (name, size, time).
            Rows with a stamp that was there before stay, wherever in the list; the others are made.
        resume: False starts over.

    Raises:
        InputError: if what an interrupted run left was made from something else (it says what
            differs), cannot be read, or the disk has no room for the rows.
    """

    def __init__(
        self,
        path: Path,
        rows: int,
        dim: int,
        provenance: dict,
        resume: bool = True,
        stamps: list[str] | None = None,
    ):
        self._prepare(path, rows, dim, provenance, stamps)
        if not resume:
            for file in (
                self.part,
                self._next_journal,
                *self._journals(),
            ):  # a finished file stays until there is a new one
                file.unlink(missing_ok=True)
        self.complete = resume and self._is_complete()
        if not self.complete:
            self._open()

    @classmethod
    def of_rank(
        cls, path: Path, dim: int, provenance: dict, rank: int, done: np.ndarray, stamps: list[str] | None = None
    ) -> "DescriptorStore":
        """Returns the store as a further process sees it that shares the work; rank 0 has opened it before.

        Args:
            rank: which of the processes this is, from 1.
            done: which rows are there: rank 0's.
        """
        store = cls.__new__(cls)
        store._prepare(path, len(done), dim, provenance, stamps, f".{rank}")
        store.done = done
        return store

    def _prepare(
        self, path: Path, rows: int, dim: int, provenance: dict, stamps: list[str] | None, suffix: str = ""
    ) -> None:
        self.path, self.rows, self.dim = path, rows, dim
        self.provenance = jsonable(provenance)
        self.stamps = stamps
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
        """Numbers of the rows that are still to be made, ascending."""
        return np.flatnonzero(~self.done)

    def write(self, row: int, vector: np.ndarray) -> None:
        """Takes one row; rows that follow each other go to disk together, every few seconds."""
        if self._buffer and row != self._buffer_start + len(self._buffer):
            self.flush()
        if not self._buffer:
            self._buffer_start = row
        self._buffer.append(vector)
        if len(self._buffer) >= FLUSH_ROWS or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Brings the rows taken so far to disk, then says so in the journal."""
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
        """The rows as they stand in the part, memory-mapped."""
        return np.load(self.part, mmap_mode="c")

    def finish(self, facts: dict | None = None) -> None:
        """Gives the file its name; all rows must be there. `facts` go into the JSON beside it."""
        self.flush()
        if not self.done.all():
            raise RuntimeError(f"{self.path}: {len(self.missing())} rows are missing")
        self.path.unlink(missing_ok=True)  # one of other settings must not stand beside the new JSON
        write_json(provenance_path(self.path), {**self._head(), **(facts or {})})
        if self.path.suffix == ".pth":
            # torch.save writes the file's name into it: a fixed one makes equal rows equal files.
            folder = Path(f"{self.path}.new")
            new = folder / "descriptors.pth"
            try:
                folder.mkdir(exist_ok=True)
                torch.save(torch.from_numpy(self.part_rows()), new)
            except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of torch.save
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
        """Begins a new part without these rows of a finished file, so that they are made again; it stays until then."""
        again = np.ones(self.rows, dtype=bool)
        again[rows] = False
        self._carry_over(self._stamps_of(self._head()), np.load(self.path, mmap_mode="r"), again)
        self.complete = False

    def _is_complete(self) -> bool:
        """Whether an earlier run finished this file, from the same things; `failed` are its rows of zeros."""
        if self._finished_stamps() != self._stamps_of(self._head()):
            return False
        self.done[:] = True
        if self.stamps is not None:
            self.failed = np.flatnonzero(~nonzero_rows(np.load(self.path, mmap_mode="r")))
        return True

    def _finished_stamps(self) -> list[str] | None:
        """The stamps of a finished file of the same provenance; None if there is none that can be used."""
        if not self.path.is_file():
            return None
        differing = provenance_differences(self.path, self.provenance)
        if differing:
            log.info("%s: made with other settings (%s), to be replaced", self.path, short_list(differing))
        if differing != []:
            return None
        stamps = self._stamps_of(read_provenance(self.path) or {})
        if self.path.suffix == ".npy":
            try:
                rows = _load(self.path)
            except ValueError as error:
                log.warning("%s is damaged (%s), to be replaced", self.path, error)
                return None
            if rows.shape != (len(stamps), self.dim) or rows.dtype != np.float32:
                return None
        return stamps

    def _head(self) -> dict:
        return self.provenance if self.stamps is None else {**self.provenance, "stamps": self.stamps}

    def _stamps_of(self, head: dict) -> list[str]:
        """The stamps of the rows that such a head describes; without stamps, their numbers."""
        stamps = head.get("stamps")
        return stamps if self.stamps is not None and isinstance(stamps, list) else [""] * self.rows

    def _carry_over(self, stamps: list[str], rows: np.ndarray, done: np.ndarray) -> None:
        """A new part that has the rows with equal stamps, wherever in the list they were before.

        Its journal is written first, under another name: whatever moment this is killed at, rows and
        journal of the old part or of the new one are found together, see _finish_carrying_over.
        """
        new = Path(f"{self.part}.new")
        self._allocate(new)
        own = self.stamps or [""] * self.rows
        place = {stamp: row for row, stamp in enumerate(stamps) if done[row] and stamp}
        self.gone = len(set(stamps) - set(own))
        carried = np.load(new, mmap_mode="r+")
        self.done[:] = [stamp in place for stamp in own]
        for row in np.flatnonzero(self.done):
            carried[row] = rows[place[own[row]]]
        carried.flush()
        self._write_journal(_blocks(carried, self.done), self._next_journal)
        os.replace(new, self.part)
        self._finish_carrying_over()

    def _finish_carrying_over(self) -> None:
        """Gives the next journal its name if its part is there, and else forgets it."""
        if not self._next_journal.exists():
            return
        try:
            head, *lines = self._next_journal.read_bytes().split(b"\n")
            rows = len(self._stamps_of(_parse_head(head)))
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
        """The blocks whose bytes in the part match, and which rows of each are descriptors: one pass over the file."""
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
            elif self.stamps is not None and (stamps := self._finished_stamps()) is not None:
                rows = np.load(self.path, mmap_mode="r")
                self._carry_over(stamps, rows, nonzero_rows(rows))
            else:
                self._create()
        except OSError as error:
            raise InputError(f"{self.part}: cannot be written ({error.strerror or error})") from None

    def _begun(self) -> bool:
        """Whether an earlier run left rows; a part without any is no reason to refuse other settings."""
        return self.part.exists() and any(b"\n" in journal.read_bytes()[:-1] for journal in self._journals())

    def _create(self) -> None:
        """An empty part of full size (so that a full disk is known now) and a journal without rows."""
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
        """Takes over the blocks that are whole, from all journals, and joins these into one."""
        blocks, damaged, stamps = [], 0, []
        for journal in self._journals():
            first, *lines = journal.read_bytes().split(b"\n")
            try:
                before = _parse_head(first)
            except ValueError:
                raise InputError(f"{journal} is damaged", resume=False) from None
            if differing := differences(before, self.provenance):
                raise InputError(f"{self.part} was begun with other settings ({short_list(differing)})", resume=False)
            stamps = self._stamps_of(before)
            parsed = [_parse(line) for line in lines[:-1]]  # what follows the last line break was never finished
            blocks += [block for block in parsed if block is not None]
            damaged += parsed.count(None)
        if self.part.stat().st_size != self._offset(len(stamps)) and self.stamps is not None:
            log.warning("%s: interrupted while its list changed, begun anew", self.part)
            return self._create()
        if self.part.stat().st_size != self._offset(len(stamps)):
            raise InputError(f"{self.part} is not {self._offset(len(stamps))} bytes long, it was changed", resume=False)
        (intact, there), done = self._intact(blocks), np.zeros(len(stamps), dtype=bool)
        for (start, count, _), mask in zip(intact, there, strict=True):
            done[start : start + count] = mask  # images that could not be read are tried again
        damaged += len(blocks) - len(intact)
        try:
            rows = _load(self.part)
        except ValueError:
            raise InputError(f"{self.part} is damaged", resume=False) from None
        if rows.shape != (len(stamps), self.dim) or rows.dtype != np.float32:
            raise InputError(f"{self.part} is damaged", resume=False)
        if stamps != self._stamps_of(self._head()):
            self._carry_over(stamps, rows, done)
        else:
            self.done = done
            self._write_journal(intact if all(mask.all() for mask in there) else _blocks(rows, done))
        for journal in self._journals():
            if journal != self.journal:
                journal.unlink()
        if damaged:
            log.warning("%s: %d damaged blocks are not used; their rows are made again", self.part, damaged)
        if not self.done.all():
            log.info("%s: %d of %d are there from an earlier run", self.path, self.done.sum(), self.rows)

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
    """The JSON file that keeps the provenance of a finished file: NAME.npy.json of NAME.npy."""
    return Path(f"{path}.json")


def provenance_differences(path: Path, provenance: dict) -> list[str] | None:
    """The settings in which a finished file differs from `provenance`, or None if it has no provenance file."""
    before = read_provenance(path)
    return None if before is None else differences(before, jsonable(provenance))


def read_provenance(path: Path) -> dict | None:
    """What a finished file was made from, or None if no JSON beside it tells.

    Older versions wrote NAME.json for both NAME.npy and NAME.pth: it is read if the other is not there.
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
    """The entries of `now` whose values differ in `before`, as text. Extra keys in `before` are ignored."""

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
    """Writes a JSON file whole or not at all."""
    new = Path(f"{path}.new")
    with new.open("wb") as file:
        file.write(json.dumps(jsonable(content), indent=1).encode() + b"\n")
        _sync(file)
    os.replace(new, path)


def jsonable(value: Any) -> Any:
    """The value with what JSON lacks in its words: NaN is null, infinity the text 'inf', an array a list."""
    if isinstance(value, dict):
        return {key: jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [jsonable(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value.item() if isinstance(value, np.generic) else value


def _load(path: Path) -> np.ndarray:
    """The rows of a file, memory-mapped. Raises ValueError for whatever is wrong with it."""
    try:
        return np.load(path, mmap_mode="r")
    except Exception as error:  # NumPy's reader of headers lets many kinds through
        raise ValueError(str(error).splitlines()[0] if str(error) else type(error).__name__) from None


def nonzero_rows(rows: np.ndarray, chunk: int = 8192) -> np.ndarray:
    """Which rows are descriptors: a row of zeros is none, (N, D) -> (N,) bool."""
    parts = [rows[start : start + chunk].any(axis=1) for start in range(0, len(rows), chunk)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=bool)


def _blocks(rows: np.ndarray, done: np.ndarray) -> list[tuple[int, int, int]]:
    """First row, number and checksum of each run of rows that are done."""
    ends = np.flatnonzero(np.diff(done, prepend=False, append=False)).reshape(-1, 2).tolist()
    return [(start, end - start, zlib.crc32(rows[start:end].tobytes())) for start, end in ends]


def _line(start: int, count: int, checksum: int) -> bytes:
    text = f"{start} {count} {checksum:08x}".encode()
    return text + f" {zlib.crc32(text):08x}\n".encode()


def _parse_head(line: bytes) -> dict:
    """The first line of a journal; older versions wrote no checksum. Raises ValueError if it is damaged."""
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
