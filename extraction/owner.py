"""Locks for files that several processes may write: a second process waits, and says for which one.

The lock is the operating system's (flock, through the package filelock), so that a killed process leaves none behind.
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
    """A context in which this process alone owns the path; it first waits for any other owner.

    Args:
        path: a folder, or a file in an existing folder. The lock is a hidden file in that folder.

    Raises:
        InputError: if the folder is not writable.
    """
    hidden = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
    hidden = hidden.absolute()
    lock, note = filelock.FileLock(hidden), Path(f"{hidden}.owner")
    try:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            print(f"{path} is in use by {_owner(note)}; waiting for it to finish", file=sys.stderr)
            lock.acquire()
        start = datetime.now().isoformat(timespec="seconds")
        facts = {"pid": os.getpid(), "host": socket.gethostname(), "start": start, "command": command_line()}
        note.write_text(json.dumps(facts))
    except NotImplementedError:
        log.warning("the file system of %s does not support locks: do not start two runs there at once", path)
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
