"""Images decoded ahead in worker processes."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from extraction.identity import Identity
from extraction.images import ImageError, ImageFile, ReadingLimits, limit_side, reading_limits, set_reading_limits
from model.errors import InputError


@dataclass(frozen=True)
class Loading:
    """How images are read and batched. These settings do not change descriptors.

    Attributes:
        workers: number of processes that decode images; 0 decodes in this process.
        pin_memory: whether to decode into pinned memory, for copies to a GPU.
        batch_size: largest number of images in a batch; 0 for as many as the memory allows.
    """

    workers: int = 0
    pin_memory: bool = False
    batch_size: int = 0


PLAIN_LOADING = Loading()

# The first is PyTorch's own; the others are raised if a worker dies while its pixels are being transferred.
WORKER_ERRORS = (RuntimeError, ConnectionResetError, ConnectionRefusedError, EOFError)


class ReadAhead:
    """Iterates over the pixels of some rows of a list of images, in order, decoded ahead in worker processes.

    The items are the pixels, a tensor (H, W, 3) as from limit_side, and the identity of the image; or its ImageError.

    Args:
        images: the whole list.
        rows: the rows to decode.
        loading: the settings for workers and pinned memory.
        max_side: longer side to which larger images are reduced; None keeps their size.
    """

    def __init__(self, images: Sequence[ImageFile], rows: np.ndarray, loading: Loading, max_side: int | None = None):
        workers = min(loading.workers, own_cores(), len(rows))
        self.workers = workers
        self.pixels = _Pixels(images, rows, workers, max_side)
        self.loader = DataLoader(
            self.pixels,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=(2 if workers <= 8 else 1) if workers else None,  # Docker's shared memory is 64 MB
            collate_fn=_unchanged,
            pin_memory=loading.pin_memory,
            worker_init_fn=partial(_start_worker, limits=reading_limits()),
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Identity] | ImageError]:
        for item in self.loader:
            if isinstance(item, ImageError):
                yield item
            else:  # pinning turns tuples into lists
                pixels, (key, stat) = item
                yield pixels, Identity(key, tuple(stat))

    def death_of_a_worker(self, error: Exception) -> InputError | None:
        """Returns the error to raise if this exception, one of WORKER_ERRORS, means that a worker died; else None."""
        if not self.workers or (isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error)):
            return None
        paths = [str(self.pixels.images[row].path) for row in self.pixels.reading.tolist() if row >= 0]
        where = f" while {', '.join(paths)} {'was' if len(paths) == 1 else 'were'} read" if paths else ""
        return InputError(
            f"a process that decodes images died{where}; check what was read, or use fewer than {self.workers} workers "
            "if memory was short; descriptors extracted so far are kept"
        )


def own_cores() -> int:
    """Returns how many cores this process may use, divided among the processes of a `torchrun` on the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(number: int, limits: ReadingLimits) -> None:
    """Passes on to a worker which images are read, which is needed if it is not a fork of this process."""
    set_reading_limits(limits)


class _Pixels(Dataset):
    """Returns pixels and identity, or the error of an image, so that a damaged file does not end a worker."""

    def __init__(self, images: Sequence[ImageFile], rows: np.ndarray, workers: int, max_side: int | None):
        self.images, self.rows, self.max_side = images, rows, max_side
        self.reading = torch.full((workers,), -1).share_memory_()  # the row that each worker is reading

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Identity] | ImageError:
        row = int(self.rows[index])
        worker = get_worker_info()
        if worker is not None:
            self.reading[worker.id] = row
        try:
            pixels, identity = self.images[row].read_identified()
            return limit_side(torch.from_numpy(pixels), self.max_side), identity
        except ImageError as error:
            return error
        finally:
            if worker is not None:
                self.reading[worker.id] = -1
