"""Descriptors on disk that survive an interruption at any moment, a power cut included.

While a list of pictures is being described, two files stand beside the coming `NAME.npy`:

    NAME.npy.part       the rows, in place, in NumPy's format
    NAME.npy.journal    first line: JSON, what the rows are made from; then one line per block of
                        rows that is safely on disk: first row, rows, CRC-32 of their bytes, CRC-32 of the line

A block's rows are synced to disk before its line is written, so a line never promises too much. A
row counts only if its line is whole and its bytes match. When all rows are there, the part gets
its name, and a small `NAME.json` keeps what they were made from.
"""

import json
import logging
import math
import os
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from model.errors import InputError, short_list

log = logging.getLogger(__name__)

FLUSH_ROWS = 256
FLUSH_SECONDS = 20.0


class DescriptorStore:
    """(rows, dim) float32 rows at `path`, some of which may be there from an earlier run.

    Args:
        path: the coming .npy file.
        rows, dim: its shape.
        source: what the rows are made from (checkpoint, settings, list of pictures), as JSON can hold it.
        resume: False starts over.
        hint: what to do about a store that cannot be used, for the error.

    Raises:
        InputError: where what an earlier run left was made from something else (it says what
            differs), cannot be read, or the disk has no room for the rows.
    """

    def __init__(self, path: Path, rows: int, dim: int, source: dict, resume: bool = True, hint: str = ""):
        self.path, self.rows, self.dim, self.hint = path, rows, dim, hint or "resume=False starts over"
        self.source = json.loads(json.dumps(jsonable(source)))
        self.part, self.journal = Path(f"{path}.part"), Path(f"{path}.journal")
        self.done = np.zeros(rows, dtype=bool)
        self._buffer: list[np.ndarray] = []
        self._buffer_start = 0
        self._flushed = time.monotonic()
        if not resume:
            for file in (self.path, self.source_path, self.part, self.journal):
                file.unlink(missing_ok=True)
        self.complete = self._is_complete()
        if not self.complete:
            self._open()

    @property
    def source_path(self) -> Path:
        return self.path.with_suffix(".json")

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
        block = np.stack(self._buffer).astype("<f4")
        start, count = self._buffer_start, len(block)
        with self.part.open("r+b") as file:
            file.seek(self._offset(start))
            file.write(block.tobytes())
            _sync(file)
        with self.journal.open("ab") as file:
            file.write(_line(start, count, zlib.crc32(block.tobytes())))
            _sync(file)
        self.done[start : start + count] = True
        self._buffer = []
        self._flushed = time.monotonic()

    def finish(self) -> np.ndarray:
        """Gives the file its name, and returns its rows (memory-mapped). All rows must be there."""
        if not self.complete:
            self.flush()
            if not self.done.all():
                raise RuntimeError(f"{self.path}: {len(self.missing())} rows are missing")
            write_json(self.source_path, self.source)
            os.replace(self.part, self.path)
            self.journal.unlink()
            self.complete = True
        return np.load(self.path, mmap_mode="c")

    def _is_complete(self) -> bool:
        """Whether an earlier run finished this file, from the same things."""
        if not self.path.is_file() or self.part.exists():
            return False
        try:
            before = json.loads(self.source_path.read_text())
            fits = before == self.source and np.load(self.path, mmap_mode="r").shape == (self.rows, self.dim)
        except (OSError, ValueError):
            return False
        self.done[:] = fits
        return fits

    def _open(self) -> None:
        try:
            if self.journal.exists() and self.part.exists():
                self._resume()
            else:
                self._create()
        except OSError as error:
            raise InputError(f"{self.part}: cannot be written ({error.strerror})") from None

    def _create(self) -> None:
        """An empty part of full size (so that a full disk is known now) and a journal without rows."""
        self.journal.unlink(missing_ok=True)
        with self.part.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {**self._header(), "shape": (self.rows, self.dim)})
            size = self._offset(self.rows)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            _sync(file)
        new = Path(f"{self.journal}.new")
        with new.open("wb") as file:
            file.write(json.dumps(self.source).encode() + b"\n")
            _sync(file)
        os.replace(new, self.journal)

    def _resume(self) -> None:
        first, *lines = self.journal.read_bytes().split(b"\n")
        try:
            before = json.loads(first)
        except ValueError:
            raise InputError(f"{self.journal} is damaged; {self.hint}") from None
        if differing := differences(before, self.source):
            raise InputError(f"{self.part} was begun with other settings ({short_list(differing)}); {self.hint}")
        if self.part.stat().st_size != self._offset(self.rows):
            raise InputError(f"{self.part} is not {self._offset(self.rows)} bytes long, it was changed; {self.hint}")
        damaged = 0
        with self.part.open("rb") as file:
            for line in lines[:-1]:  # what follows the last line break was never finished
                block = _parse(line)
                if block is None or block[0] + block[1] > self.rows:
                    damaged += 1
                    continue
                start, count, checksum = block
                file.seek(self._offset(start))
                intact = zlib.crc32(file.read(count * 4 * self.dim)) == checksum
                damaged += not intact
                self.done[start : start + count] |= intact
        if lines[-1]:
            os.truncate(self.journal, self.journal.stat().st_size - len(lines[-1]))
        if damaged:
            log.warning("%s: %d damaged blocks are not used; their rows are made again", self.part, damaged)
        log.info("%s: going on after %d of %d rows", self.part, self.done.sum(), self.rows)

    def _header(self) -> dict:
        return {"descr": "<f4", "fortran_order": False}

    def _offset(self, row: int) -> int:
        return 128 + row * 4 * self.dim  # NumPy's header of a small array is 128 bytes


def differences(before: dict, now: dict) -> list[str]:
    """The keys in which two sources differ, with both values."""
    keys = [*before, *(key for key in now if key not in before)]
    return [f"{key}: {before.get(key)} before, {now.get(key)} now" for key in keys if before.get(key) != now.get(key)]


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file whole or not at all."""
    new = Path(f"{path}.new")
    new.write_text(json.dumps(jsonable(content), indent=1) + "\n")
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


def _line(start: int, count: int, checksum: int) -> bytes:
    text = f"{start} {count} {checksum:08x}".encode()
    return text + f" {zlib.crc32(text):08x}\n".encode()


def _parse(line: bytes) -> tuple[int, int, int] | None:
    text, _, checksum = line.rpartition(b" ")
    try:
        start, count, block_checksum = text.split()
        if zlib.crc32(text) == int(checksum, 16):
            return int(start), int(count), int(block_checksum, 16)
    except ValueError:
        pass
    return None


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())
