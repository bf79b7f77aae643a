"""Many pictures -> descriptors: decoding ahead in worker processes, batches of equal sizes, results in list order."""

import ctypes
import logging
import os
import platform
import re
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

from model.batching import equal_sizes, first_batch_size, in_fitting_parts
from model.errors import InputError, short_list
from model.images import ImageError, ImageFile, to_network_input
from model.store import DescriptorStore
from model.superglobal import SuperGlobal
from modules.checks import values_unseen

log = logging.getLogger(__name__)

# All damaged files are named, but a line stays a line.
_NAMED_AT_MOST = 50

# Batches that a GPU has been given before the first of them is waited for.
_IN_FLIGHT = 3

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def prepare_process(device: torch.device) -> None:
    """Settings of the whole process that describing on this device wants; for commands, which own their process.

    On a GPU: float32 means float32, not TF32. On a CPU with glibc: freed memory is kept for the next
    picture. By default large blocks go back to the system, and each new activation pays for fresh pages.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    elif platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


class ReadAhead:
    """The pixels of some rows of a list of pictures, in order, decoded ahead in worker processes.

    Iterating gives (H, W, 3) uint8 tensors, or a picture's ImageError in its place.

    Args:
        images: the whole list.
        rows: which of them.
        workers: processes; 0 decodes in this one.
        pin_memory: for copies to a GPU.
    """

    def __init__(self, images: Sequence[ImageFile], rows: np.ndarray, workers: int = 0, pin_memory: bool = False):
        workers = min(workers, os.cpu_count() or 1, len(rows))
        self.pixels = _Pixels(images, rows, workers)
        self.loader = DataLoader(self.pixels, batch_size=None, num_workers=workers, pin_memory=pin_memory)

    def __iter__(self) -> Iterator[Tensor | ImageError]:
        return iter(self.loader)

    def death_of_a_worker(self, error: RuntimeError) -> InputError | None:
        """What to say if this error is PyTorch's about a worker that died; it may come at any moment."""
        pids = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", str(error))
        if pids is None:
            return None
        dead = [int(pid) for pid in pids[1].split(",")]
        paths = [self.pixels.images[row].path for pid, row in self.pixels.reading.tolist() if pid in dead and row >= 0]
        return InputError(
            f"a process that decodes pictures died{f' while reading {short_list(paths)}' if paths else ''}; if memory "
            "was short, fewer DATA_LOADER.NUM_WORKERS need less, else look at that file; what is described is kept"
        )


class _Pixels(Dataset):
    """Picture -> (H, W, 3) uint8 pixels, or the error, so that one bad file does not end a worker."""

    def __init__(self, images: Sequence[ImageFile], rows: np.ndarray, workers: int):
        self.images, self.rows = images, rows
        self.reading = torch.full((workers, 2), -1).share_memory_()  # per worker: its process, the row it reads

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor | ImageError:
        row = int(self.rows[index])
        worker = get_worker_info()
        if worker is not None:
            self.reading[worker.id] = torch.tensor([os.getpid(), row])
        try:
            return torch.from_numpy(self.images[row].read())
        except ImageError as error:
            return error
        finally:
            if worker is not None:
                self.reading[worker.id, 1] = -1


class _InListOrder:
    """Takes descriptors as they come, from the device too, and writes them to the store in the order of the list."""

    def __init__(self, store: DescriptorStore, images: Sequence[ImageFile], rows: np.ndarray, bar: tqdm):
        self.store, self.images, self.rows, self.bar = store, images, rows, bar
        self.arriving: deque[tuple[Sequence[int], Tensor, torch.cuda.Event | None]] = deque()
        self.here: dict[int, np.ndarray] = {}
        self.next = 0

    def take(self, numbers: Sequence[int], vectors: Tensor) -> None:
        """The descriptors of these pictures (numbers into rows), which the device may still be at."""
        event = None
        if vectors.device.type == "cuda":  # the next batches are queued before this one is waited for
            host = torch.empty(vectors.shape, pin_memory=True).copy_(vectors, non_blocking=True)
            event = torch.cuda.current_stream(vectors.device).record_event()
            vectors = host
        self.arriving.append((numbers, vectors, event))
        while len(self.arriving) > (0 if event is None else _IN_FLIGHT):
            self._arrive()

    def finish(self) -> None:
        """Writes all that was taken, whether what comes before it in the list is there or not."""
        try:
            while self.arriving:
                self._arrive()
        finally:
            for number in sorted(self.here):
                self.store.write(int(self.rows[number]), self.here.pop(number))
            self.store.flush()

    def _arrive(self) -> None:
        numbers, vectors, event = self.arriving.popleft()
        if event is not None:
            event.synchronize()
        for number, vector in zip(numbers, vectors.numpy(), strict=True):
            if not np.isfinite(vector).all():
                path = self.images[self.rows[number]].path
                raise InputError(f"{path}: its descriptor is not finite; a power or threshold of SupG is too large")
            self.here[number] = vector
        while self.next in self.here:
            self.store.write(int(self.rows[self.next]), self.here.pop(self.next))
            self.next += 1
            self.bar.update()


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """ "auto" is the GPU of this process where there is one, and the CPU otherwise.

    Raises:
        InputError: where there is no such GPU.
    """
    count = torch.cuda.device_count()
    if name == "auto":
        return torch.device(f"cuda:{local_rank % count}" if count else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(f"TEST.DEVICE {name}: PyTorch sees {count} GPUs here")
    return device


def describe(model: SuperGlobal, pictures: Sequence[Tensor]) -> Tensor:
    """Unit descriptors of pictures of equal size, on the model's device. (H, W, 3) uint8 RGB each -> (N, D).

    Whether they are finite is not looked at, as this would wait for the device.
    """
    with torch.inference_mode(), values_unseen():
        return model(to_network_input(torch.stack([pixels.to(model.device, non_blocking=True) for pixels in pictures])))


def describe_all(
    model: SuperGlobal,
    images: Sequence[ImageFile],
    store: DescriptorStore,
    rows: np.ndarray,
    title: str,
    workers: int = 0,
    pin_memory: bool = False,
    batch_size: int = 0,
    on_error: str = "list",
) -> None:
    """Describes some of the pictures into the store; interrupted or not, what is described stays there.

    Args:
        images: the whole list, a picture per row of the store.
        rows: which to describe, ascending.
        title: for the progress bar and the errors.
        workers, pin_memory: see ReadAhead.
        batch_size: pictures in a batch at most; 0 for what the memory allows.
        on_error: what a damaged picture does. "stop" ends at once; "list" stops the network, and the
            other pictures are only decoded, so that the error can name every damaged file; "skip"
            makes it a zero row, whose cosine with everything is 0.

    Raises:
        InputError: naming the damaged files, the one at which a worker process died, or one too large for
            the device.
    """
    damaged: list[ImageError] = []
    bar = tqdm(
        total=len(rows) + int(store.done.sum()), initial=int(store.done.sum()), desc=title, unit="img",
        dynamic_ncols=True, smoothing=0.05,
    )  # fmt: skip
    pictures = ReadAhead(images, rows, workers, pin_memory)
    results = _InListOrder(store, images, rows, bar)
    size = first_batch_size(model, batch_size)

    def usable() -> Iterator[tuple[int, Tensor]]:
        for number, pixels in enumerate(pictures):
            if isinstance(pixels, ImageError) and on_error == "skip":
                log.warning("skipped, a zero row: %s", pixels)
                results.take([number], torch.zeros(1, model.dim))
            elif isinstance(pixels, ImageError):
                damaged.append(pixels)
                if on_error == "stop":
                    return
                bar.set_description(f"{title}: looking for damaged pictures, {len(damaged)} found")
                bar.update()
            elif damaged:
                bar.update()
            else:
                yield number, pixels

    try:
        for numbers, batch in equal_sizes(usable(), size):
            paths = [images[rows[number]].path for number in numbers]
            for part, vectors in in_fitting_parts(partial(describe, model), batch, paths, size):
                results.take(numbers[part], vectors)
    except RuntimeError as error:
        raise pictures.death_of_a_worker(error) or error from None
    finally:
        results.finish()
        bar.close()
    if damaged:
        count = f"{len(damaged)} pictures" if len(damaged) > 1 else "a picture"
        raise InputError(f"{title}: {count} cannot be used: {short_list(damaged, _NAMED_AT_MOST)}")


def file_stamps(images: Sequence[ImageFile], folder: Path | None = None) -> list[str]:
    """Per picture, what tells it from others and changes when it does: name (below the folder), box, size, time."""

    def stamp(image: ImageFile) -> str:
        name, stat = image.path.relative_to(folder) if folder else image.path.name, image.path.stat()
        return f"{name} {image.box or ''} {stat.st_size}-{stat.st_mtime_ns}"

    return [stamp(image) for image in images]
