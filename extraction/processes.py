"""The processes that PyTorch's launcher started together, if there is more than one."""

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
    """This process among those of one `torchrun`; a single process without a launcher, or if `alone`.

    Only control messages are exchanged (gloo, on the CPU), so that any mix of machines with shared files works.

    Attributes:
        rank: the number of this process, from 0; `local` is its number on its own machine.
        count: the number of processes.
    """

    def __init__(self, alone: bool = False) -> None:
        environment = {} if alone else os.environ
        self.rank, self.local, self.count = (
            int(environment.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
        )
        if self.count > 1:
            # One process may have hours of work left when another is done.
            timeout = datetime.timedelta(days=30)
            store, *_ = next(dist.rendezvous("env://", timeout=timeout))
            if os.environ.get("GROUP_WORLD_SIZE") == "1":
                # torchrun keeps its store when it restarts the processes, with the addresses of the killed ones in it.
                store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.count, timeout=timeout)

    def __repr__(self) -> str:
        return f"process {self.rank + 1} of {self.count}"

    def wait(self) -> None:
        """Waits until all processes have reached this call."""
        if self.count > 1:
            self._together(dist.barrier)

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """A context that the first process runs before the others; an InputError in one is raised in all."""
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
        """Returns the array of the first process, in all; the others pass one of the same shape and dtype."""
        if self.count > 1:
            message = torch.from_numpy(array.view(np.uint8))
            self._together(lambda: dist.broadcast(message, src=0))
        return array

    def gathered(self, own: Any) -> list[Any]:
        """Returns the arguments of all processes, in order of rank: tensors, and tuples or lists of them."""
        every = [own] * self.count
        if self.count > 1:
            self._together(lambda: dist.all_gather_object(every, own))
        return every

    def _together(self, step: Callable[[], object]) -> None:
        try:
            step()
        except RuntimeError:  # raised by gloo if a peer has exited
            raise InputError(f"{self!r}: another process failed; see the message that it printed") from None

    def end(self) -> None:
        if self.count > 1:
            dist.destroy_process_group()
