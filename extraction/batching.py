"""Batches of equally sized images from a list of mixed sizes, as large as the memory allows."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from model.device import is_out_of_memory
from model.errors import InputError
from model.extractor import Extractor

log = logging.getLogger(__name__)

# How far images are read ahead to find some of equal size: in images (each holds a file descriptor
# while it is shared with the process that decoded it), and in bytes.
WINDOW_IMAGES = 256
WINDOW_BYTES = 512 << 20

# Pixels and images per batch. On two CPU cores, batches of 8 speed up images of 320x240 by a third or
# more (each call reorders the weights), but not images of 1024x768.
CPU_PIXELS, CPU_IMAGES = 1 << 20, 16
GPU_PIXELS = 16 << 20
# Bytes of a ResNet's activations per pixel of the scaled image: about 60 values are alive at the peak.
_LIVE_VALUES = 60

# PyTorch's message when all of cuDNN's convolution algorithms failed, for lack of memory or for another reason.
_NO_ENGINE = "unable to find an engine to execute this computation"


class BatchSize:
    """The number of images per batch: a bound on pixels, which bounds the memory.

    Args:
        pixels: largest number of pixels per batch.
        images: largest number of images per batch; 0 for no limit.
    """

    def __init__(self, pixels: int, images: int = 0):
        self.pixels, self.images = pixels, images

    def of(self, pixels: Tensor) -> int:
        """Returns the batch size for images of this shape, (H, W, 3)."""
        count = max(1, self.pixels // (pixels.shape[0] * pixels.shape[1]))
        return min(count, self.images or count)

    def halve(self, batch: Sequence[Tensor]) -> None:
        """Halves the size after a batch that did not fit."""
        self.pixels = len(batch) * batch[0].shape[0] * batch[0].shape[1] // 2


def first_batch_size(extractor: Extractor, images: int = 0) -> BatchSize:
    """Estimates the batch size that fits in half of the GPU's free memory; on a CPU, the fastest for its caches.

    Memory that PyTorch reserves but does not use counts as free.
    """
    if extractor.device.type != "cuda":
        return BatchSize(CPU_PIXELS, min(images or CPU_IMAGES, CPU_IMAGES))
    free, _ = torch.cuda.mem_get_info(extractor.device)
    free += torch.cuda.memory_reserved(extractor.device) - torch.cuda.memory_allocated(extractor.device)
    per_pixel = _LIVE_VALUES * 4 * max(getattr(extractor, "scales", (1.0,))) ** 2
    return BatchSize(min(GPU_PIXELS, int(free / 2 / per_pixel)), images)


def equal_sizes(
    images: Iterable[tuple[int, Tensor]], size: BatchSize
) -> Iterator[tuple[tuple[int, ...], tuple[Tensor, ...]]]:
    """Yields batches of equally sized images, with their numbers, from images (H, W, 3) in ascending order of numbers.

    A batch is yielded when it is full, or when its first image is further behind than the window, so
    that results can be written in the order of the list without long waits.
    """
    waiting: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}  # by shape, the one with the oldest image first
    held = 0
    for number, pixels in images:
        shape = tuple(pixels.shape)
        waiting.setdefault(shape, []).append((number, pixels))
        held += pixels.nbytes
        due = [shape] if len(waiting[shape]) >= size.of(pixels) else []
        oldest = next(iter(waiting))
        if oldest not in due and (held >= WINDOW_BYTES or number - waiting[oldest][0][0] >= WINDOW_IMAGES):
            due.append(oldest)
        for batch in map(waiting.pop, due):
            held -= sum(part.nbytes for _, part in batch)
            yield _unzipped(batch)
    for batch in waiting.values():
        yield _unzipped(batch)


def _unzipped(batch: list[tuple[int, Tensor]]) -> tuple[tuple[int, ...], tuple[Tensor, ...]]:
    return tuple(number for number, _ in batch), tuple(pixels for _, pixels in batch)


def in_fitting_parts(
    extract: Callable[[Sequence[Tensor]], Tensor], batch: Sequence[Tensor], names: Sequence[object], size: BatchSize
) -> Iterator[tuple[slice, Tensor | InputError]]:
    """Yields parts of the batch as slices, in order, with extract(part); parts are as large as the memory allows.

    If a single image does not fit, the error that names it is yielded in place of its descriptor.

    Args:
        extract: computes the descriptors of equally sized images.
        names: the names of the images, for the error.
        size: the batch size, which is halved whenever a part does not fit.
    """
    done, retried = 0, False
    while done < len(batch):
        part = slice(done, min(done + size.of(batch[0]), len(batch)))
        vectors: Tensor | InputError | None = None
        try:
            vectors = extract(batch[part])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                if _NO_ENGINE not in str(error) or retried or part.stop == done + 1:
                    raise
                retried = True  # the cause may have been a lack of memory
            elif part.stop == done + 1:
                height, width = batch[done].shape[:2]
                vectors = InputError(
                    f"{names[done]}: the memory of the device is too small for {width} x {height} pixels; choose fewer "
                    "scales, half precision, a limit of the side, or the CPU"
                )
        if vectors is None:  # not in the handler, which would keep the memory of the failed part alive
            size.halve(batch[part])
            log.info("out of memory with %d images in a batch; retrying with half as many", part.stop - done)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        yield part, vectors
        done = part.stop
