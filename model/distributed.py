"""The processes that PyTorch's launcher started together, if it did."""

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from model.errors import InputError


class Processes:
    """This process among those of one `torchrun`; alone where there is no launcher.

    Only control messages pass (gloo, on the CPU), so any mixture of machines works that sees the same files.

    Attributes:
        rank: number of this process, from 0; `local` is its number on its own machine.
        count: number of processes.
    """

    def __init__(self) -> None:
        self.rank, self.local, self.count = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
        )
        if self.count > 1:
            # One process may have hours of work left when another is done.
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))

    def __repr__(self) -> str:
        return f"process {self.rank + 1} of {self.count}"

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            self._together(dist.barrier)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """What stands inside is done by the first process, and then by the others."""
        if self.rank > 0:
            self.wait()
        yield
        if self.rank == 0:
            self.wait()

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """What stands inside is done by the first process, and then by the others; an InputError of one is all's."""
        error = None
        if self.rank > 0:
            self._raise_any(None)
        try:
            yield
        except InputError as own:
            error = own
        if self.rank == 0:
            self._raise_any(error)
        self._raise_any(error)

    def _raise_any(self, own: InputError | None) -> None:
        for error in self.gathered(own):
            if error is not None:
                raise error

    def from_first(self, array: np.ndarray) -> np.ndarray:
        """The first process's array, in all; the others give one of the same shape and type."""
        if self.count > 1:
            message = torch.from_numpy(array.view(np.uint8))
            self._together(lambda: dist.broadcast(message, src=0))
        return array

    def gathered(self, own: Any) -> list[Any]:
        """What each process gives here, in all of them, in the order of ranks. Tensors and tuples or lists of them."""
        every = [own] * self.count
        if self.count > 1:
            self._together(lambda: dist.all_gather_object(every, own))
        return every

    def _together(self, step: Callable[[], object]) -> None:
        try:
            step()
        except RuntimeError:  # how gloo tells that a peer is gone
            raise InputError(f"{self!r}: another one ended, with the message that it printed") from None

    def end(self) -> None:
        if self.count > 1:
            dist.destroy_process_group()
