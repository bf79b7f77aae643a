"""Many pictures -> descriptors: decoding in worker processes ahead of the network, results in list order."""

import hashlib
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

# All damaged files are named, but a line stays a line.
_NAMED_AT_MOST = 50


class _Pixels(Dataset):
    """Picture -> (H, W, 3) uint8 pixels, or the error, so that one bad file does not end a worker."""

    def __init__(self, images: Sequence[ImageFile]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor | ImageError:
        try:
            return torch.from_numpy(self.images[index].read())
        except ImageError as error:
            return error


def choose_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one, and the CPU otherwise. Raises InputError where there is no such GPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"TEST.DEVICE {name}: PyTorch sees {torch.cuda.device_count()} GPUs here")
    return device


def read_ahead(
    images: Sequence[ImageFile], workers: int = 0, pin_memory: bool = False
) -> Iterator[Tensor | ImageError]:
    """The pixels of each picture in list order, (H, W, 3) uint8, or its ImageError."""
    workers = min(workers, os.cpu_count() or 1, len(images))
    return iter(DataLoader(_Pixels(images), batch_size=None, num_workers=workers, pin_memory=pin_memory))


def describe(model: SuperGlobal, pixels: Tensor) -> Tensor:
    """The unit descriptor of one picture, on the CPU. (H, W, 3) uint8 RGB -> (D,)."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        return model(to_network_input(pixels.to(device, non_blocking=True)[None]))[0].cpu()


def describe_all(
    model: SuperGlobal,
    images: Sequence[ImageFile],
    store: DescriptorStore,
    title: str,
    workers: int = 0,
    pin_memory: bool = False,
) -> np.ndarray:
    """Describes the pictures that the store does not have yet. Returns all rows, (N, D), memory-mapped.

    A damaged picture stops the network; the remaining pictures are then only decoded, so that the
    error can name every damaged file at once. What has been described stays in the store.

    Raises:
        InputError: naming the damaged files.
    """
    missing = store.missing()
    todo = [images[row] for row in missing]
    damaged: list[ImageError] = []
    bar = tqdm(total=len(images), initial=len(images) - len(todo), desc=title, unit="img", dynamic_ncols=True)
    try:
        for row, pixels in zip(missing, read_ahead(todo, workers, pin_memory), strict=True):
            if isinstance(pixels, ImageError):
                damaged.append(pixels)
                bar.set_description(f"{title}: looking for damaged pictures, {len(damaged)} found")
            elif not damaged:
                store.write(row, describe(model, pixels).numpy())
            bar.update()
    finally:
        store.flush()
        bar.close()
    if damaged:
        count = f"{len(damaged)} pictures" if len(damaged) > 1 else "a picture"
        raise InputError(f"{title}: {count} cannot be used: {short_list(damaged, _NAMED_AT_MOST)}")
    return store.finish()


def fingerprint(images: Sequence[ImageFile]) -> str:
    """A digest that changes with the names, boxes, sizes or times of the files."""
    digest = hashlib.sha256()
    for image in images:
        stat = image.path.stat()
        digest.update(repr((image.path.name, image.box, stat.st_size, stat.st_mtime_ns)).encode())
    return digest.hexdigest()
