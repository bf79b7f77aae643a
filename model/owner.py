"""One owner at a time for what processes write: a second one waits, and says for whom.

The lock is the system's own (flock, through the package filelock), so a killed process never leaves one behind.
"""

import json
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import filelock

from model.errors import InputError, command_line

log = logging.getLogger(__name__)


@contextmanager
def owned(path: Path) -> Iterator[None]:
    """Makes this process the only one that owns the path, while it is inside; another owner's end is waited for.

    Args:
        path: a folder, or a file to be in a folder that exists. The lock is a hidden file in that folder.

    Raises:
        InputError: if nothing can be written there.
    """
    hidden = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
    hidden = hidden.absolute()
    lock, note = filelock.FileLock(hidden), Path(f"{hidden}.owner")
    try:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            print(f"{path} is in use by {_owner(note)}; waiting for its end", file=sys.stderr)
            lock.acquire()
        start = datetime.now().isoformat(timespec="seconds")
        facts = {"pid": os.getpid(), "host": socket.gethostname(), "start": start, "command": command_line()}
        note.write_text(json.dumps(facts))
    except NotImplementedError:
        log.warning("the file system of %s has no locks: do not start two runs there at once", path)
    except OSError as error:
        raise InputError(f"{path} cannot be locked ({error.strerror})") from None
    try:
        yield
    finally:
        if lock.is_locked:
            note.unlink(missing_ok=True)
            lock.release()


def _owner(note: Path) -> str:
    try:
        return "process {pid} on {host}, started {start} ({command})".format(**json.loads(note.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
