"""Extract the descriptors of many images: decoded ahead, batched by size, with results in the order of the list."""

import logging
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from extraction.batching import equal_sizes, first_batch_size, in_fitting_parts
from extraction.images import ImageError, ImageFile
from extraction.loading import PLAIN_LOADING, WORKER_ERRORS, Loading, ReadAhead
from extraction.processes import Processes
from extraction.store import DescriptorStore, nonzero_rows
from model.errors import InputError, short_list
from model.extractor import Extractor
from modules.checks import values_unseen

log = logging.getLogger(__name__)

# The number of damaged files that an error message lists.
_NAMED_AT_MOST = 50

# The number of batches queued on a GPU before the host waits for the first of them.
_IN_FLIGHT = 3


class ExtractorRecipe(Protocol):
    """Creates an extractor, and records what its descriptors depend on; implemented by model.recipe.Recipe.

    Attributes:
        dim: D, dimensions of a descriptor.
    """

    dim: int

    def extractor(self, device: torch.device) -> Extractor: ...

    def provenance(self) -> dict[str, Any]:
        """Returns everything a descriptor depends on except its image, as JSON."""
        ...


@dataclass(frozen=True)
class ImageSet:
    """A list of images whose descriptors are stored in one file, in the same order.

    Attributes:
        path: the .npy file of the descriptors.
        title: the name in the progress bar and in error messages.
        images: the images.
        folder: images are identified by their path relative to it, or by their file name if it is None.
        provenance: what the descriptors depend on beside recipe and images.
        fingerprinted: whether name, size and time of each file are recorded, to extract changed images again.
    """

    path: Path
    title: str
    images: Sequence[ImageFile]
    folder: Path | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    fingerprinted: bool = True

    def open_store(self, recipe: ExtractorRecipe, resume: bool = True) -> DescriptorStore:
        """Returns the store of the descriptors; resume=False starts over."""
        return DescriptorStore(
            self.path, len(self.images), recipe.dim, self._provenance(recipe), resume, self._fingerprints()
        )

    def store_of_rank(self, recipe: ExtractorRecipe, rank: int, done: np.ndarray) -> DescriptorStore:
        """Returns the store for another process of a `torchrun`, see DescriptorStore.of_rank."""
        return DescriptorStore.of_rank(
            self.path, recipe.dim, self._provenance(recipe), rank, done, self._fingerprints()
        )

    def _provenance(self, recipe: ExtractorRecipe) -> dict[str, Any]:
        return {**recipe.provenance(), **self.provenance}

    def _fingerprints(self) -> list[str] | None:
        return file_fingerprints(self.images, self.folder) if self.fingerprinted else None


def extract_sets(
    sets: Sequence[ImageSet],
    recipe: ExtractorRecipe,
    device: torch.device,
    loading: Loading = PLAIN_LOADING,
    resume: bool = True,
    on_error: str = "list",
) -> list[Tensor]:
    """Returns the descriptors of each set, (N, D), memory-mapped from their files.

    Saved descriptors with the same provenance and images are reused; the network is created only if an
    image must be extracted.

    Args:
        resume: False extracts everything again.
        on_error: how damaged images are handled, see extract_images.

    Raises:
        InputError: if images are damaged; descriptors that were already extracted are kept.
    """
    stores = [each.open_store(recipe, resume) for each in sets]  # opens all of them before changing one
    extractor = None
    for each, store in zip(sets, stores, strict=True):
        if len(store.failed):  # a row of zeros is not a descriptor
            again = [row for row in store.failed.tolist() if on_error != "skip" or each.images[row].problem() is None]
            if again:
                store.reopen(np.array(again))
        if store.complete:
            log.info("%s: reused, extracted from the same images, checkpoint and settings", store.path)
            continue
        start, missing = time.perf_counter(), store.missing()
        if len(missing):
            extractor = extractor or recipe.extractor(device)
            extract_images(extractor, each.images, store, missing, each.title, loading, on_error)
        made = int(nonzero_rows(store.part_rows()[missing]).sum())
        store.finish()
        kept = len(each.images) - len(missing)
        counts = {"unchanged": kept, "removed or replaced": store.gone, "unreadable": len(missing) - made}
        words = "".join(f", {count} {what}" for what, count in counts.items() if count)
        log.info("%s: %d images extracted%s (%.1f s)", each.title, made, words, time.perf_counter() - start)
    return [torch.from_numpy(np.load(store.path, mmap_mode="c")) for store in stores]


def extract_images(
    extractor: Extractor,
    images: Sequence[ImageFile],
    store: DescriptorStore,
    rows: np.ndarray,
    title: str,
    loading: Loading = PLAIN_LOADING,
    on_error: str = "list",
) -> None:
    """Extracts the descriptors of some of the images into the store, which keeps them if the run is interrupted.

    Args:
        extractor: any implementation of the protocol.
        images: the whole list, one image per row of the store.
        rows: the rows to extract, ascending.
        title: the name in the progress bar and in error messages.
        loading: how images are read and batched.
        on_error: how damaged images are handled. "stop" raises an error at once. "list" extracts no more
            and only decodes the other images, so that the error can name every damaged file. "skip" writes
            a row of zeros, whose cosine with everything is 0; this includes images that are too large for
            the memory, which otherwise raise an error at once.

    Raises:
        InputError: if files are damaged, a worker process died, or an image is too large for the device;
            the message names the files.
    """
    damaged: list[ImageError] = []
    bar = tqdm(
        total=len(rows) + int(store.done.sum()), initial=int(store.done.sum()), desc=title, unit="img",
        dynamic_ncols=True, smoothing=0.05,
    )  # fmt: skip
    decoded = ReadAhead(images, rows, loading)
    results = _InListOrder(store, images, rows, bar)
    size = first_batch_size(extractor, loading.batch_size)

    def usable() -> Iterator[tuple[int, Tensor]]:
        for number, pixels in enumerate(decoded):
            if isinstance(pixels, ImageError) and on_error == "skip":
                log.warning("skipped, a row of zeros: %s", pixels)
                results.take([number], torch.zeros(1, extractor.dim))
            elif isinstance(pixels, ImageError):
                damaged.append(pixels)
                if on_error == "stop":
                    return
                bar.set_description(f"{title}: looking for damaged images, {len(damaged)} found")
                bar.update()
            elif damaged:
                bar.update()
            else:
                yield number, pixels

    try:
        for numbers, batch in equal_sizes(usable(), size):
            paths = [images[rows[number]].path for number in numbers]
            for part, vectors in in_fitting_parts(partial(extract_batch, extractor), batch, paths, size):
                if isinstance(vectors, InputError):
                    if on_error != "skip":
                        raise vectors
                    log.warning("skipped, a row of zeros: %s", vectors)
                    vectors = torch.zeros(1, extractor.dim)
                results.take(numbers[part], vectors)
    except WORKER_ERRORS as error:
        raise decoded.death_of_a_worker(error) or error from None
    finally:
        try:
            results.finish()
        finally:
            bar.close()  # so that an error starts on a new line
    if damaged:
        count = f"{len(damaged)} images" if len(damaged) > 1 else "an image"
        pixels = max(error.pixels for error in damaged)
        advice = "replace them, or skip damaged images" if on_error == "stop" else "replace them"
        advice = f"raise the limit to {pixels} pixels" if pixels else advice
        raise InputError(f"{title}: {count} cannot be used: {short_list(damaged, _NAMED_AT_MOST)}; {advice}")


def extract_shared(
    each: ImageSet,
    recipe: ExtractorRecipe,
    device: torch.device,
    processes: Processes,
    loading: Loading = PLAIN_LOADING,
    resume: bool = True,
    on_error: str = "stop",
) -> DescriptorStore | None:
    """Extracts one set with all processes of a `torchrun`, all of which must see its file under the same path.

    Args:
        device: the device of this process.
        on_error: how damaged images are handled, see extract_images.

    Returns:
        The complete store in the first process, which must call ``finish()``; None in the others.

    Raises:
        InputError: as extract_images, and if another process failed.
    """
    first = processes.rank == 0
    opened = each.open_store(recipe, resume) if first else None
    done = processes.from_first(np.zeros(len(each.images), dtype=bool) if opened is None else opened.done)
    store = each.store_of_rank(recipe, processes.rank, done) if opened is None else opened
    mine = np.array_split(store.missing(), processes.count)[processes.rank]
    if len(mine):
        title = each.title if processes.count == 1 else f"{each.title}, {processes!r}"
        extract_images(recipe.extractor(device), each.images, store, mine, title, loading, on_error)
    processes.wait()
    if not first:
        return None
    # Opening the store again joins the journals of all processes.
    return store if store.complete or processes.count == 1 else each.open_store(recipe)


def extract_batch(extractor: Extractor, images: Sequence[Tensor]) -> Tensor:
    """Returns the descriptors of images of equal size, on the extractor's device. (H, W, 3) RGB each -> (N, D).

    It is not checked that they are finite, because this would wait for the device.
    """
    with torch.inference_mode(), values_unseen():
        return extractor(torch.stack([pixels.to(extractor.device, non_blocking=True) for pixels in images]))


def file_fingerprints(images: Sequence[ImageFile], folder: Path | None = None) -> list[str]:
    """Returns a fingerprint of each image file: its name (relative to the folder), box, size and time."""

    below = f"{folder}{os.sep}" if folder else ""

    def fingerprint(image: ImageFile) -> str:
        path = str(image.path)  # called a million times, and pathlib is slower
        name, stat = path.removeprefix(below) if folder else image.path.name, os.stat(path)
        return f"{name} {image.box or ''} {stat.st_size}-{stat.st_mtime_ns}"

    return [fingerprint(image) for image in images]


class _InListOrder:
    """Collects descriptors in any order, also from a GPU, and writes them to the store in the order of the list."""

    def __init__(self, store: DescriptorStore, images: Sequence[ImageFile], rows: np.ndarray, bar: tqdm):
        self.store, self.images, self.rows, self.bar = store, images, rows, bar
        self.arriving: deque[tuple[Sequence[int], Tensor, torch.cuda.Event | None]] = deque()
        self.here: dict[int, np.ndarray] = {}
        self.next = 0

    def take(self, numbers: Sequence[int], vectors: Tensor) -> None:
        """Adds the descriptors of these images (indices into rows), which the device may still be computing."""
        event = None
        if vectors.device.type == "cuda":  # queue the next batches before waiting for this one
            host = torch.empty(vectors.shape, pin_memory=True).copy_(vectors, non_blocking=True)
            event = torch.cuda.current_stream(vectors.device).record_event()
            vectors = host
        self.arriving.append((numbers, vectors, event))
        while len(self.arriving) > (0 if event is None else _IN_FLIGHT):
            self._arrive()

    def finish(self) -> None:
        """Writes all descriptors, even if earlier ones in the list are missing."""
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
                raise InputError(
                    f"{path}: its descriptor is not finite; a power or threshold of the modules is too large, "
                    "or the network overflows in fp16"
                )
            self.here[number] = vector
        while self.next in self.here:
            self.store.write(int(self.rows[self.next]), self.here.pop(self.next))
            self.next += 1
            self.bar.update()
