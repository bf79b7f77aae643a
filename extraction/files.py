"""Write files atomically."""

import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with new.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def write_array(path: Path, array: np.ndarray) -> None:
    write_atomically(path, lambda file: np.save(file, array))


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, lambda file: file.write(json.dumps(jsonable(content), indent=1).encode() + b"\n"))


def reserve(file: IO[bytes], size: int) -> None:
    """Reserves `size` bytes on the disk: writing to a mapped file on a full disk would kill the process."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except AttributeError:  # not on every system
        file.truncate(size)
    except OSError as error:  # nor on every file system
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        file.truncate(size)


def jsonable(value: Any) -> Any:
    """Returns the value in JSON types: NaN becomes null, infinity the text 'inf', an array a list."""
    if isinstance(value, dict):
        return {key: jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [jsonable(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value.item() if isinstance(value, np.generic) else value
