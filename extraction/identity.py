"""Which image a row was made from: an image is its bytes, and its box.

A file's key is the BLAKE2b hash of its content and the box. The stat record of the file is kept beside it, as in
git's index: while it stands, the key is known without reading the file again.
"""

import hashlib
import os
import time
from typing import BinaryIO, NamedTuple

import numpy as np

Box = tuple[float, float, float, float]

KEY_BYTES = 16
NO_STAT = (0, 0, 0, 0)
# File systems record times in steps: a file that changed just before it was read may change again within a step.
_STEP_NS = 2_000_000_000


class Identity(NamedTuple):
    """The identity of an image.

    Attributes:
        key: BLAKE2b (16 bytes) of the file's content and the box.
        stat: the stat record of the file when it was read, see stat_record; NO_STAT if it was too young to trust.
    """

    key: bytes
    stat: tuple[int, int, int, int]


def stat_record(stat: os.stat_result) -> tuple[int, int, int, int]:
    """Returns size, times of modification and of status change in nanoseconds, and inode of a file, as int64.

    (File systems that compute inodes as hashes, such as mergerfs, use all 64 bits.)
    """
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino % (1 << 63)


def file_identity(file: BinaryIO, box: Box | None = None) -> Identity:
    """Returns the identity of an open file and a box; the file is read from its beginning."""
    stat = stat_record(os.fstat(file.fileno()))
    file.seek(0)
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    while block := file.read(1 << 20):
        digest.update(block)
    settled = time.time_ns() - max(stat[1:3]) > _STEP_NS
    return Identity(box_key(digest.digest(), box), stat if settled else NO_STAT)


def box_key(content_key: bytes, box: Box | None) -> bytes:
    """Returns the key of a part of an image, given that of the whole; numbers are truncated as when cropping."""
    if box is None:
        return content_key
    return hashlib.blake2b(content_key + box_in_words(box).encode(), digest_size=KEY_BYTES).digest()


def box_in_words(box: Box) -> str:
    return ",".join(str(int(number)) for number in box)


def rows_fingerprint(hashes: np.ndarray) -> str:
    """Returns the fingerprint of rows, given the hashes of their blocks."""
    return hashlib.blake2b(hashes.tobytes(), digest_size=KEY_BYTES).hexdigest()


def last_places(table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns the number of the last entry of a table that equals each value, -1 for none. (T,), (N,) -> (N,)."""
    if not len(table):
        return np.full(len(values), -1)
    order = np.argsort(table, kind="stable")
    places = order[np.searchsorted(table, values, side="right", sorter=order) - 1]
    return np.where(table[places] == values, places, -1)
