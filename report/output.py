"""The output folder of all commands: descriptors, which runs share, and the results of each run."""

import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path

from extraction.provenance import plain_name
from model.errors import InputError


@dataclass(frozen=True)
class Output:
    """The output folder: descriptors, which runs share, and a folder of results for each run.

    Attributes:
        folder: its path.
    """

    folder: Path

    @property
    def descriptors(self) -> Path:
        return self.folder / "descriptors"

    def new_run(self, title: str) -> Path:
        """Creates and returns the folder for the results of this run, runs/<date>-<title>."""
        start = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
        for number in count(1):
            run = self.folder / "runs" / f"{start}-{plain_name(title)}{f'-{number}' if number > 1 else ''}"
            try:
                run.mkdir(parents=True)
                return run
            except FileExistsError:  # another process started in the same second
                continue

    def publish(self, run: Path) -> None:
        """Links runs/latest to the run, if the file system supports links."""
        new = run.parent / f".latest.{os.getpid()}"
        with suppress(OSError):
            new.unlink(missing_ok=True)
            new.symlink_to(run.name)
            new.replace(run.parent / "latest")


def open_output(folder: Path) -> Output:
    """Creates the output folder, with its parents.

    Raises:
        InputError: if it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        attempt = folder / f".writable.{os.getpid()}"
        attempt.touch()
        attempt.unlink()
    except OSError as error:
        raise InputError(f"{folder} cannot be created or written to ({error.strerror})") from None
    return Output(folder)
