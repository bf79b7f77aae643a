"""Many pictures -> descriptors: decoding in worker processes ahead of the network, results in list order."""

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from model.errors import InputError, short_list
from model.images import ImageError, ImageFile, to_network_input
from model.store import DescriptorStore
from model.superglobal import SuperGlobal

log = logging.getLogger(__name__)

# All damaged files are named, but a line stays a line.
_NAMED_AT_MOST = 50


class _Pixels(Dataset):
    """Picture -> (H, W, 3) uint8 pixels, or the error, so that one bad file does not end a worker."""

    def __init__(self, images: Sequence[ImageFile], rows: np.ndarray):
        self.images, self.rows = images, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor | ImageError:
        try:
            return torch.from_numpy(self.images[self.rows[index]].read())
        except ImageError as error:
            return error


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


def read_ahead(
    images: Sequence[ImageFile], rows: np.ndarray, workers: int = 0, pin_memory: bool = False
) -> Iterator[Tensor | ImageError]:
    """The pixels of each of these rows of the list, in order, (H, W, 3) uint8, or its ImageError."""
    workers = min(workers, os.cpu_count() or 1, len(rows))
    return iter(DataLoader(_Pixels(images, rows), batch_size=None, num_workers=workers, pin_memory=pin_memory))


def describe(model: SuperGlobal, pixels: Tensor) -> Tensor:
    """The unit descriptor of one picture, on the CPU. (H, W, 3) uint8 RGB -> (D,)."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        return model(to_network_input(pixels.to(device, non_blocking=True)[None]))[0].cpu()


def describe_all(
    model: SuperGlobal,
    images: Sequence[ImageFile],
    store: DescriptorStore,
    rows: np.ndarray,
    title: str,
    workers: int = 0,
    pin_memory: bool = False,
    on_error: str = "list",
) -> None:
    """Describes some of the pictures into the store; interrupted or not, what is described stays there.

    Args:
        images: the whole list, a picture per row of the store.
        rows: which to describe, ascending.
        title: for the progress bar and the errors.
        on_error: what a damaged picture does. "stop" ends at once; "list" stops the network, and the
            other pictures are only decoded, so that the error can name every damaged file; "skip"
            makes it a zero row, whose cosine with everything is 0.

    Raises:
        InputError: naming the damaged files.
    """
    damaged: list[ImageError] = []
    bar = tqdm(
        total=len(rows) + int(store.done.sum()), initial=int(store.done.sum()), desc=title, unit="img",
        dynamic_ncols=True, smoothing=0.05,
    )  # fmt: skip
    try:
        pictures = read_ahead(images, rows, workers, pin_memory)
        for row, pixels in zip(rows, pictures, strict=True):
            if isinstance(pixels, ImageError) and on_error == "skip":
                log.warning("skipped, a zero row: %s", pixels)
                store.write(row, np.zeros(model.dim, dtype=np.float32))
            elif isinstance(pixels, ImageError):
                damaged.append(pixels)
                if on_error == "stop":
                    break
                bar.set_description(f"{title}: looking for damaged pictures, {len(damaged)} found")
            elif not damaged:
                vector = describe(model, pixels).numpy()
                if not np.isfinite(vector).all():
                    path = images[row].path
                    raise InputError(f"{path}: its descriptor is not finite; a power or threshold of SupG is too large")
                store.write(row, vector)
            bar.update()
    finally:
        store.flush()
        bar.close()
    if damaged:
        count = f"{len(damaged)} pictures" if len(damaged) > 1 else "a picture"
        raise InputError(f"{title}: {count} cannot be used: {short_list(damaged, _NAMED_AT_MOST)}")


def list_digest(images: Sequence[ImageFile]) -> str:
    """A digest of the names and boxes, in their order."""
    return hashlib.sha256(repr([(image.path.name, image.box) for image in images]).encode()).hexdigest()


def file_stamps(images: Sequence[ImageFile]) -> list[str]:
    """Per picture, what changes when its file does: size and time."""
    return [f"{stat.st_size}-{stat.st_mtime_ns}" for stat in (image.path.stat() for image in images)]
