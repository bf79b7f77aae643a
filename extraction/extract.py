"""Extract the descriptors of many images: decoded ahead, batched by size, and stored by the content of the images."""

import logging
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from extraction.batching import equal_sizes, first_batch_size, in_fitting_parts
from extraction.identity import KEY_BYTES, Identity, stat_record
from extraction.images import ImageError, ImageFile, NameList, probe_pixels
from extraction.loading import PLAIN_LOADING, WORKER_ERRORS, Loading, ReadAhead
from extraction.owner import owned
from extraction.processes import Processes
from extraction.provenance import Provenance
from extraction.store import Records, Store, load_rows
from model.errors import InputError, short_list
from model.extractor import Extractor
from model.recipe import Recipe
from modules.checks import values_unseen

log = logging.getLogger(__name__)

# The number of damaged files that an error message lists.
_NAMED_AT_MOST = 50

# The number of batches queued on a GPU before the host waits for the first of them.
_IN_FLIGHT = 3


@dataclass(frozen=True)
class ImageSet:
    """A list of images whose descriptors are stored in one file, in the same order.

    Attributes:
        path: the .npy (or .pth) file of the descriptors.
        title: the name in the progress bar and in error messages.
        images: the images.
        folder: images are labelled by their path relative to it, or by their whole path if it is None.
    """

    path: Path
    title: str
    images: Sequence[ImageFile]
    folder: Path | None = None

    def __post_init__(self) -> None:
        if isinstance(self.path, str):
            object.__setattr__(self, "path", Path(self.path))


def provenance_of(recipe: Recipe, extractor: Extractor) -> Provenance:
    """Returns what descriptors depend on beside their images; the probe is those of two small drawn images, (2, D)."""
    rows = [extract_batch(extractor, [torch.from_numpy(pixels)])[0].cpu() for pixels in probe_pixels()]
    return Provenance(recipe.provenance(), torch.stack(rows).float().numpy(), probe_tolerance(recipe.precision))


def probe_tolerance(precision: str) -> float:
    """Returns the largest difference from 1 of the cosine of two probes of the same code."""
    return 1e-8 if precision == "fp32" else 1e-4


def extract_sets(
    sets: Sequence[ImageSet],
    recipe: Recipe,
    device: torch.device,
    loading: Loading = PLAIN_LOADING,
    resume: bool = True,
    on_error: str = "stop",
    processes: Processes | None = None,
    replace: bool = True,
    facts: dict[str, Any] | None = None,
    finish: bool = True,
) -> list[Tensor]:
    """Returns the descriptors of each set, (N, D), memory-mapped from their files.

    Saved descriptors of the same images are reused if they have the same provenance and if the extractor still
    computes the same probe; all others are extracted.

    Args:
        resume: False extracts everything again.
        on_error: how damaged images are handled, see extract_images.
        processes: the processes of a `torchrun`, which share the work and must see the files under the same paths;
            by default only this one.
        replace: whether descriptors of other settings are replaced; else they are an error.
        facts: added to the provenance files.
        finish: False leaves new descriptors in the blocks of the file, for a call with a longer list, and returns
            nothing; several processes or machines may do that at the same time.

    Raises:
        InputError: if images are missing or damaged, or another process failed; descriptors that were extracted are
            kept.
    """
    processes = processes or Processes(alone=True)
    extractor = recipe.extractor(device)
    provenance = provenance_of(recipe, extractor)
    with owned(sets[0].path) if processes.rank == 0 and finish else nullcontext():
        for each in sets:
            store = Store(each.path, recipe.dim, provenance, replace)
            missing, start = np.zeros(len(each.images), dtype=bool), time.perf_counter()
            if processes.rank == 0:
                store.read() if resume else store.clear()
                known, existing = _known_images(each, store, on_error), len(store.records.labels)
                missing[:] = ~known.keys.any(axis=1)
            missing = processes.from_first(missing)
            rows = np.array_split(np.flatnonzero(missing), processes.count)[processes.rank]
            if len(rows):
                title = each.title if processes.count == 1 else f"{each.title}, {processes!r}"
                done = int((~missing).sum()) if processes.count == 1 else 0
                extract_images(extractor, each, store, rows, loading, recipe.max_side, on_error, title, done)
            processes.wait()
            if processes.rank == 0 and finish:
                _finish(each, store, known, existing, facts, start)
            processes.wait()
    return [load_rows(each.path) for each in sets] if finish else []


def _known_images(each: ImageSet, store: Store, on_error: str) -> Records:
    """Returns the records of the images whose rows exist, found by their stat record, or else by their content.

    The key of all others is NO_KEY. A row whose image has been deleted since is used, too.
    """
    count = len(each.images)
    keys, stats, absent = np.zeros((count, KEY_BYTES), np.uint8), np.zeros((count, 4), np.int64), np.zeros(count, bool)

    def labels() -> Iterator[bytes]:
        for number, image in enumerate(each.images):
            try:
                stats[number] = stat_record(os.stat(str(image.path)))  # text, because there may be a million
            except OSError:
                absent[number] = True
            yield image.label(each.folder)

    records = Records(NameList(labels()).array, keys, stats)
    numbers = store.records.with_label(records.labels)
    absent_rows = absent & (numbers >= 0)
    stats[absent_rows] = store.records.stats[numbers[absent_rows]]
    same = numbers >= 0
    for column, before in zip(stats.T, store.records.stats.T, strict=True):  # one at a time: there may be a million
        same[same] = column[same] == before[numbers[same]]
    keys[same] = store.records.keys[numbers[same]]
    if (missing := np.flatnonzero(absent & ~same)).size and on_error != "skip":
        names = short_list([each.images[number].path for number in missing[:_NAMED_AT_MOST]])
        raise InputError(f"{each.title}: {len(missing)} of {count} images are missing ({names})")
    if absent_rows.any():
        log.warning("%s: %d images have been deleted; their descriptors are used", each.title, absent_rows.sum())
    sizes = np.unique(store.records.stats[:, 0])
    # The size 0 is that of an image that was too young to trust its stat record.
    changed = np.flatnonzero(~same & ~absent & (np.isin(stats[:, 0], sizes) | (0 in sizes)))
    for number in tqdm(changed, desc=f"{each.title}: comparing", unit="img", dynamic_ncols=True, delay=2):
        with suppress(ImageError):
            key, stats[number] = each.images[number].identity()
            keys[number] = np.frombuffer(key, np.uint8)
    keys[changed[~store.has(keys[changed])]] = 0
    return records


def _finish(
    each: ImageSet, store: Store, known: Records, existing: int, facts: dict[str, Any] | None, start: float
) -> None:
    """Completes the file of a set after its extraction, and logs what was done.

    Args:
        existing: the number of the store's records before the extraction.
    """
    store.flush()
    store.read_blocks()
    missing = np.flatnonzero(~known.keys.any(axis=1))
    numbers = store.records.with_label(known.labels[missing])
    new = numbers >= existing  # what an image of this name was before does not count
    known.keys[missing[new]] = store.records.keys[numbers[new]]
    known.stats[missing[new]] = store.records.stats[numbers[new]]
    skipped = [os.fsdecode(bytes(label)) for label in known.labels[missing[~new]]]
    if not store.finish(known, {"skipped": skipped, **(facts or {})}):
        log.info("%s: reused, extracted from the same images, checkpoint and settings", each.path)
        return
    counts = {"unchanged": len(known.keys) - len(missing), "unreadable": len(skipped)}
    words = "".join(f", {number} {what}" for what, number in counts.items() if number)
    extracted, seconds = len(missing) - len(skipped), time.perf_counter() - start
    log.info("%s: %d images extracted%s (%.1f s)", each.title, extracted, words, seconds)


def extract_images(
    extractor: Extractor,
    each: ImageSet,
    store: Store,
    rows: np.ndarray,
    loading: Loading = PLAIN_LOADING,
    max_side: int | None = None,
    on_error: str = "stop",
    title: str = "",
    done: int = 0,
) -> None:
    """Extracts the descriptors of some images of a set into the store, which keeps them if the run is interrupted.

    Args:
        extractor: any implementation of the protocol.
        rows: the numbers of the images to extract, ascending.
        loading: how images are read and batched.
        max_side: longer side to which larger images are reduced, or None.
        on_error: how damaged images are handled, of which none gets a row. "stop" extracts all others and then raises
            an error that names them; "skip" does not, and includes images that are too large for the memory, which
            otherwise raise an error at once.
        title: the name in the progress bar and in error messages.
        done: the number of images whose descriptors exist, for the progress bar.

    Raises:
        InputError: if files are damaged, a worker process died, or an image is too large for the device;
            the message names the files.
    """
    damaged: list[ImageError] = []
    bar = tqdm(
        total=len(rows) + done, initial=done, desc=title or each.title, unit="img", dynamic_ncols=True, smoothing=0.05
    )
    decoded = ReadAhead(each.images, rows, loading, max_side)
    results = _Arrivals(each, store, bar)
    size = first_batch_size(extractor, loading.batch_size)
    identities: dict[int, Identity] = {}

    def usable() -> Iterator[tuple[int, Tensor]]:
        for number, item in enumerate(decoded):
            if isinstance(item, ImageError):
                log.warning("%s", item)
                damaged.append(item)
                bar.update()
            else:
                pixels, identities[number] = item
                yield number, pixels

    try:
        try:
            for numbers, batch in equal_sizes(usable(), size.of):
                paths = [each.images[rows[number]].path for number in numbers]
                for part, vectors in in_fitting_parts(partial(extract_batch, extractor), batch, paths, size):
                    images = {int(rows[number]): identities.pop(number) for number in numbers[part]}
                    if not isinstance(vectors, InputError):
                        results.take(images, vectors)
                    elif on_error == "skip":
                        log.warning("%s", vectors)
                        bar.update()
                    else:
                        raise vectors
        finally:
            results.finish()
    except WORKER_ERRORS as error:  # the death of a worker is a signal, which may interrupt finishing, too
        results.finish()
        raise decoded.death_of_a_worker(error) or error from None
    finally:
        bar.close()  # so that an error starts on a new line
    if damaged and on_error != "skip":
        count = f"{len(damaged)} images" if len(damaged) > 1 else "an image"
        pixels = max(error.pixels for error in damaged)
        advice = f"; raise the limit to {pixels} pixels" if pixels else ""
        raise InputError(
            f"{title or each.title}: {count} cannot be used: {short_list(damaged, _NAMED_AT_MOST)}{advice}"
        )


def extract_batch(extractor: Extractor, images: Sequence[Tensor]) -> Tensor:
    """Returns the descriptors of images of equal size, on the extractor's device. (H, W, 3) RGB each -> (N, D).

    It is not checked that they are finite, because this would wait for the device.
    """
    with torch.inference_mode(), values_unseen():
        return extractor(torch.stack([pixels.to(extractor.device, non_blocking=True) for pixels in images]))


class _Arrivals:
    """Receives descriptors, also from a GPU that still computes them, and writes them to the store."""

    def __init__(self, each: ImageSet, store: Store, bar: tqdm):
        self.each, self.store, self.bar = each, store, bar
        self.arriving: deque[tuple[dict[int, Identity], Tensor, torch.cuda.Event | None]] = deque()

    def take(self, identities: dict[int, Identity], vectors: Tensor) -> None:
        """Adds the descriptors of these images (by number), which the device may still be computing."""
        event = None
        if vectors.device.type == "cuda":  # queue the next batches before waiting for this one
            host = torch.empty(vectors.shape, pin_memory=True).copy_(vectors, non_blocking=True)
            event = torch.cuda.current_stream(vectors.device).record_event()
            vectors = host
        self.arriving.append((identities, vectors, event))
        while len(self.arriving) > (0 if event is None else _IN_FLIGHT):
            self._arrive()

    def finish(self) -> None:
        """Writes all descriptors to disk."""
        try:
            while self.arriving:
                self._arrive()
        finally:
            self.store.flush()

    def _arrive(self) -> None:
        identities, vectors, event = self.arriving.popleft()
        if event is not None:
            event.synchronize()
        for (number, identity), vector in zip(identities.items(), vectors.numpy(), strict=True):
            image = self.each.images[number]
            if not np.isfinite(vector).all():
                raise InputError(
                    f"{image.path}: its descriptor is not finite; a power or threshold of the modules is too large, "
                    "or the network overflows in fp16"
                )
            self.store.write(image.label(self.each.folder), identity, vector)
            self.bar.update()
