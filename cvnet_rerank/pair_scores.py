"""CVNet-Rerank's scores of pairs of images, saved as they are computed.

A pair takes half a second on a CPU, so the computation can be interrupted and resumed after each query.

Lee et al., "Correlation Verification for Image Retrieval", CVPR 2022.
"""

import hashlib
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cvnet_rerank.network import CVNetRerank, load_cvnet_rerank
from extraction.batching import equal_sizes
from extraction.extract import probe_tolerance
from extraction.files import write_array, write_atomically, write_json
from extraction.identity import KEY_BYTES, NO_STAT, Identity
from extraction.images import ImageError, ImageFile, probe_pixels
from extraction.loading import PLAIN_LOADING, WORKER_ERRORS, Loading, ReadAhead
from extraction.owner import owned
from extraction.provenance import Provenance, fingerprint
from extraction.store import Records, Store
from model.recipe import Recipe

log = logging.getLogger(__name__)

MEMORY_BYTES = 2 << 30  # for feature maps that are kept in memory
_HEADER_BYTES = 512  # at most, around an array in a .npz file


@dataclass
class PairScores:
    """The scores of queries with their first candidates from a search.

    Attributes:
        recipe: the recipe of CVNet's descriptors, whose checkpoint, depth, precision and image size are used.
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
            with owned(self.path):
                self._known = ids, torch.from_numpy(self._score(ids, device))
        return self._known[1]

    def _score(self, ids: Tensor, device: torch.device) -> np.ndarray:
        recipe = self.recipe
        network = load_cvnet_rerank(Path(recipe.weights), recipe.depth, recipe.reduction_dim, recipe.precision, device)
        names = ("weights_sha256", "depth", "precision", "max_side")
        settings = {name: getattr(recipe, name) for name in names}
        provenance = Provenance(settings, pair_probe(network, device), probe_tolerance(recipe.precision))
        maps = FeatureMaps(network, provenance, recipe.max_side, self.maps_folder, self.maps_bytes, self.loading)
        store = Store(self.path, ids.shape[1], provenance)
        store.read() if self.resume else store.clear()
        keys = self._keys(ids)
        records = Records.of([b""] * len(keys), [Identity(key, NO_STAT) for key in keys])
        missing = np.flatnonzero(~store.has(records.keys)).tolist()
        bar = tqdm(
            total=ids.numel(), initial=(len(keys) - len(missing)) * ids.shape[1], desc="CVNet-Rerank", unit="pair",
            dynamic_ncols=True, smoothing=0.05,
        )  # fmt: skip
        with bar, torch.inference_mode():
            for query in missing:
                ((_, feature_map),) = maps.of([self.queries[query]])
                inputs = network.query_inputs(feature_map[None].to(device))
                scores = np.zeros(ids.shape[1], dtype=np.float32)
                candidates = [self.database[number] for number in ids[query].tolist() if number >= 0]
                for places, batch in equal_sizes(maps.of(candidates), partial(_keys_per_batch, network, inputs)):
                    scores[[*places]] = network.score(inputs, torch.stack(batch).to(device)).cpu().numpy()
                    bar.update(len(places))
                store.write(b"", Identity(keys[query], NO_STAT), scores)
                store.flush()
        if not store.finish(records):
            log.info("%s: reused, computed from the same images, candidates and checkpoint", self.path)
        return np.load(self.path)

    def _keys(self, ids: Tensor) -> list[bytes]:
        """Returns a key per query, of its own image and those of its candidates."""
        numbers = [number for number in ids.unique().tolist() if number >= 0]
        known = {-1: b""} | {number: self.database[number].identity().key for number in numbers}
        return [
            hashlib.blake2b(
                b" ".join([image.identity().key, *(known[number] for number in row)]), digest_size=KEY_BYTES
            ).digest()
            for image, row in zip(self.queries, ids.tolist(), strict=True)
        ]


def _keys_per_batch(network: CVNetRerank, query: Tensor, feature_map: Tensor) -> int:
    return network.keys_per_batch(query, feature_map[None])


def pair_probe(network: CVNetRerank, device: torch.device | str) -> np.ndarray:
    """Returns unit rows that change when the code of the network does: of a map, and of the score of a pair. (2, D)."""
    first, second = (torch.from_numpy(pixels)[None].to(device) for pixels in probe_pixels())
    with torch.inference_mode():
        maps = [network.feature_map(network.normalise(pixels)) for pixels in (first, second)]
        angle = network.score(network.query_inputs(maps[0]), maps[1])[0].double() * math.pi / 2
        row = maps[0].flatten().double().cpu()
    score = torch.zeros_like(row)
    score[:2] = torch.stack([angle.cos(), angle.sin()]).cpu()
    return torch.stack([row / row.norm(), score]).float().numpy()


class FeatureMaps:
    """Feature maps of images, (1024, h, w) float32 on the CPU, each computed once while there is room for it.

    Args:
        network: computes them.
        provenance: what they depend on beside their images.
        max_side: longer side to which larger images are reduced, or None.
        folder: where they are saved, in a folder per provenance; None keeps only some of them, in memory.
        limit: the largest size of that folder in bytes, including maps of earlier runs.
        loading: how images are read.
    """

    def __init__(
        self,
        network: CVNetRerank,
        provenance: Provenance,
        max_side: int | None,
        folder: Path | None,
        limit: int,
        loading: Loading = PLAIN_LOADING,
    ):
        self.network, self.max_side, self.loading = network, max_side, loading
        self.device = next(network.parameters()).device
        self.folder = None if folder is None else folder / fingerprint(provenance.settings)
        self.in_memory: dict[bytes, Tensor] = {}
        self.memory_left, self.disk_left = MEMORY_BYTES, limit
        if self.folder is not None:
            settings, probe = self.folder / "provenance.json", self.folder / "probe.npy"
            if provenance.differences(settings, probe) != []:  # computed by other code
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(parents=True)
                write_json(settings, provenance.settings)
                write_array(probe, provenance.probe)
            self.disk_left -= sum(file.stat().st_size for file in self.folder.parent.rglob("*.npz"))

    def of(self, images: Sequence[ImageFile]) -> Iterator[tuple[int, Tensor]]:
        """Yields the number and feature map of each image; saved ones come first.

        Raises:
            InputError: if an image is damaged, or a process that decodes images died.
        """
        missing = []
        for number, image in enumerate(images):
            if (feature_map := self._find(image.identity().key)) is None:
                missing.append(number)
            else:
                yield number, feature_map
        decoded = ReadAhead(images, np.array(missing, dtype=np.int64), self.loading, self.max_side)
        try:
            for number, item in zip(missing, decoded, strict=True):
                if isinstance(item, ImageError):
                    raise item
                pixels, identity = item
                with torch.inference_mode():
                    x = self.network.normalise(pixels[None].to(self.device))
                    feature_map = self.network.feature_map(x)[0].contiguous().cpu()
                self._keep(identity.key, feature_map)
                yield number, feature_map
        except WORKER_ERRORS as error:
            raise decoded.death_of_a_worker(error) or error from None

    def _find(self, key: bytes) -> Tensor | None:
        if key in self.in_memory:
            return self.in_memory[key]
        if self.folder is None or not (path := self.folder / f"{key.hex()}.npz").exists():
            return None
        try:
            with np.load(path) as content:  # verifies a checksum
                return torch.from_numpy(content["map"])
        except Exception:  # damaged, for which NumPy raises many exceptions: computed again
            self.disk_left += path.stat().st_size
            path.unlink()
            return None

    def _keep(self, key: bytes, feature_map: Tensor) -> None:
        if feature_map.nbytes <= self.memory_left:
            self.memory_left -= feature_map.nbytes
            self.in_memory[key] = feature_map
        if self.folder is not None and feature_map.nbytes + _HEADER_BYTES <= self.disk_left:
            self.disk_left -= feature_map.nbytes + _HEADER_BYTES
            content = feature_map.numpy()
            write_atomically(self.folder / f"{key.hex()}.npz", lambda file: np.savez(file, map=content))


def map_bytes(images: Sequence[ImageFile]) -> int:
    """Returns the mean size in bytes of these images' feature maps, (1024, H / 16, W / 16) float32."""
    sizes = []
    for image in images:
        with Image.open(image.path) as opened:
            width, height = opened.size
        sizes.append(4 * 1024 * math.ceil(height / 16) * math.ceil(width / 16))
    return round(sum(sizes) / len(sizes))
