"""Reranking by local features: CVNet-Rerank's scores of pairs of images, saved as they are computed.

A pair takes half a second on a CPU, so the computation can be interrupted and resumed after each query.

Lee et al., "Correlation Verification for Image Retrieval", CVPR 2022.
"""

import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cvnet_rerank.network import CVNetRerank
from extraction.extract import file_fingerprints
from extraction.images import ImageError, ImageFile, to_network_input
from extraction.loading import PLAIN_LOADING, WORKER_ERRORS, Loading, ReadAhead
from extraction.owner import owned
from extraction.store import DescriptorStore
from model.recipe import Recipe
from modules.reranking import Found

log = logging.getLogger(__name__)

SCORE_WEIGHT = 0.5
MEMORY_BYTES = 2 << 30  # for feature maps that are kept in memory
WAITING_BYTES = 512 << 20  # for feature maps that wait for others of their size


@dataclass
class PairScores:
    """The scores of queries with their first candidates from a search.

    Attributes:
        recipe: creates the network.
        queries, database: the images; those of the database include distractors, if there are any.
        path: the .npy file of the scores, (Q, m).
        m: number of candidates per query that are scored.
        maps_folder: where feature maps are saved; None keeps only some of them, in memory.
        maps_bytes: the largest size of that folder in bytes.
        loading: how images are read.
        resume: whether scores of an earlier run are reused.
    """

    recipe: Recipe
    queries: Sequence[ImageFile]
    database: Sequence[ImageFile]
    path: Path
    m: int
    maps_folder: Path | None = None
    maps_bytes: int = 0
    loading: Loading = PLAIN_LOADING
    resume: bool = True
    _known: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    def of(self, ids: Tensor, device: torch.device) -> Tensor:
        """Returns the score of each query with each of its first m candidates. (Q, R) -> (Q, min(m, R)) float32.

        Args:
            ids: numbers of database images; -1 where an index found no more.
            device: the device of the network.

        Raises:
            InputError: if images are damaged, or the memory is too small; the scores so far are kept.
        """
        ids = ids[:, : self.m]
        if self._known is None or not torch.equal(self._known[0], ids):
            self._known = ids, torch.from_numpy(self._score(ids, device))
        return self._known[1]

    def _score(self, ids: Tensor, device: torch.device) -> np.ndarray:
        with owned(self.path):
            return self._score_owned(ids, device)

    def _score_owned(self, ids: Tensor, device: torch.device) -> np.ndarray:
        queries, m = ids.shape
        store = DescriptorStore(self.path, queries, m, self._provenance(), self.resume, self._fingerprints(ids))
        if store.complete:
            log.info("%s: reused, computed from the same images, candidates and checkpoint", store.path)
            return np.load(store.path)
        network = self.recipe.pair_network(device)
        maps = FeatureMaps(network, self._provenance(), self.maps_folder, self.maps_bytes, self.loading)
        bar = tqdm(
            total=ids.numel(), initial=int(store.done.sum()) * ids.shape[1], desc="CVNet-Rerank", unit="pair",
            dynamic_ncols=True, smoothing=0.05,
        )  # fmt: skip
        with bar, torch.inference_mode():
            for query in store.missing():
                ((_, own),) = maps.of([self.queries[query]])
                inputs = network.query_inputs(own[None].to(device))
                scores = np.zeros(ids.shape[1], dtype=np.float32)
                candidates = [self.database[number] for number in ids[query].tolist() if number >= 0]
                for places, keys in equal_sizes(maps.of(candidates), partial(network.keys_per_batch, inputs)):
                    scores[places] = network.score(inputs, keys.to(device)).cpu().numpy()
                    bar.update(len(places))
                store.write(int(query), scores)
                store.flush()
        store.finish()
        return np.load(store.path)

    def _provenance(self) -> dict[str, Any]:
        """Returns what a score depends on beside the images."""
        recipe = self.recipe
        return {
            "checkpoint_sha256": recipe.checkpoint_sha256,
            "depth": recipe.depth,
            "precision": recipe.precision,
        }

    def _fingerprints(self, ids: Tensor) -> list[str]:
        """Returns a fingerprint per query, of its own image and those of its candidates."""
        numbers = [number for number in ids.unique().tolist() if number >= 0]
        known = {-1: ""} | dict(
            zip(numbers, file_fingerprints([self.database[number] for number in numbers]), strict=True)
        )
        return [
            _digest(repr([own, [known[number] for number in row]]))
            for own, row in zip(file_fingerprints(self.queries), ids.tolist(), strict=True)
        ]


@dataclass(frozen=True)
class CVNetReranker:
    """Sorts a query's first m candidates by cosine + 0.5 * score; implements modules.candidates.Reranker.

    Attributes:
        pairs: provides the scores of at least m + spare candidates.
        m: number of candidates that are sorted.
        spare: number of further candidates that are scored, for protocols that drop some of the first.
    """

    pairs: PairScores
    m: int
    spare: int = 0

    def scores(
        self,
        queries: Tensor,
        found: Found,
        fetch: Callable[[Tensor], Tensor],
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Returns the new scores, see Reranker; `queries` and `fetch` are unused."""
        scores = self.pairs.of(found.ids, torch.device(device or queries.device))[:, : self.m + self.spare]
        return found.scores[:, : scores.shape[1]] + SCORE_WEIGHT * scores


class FeatureMaps:
    """Feature maps of images, (1024, h, w) float32 on the CPU, each computed once while there is room for it.

    Args:
        network: computes them.
        provenance: what they depend on beside the image.
        folder: where they are saved; None keeps only some of them, in memory.
        limit: the largest size of that folder in bytes, including maps of earlier runs.
        loading: how images are read.
    """

    def __init__(
        self, network: CVNetRerank, provenance: dict, folder: Path | None, limit: int, loading: Loading = PLAIN_LOADING
    ):
        self.network, self.loading, self.folder = network, loading, folder
        self.provenance = repr(sorted(provenance.items()))
        self.at_hand: dict[str, Tensor] = {}
        self.memory_left, self.disk_left = MEMORY_BYTES, limit
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.disk_left -= sum(file.stat().st_size for file in folder.iterdir())

    def of(self, images: Sequence[ImageFile]) -> Iterator[tuple[int, Tensor]]:
        """Yields the number and feature map of each image; saved ones come first.

        Raises:
            InputError: if an image is damaged, or a process that decodes images died.
        """
        fingerprints = [_digest(f"{fingerprint} {self.provenance}") for fingerprint in file_fingerprints(images)]
        missing = []
        for number, fingerprint in enumerate(fingerprints):
            if (there := self._find(fingerprint)) is None:
                missing.append(number)
            else:
                yield number, there
        device = next(self.network.parameters()).device
        decoded = ReadAhead(images, np.array(missing, dtype=np.int64), self.loading)
        try:
            for number, pixels in zip(missing, decoded, strict=True):
                if isinstance(pixels, ImageError):
                    raise pixels
                with torch.inference_mode():
                    made = self.network.feature_map(to_network_input(pixels[None].to(device)))[0].contiguous().cpu()
                self._keep(fingerprints[number], made)
                yield number, made
        except WORKER_ERRORS as error:
            raise decoded.death_of_a_worker(error) or error from None

    def _find(self, fingerprint: str) -> Tensor | None:
        if fingerprint in self.at_hand:
            return self.at_hand[fingerprint]
        if self.folder is None or not (path := self.folder / f"{fingerprint}.npy").exists():
            return None
        try:
            return torch.from_numpy(np.load(path))
        except Exception:  # damaged, for which NumPy raises many exceptions: computed again
            self.disk_left += path.stat().st_size
            path.unlink()
            return None

    def _keep(self, fingerprint: str, made: Tensor) -> None:
        if made.nbytes <= self.memory_left:
            self.memory_left -= made.nbytes
            self.at_hand[fingerprint] = made
        if self.folder is not None and made.nbytes + 128 <= self.disk_left:  # including NumPy's header
            self.disk_left -= made.nbytes + 128
            new = self.folder / f"{fingerprint}.{os.getpid()}.new"
            with new.open("wb") as file:
                np.save(file, made.numpy())
            new.replace(self.folder / f"{fingerprint}.npy")


def map_bytes(images: Sequence[ImageFile]) -> int:
    """Returns the mean size in bytes of these images' feature maps, (1024, H / 16, W / 16) float32."""
    sizes = []
    for image in images:
        with Image.open(image.path) as opened:
            width, height = opened.size
        sizes.append(4 * 1024 * math.ceil(height / 16) * math.ceil(width / 16))
    return round(sum(sizes) / len(sizes))


def equal_sizes(
    maps: Iterable[tuple[int, Tensor]], most: Callable[[Tensor], int]
) -> Iterator[tuple[list[int], Tensor]]:
    """Yields batches of feature maps of equal size, (K, 1024, h, w), with their numbers.

    Args:
        maps: feature maps with their numbers.
        most: returns the largest batch for maps of this shape, (1, 1024, h, w).
    """
    waiting: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
    held = 0
    for number, made in maps:
        waiting.setdefault(tuple(made.shape), []).append((number, made))
        held += made.nbytes
        due = [tuple(made.shape)] if len(waiting[tuple(made.shape)]) >= most(made[None]) else []
        if not due and held >= WAITING_BYTES:
            due = [max(waiting, key=lambda shape: len(waiting[shape]))]
        for batch in map(waiting.pop, due):
            held -= sum(part.nbytes for _, part in batch)
            yield [each for each, _ in batch], torch.stack([part for _, part in batch])
    for batch in waiting.values():
        yield [each for each, _ in batch], torch.stack([part for _, part in batch])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
