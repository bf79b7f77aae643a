"""Reranking by local features, CVNet-Rerank's protocol: slow, so it can be interrupted and resumed at each query.

Per protocol, the ignored pictures leave the ranking, and the first candidates are sorted by
cosine + 0.5 * score; the rest keep their places. The score of a pair is model.cvnet_rerank's.

Lee et al., "Correlation Verification for Image Retrieval", CVPR 2022.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model.cvnet_rerank import CVNetRerank
from model.extract import ReadAhead, file_stamps
from model.images import ImageError, ImageFile, to_network_input
from model.store import DescriptorStore
from modules.search import SearchResult
from revisitop.dataset import GroundTruth
from revisitop.evaluate import PROTOCOLS, positive_and_ignored, protocol_ranks, summarise
from revisitop.run import SAVED_RANKS, Ranking, move

log = logging.getLogger(__name__)

SCORE_WEIGHT = 0.5
MEMORY_BYTES = 2 << 30  # of feature maps that are kept at hand
WAITING_BYTES = 512 << 20  # of maps that wait for others of their size


@dataclass(frozen=True)
class CVNetReranking:
    """Reranks the first candidates of each query by local features.

    Attributes:
        build: makes the network; called where a pair is to be scored.
        source: what a score depends on beside the pictures (checkpoint, precision).
        queries, database: the pictures; the database's include distractors, if there are any.
        ground_truth: per query.
        topk: numbers of candidates, each of which gives a ranking.
        scores: the .npy file of the scores, (Q, m).
        maps: a folder for feature maps, or None.
        maps_bytes: what they may take there.
        workers, resume: see revisitop.run.describe_lists.
    """

    build: Callable[[], CVNetRerank]
    source: dict
    queries: Sequence[ImageFile]
    database: Sequence[ImageFile]
    ground_truth: Sequence[GroundTruth]
    topk: Sequence[int]
    scores: Path
    maps: Path | None = None
    maps_bytes: int = 0
    workers: int = 0
    resume: bool = True

    @property
    def m(self) -> int:
        """Candidates that are needed: as many as topk's largest, after the most that a protocol ignores."""
        ignored = max(len(ignored_by(truth, name)) for truth in self.ground_truth for name in PROTOCOLS)
        return min(max(self.topk) + ignored, len(self.database))

    def stages(self, found: SearchResult, positions: Sequence[np.ndarray]) -> dict[str, Ranking]:
        """The ranking for each of topk, by title.

        Args:
            found: of a search for the first m or more.
            positions: per query, where the listed pictures stand, see revisitop.evaluate.

        Raises:
            InputError: where pictures are damaged, or the memory does not suffice; scored queries are kept.
        """
        start = time.perf_counter()
        scores = self._score(found.ids[:, : self.m])
        seconds = time.perf_counter() - start
        combined = found.scores[:, : self.m].numpy() + SCORE_WEIGHT * scores
        stages = {}
        for count in self.topk:
            figures = {}
            for name in PROTOCOLS:
                ranks = []
                for query, truth in enumerate(self.ground_truth):
                    kept = ~np.isin(found.ids[query, : self.m].numpy(), ignored_by(truth, name))
                    order = np.argsort(-combined[query, kept][:count], kind="stable")
                    ranks.append(np.sort(move(protocol_ranks(positions[query], truth, name), order)))
                figures[name] = summarise(ranks)
            order = torch.from_numpy(np.argsort(-combined[:, :count], axis=1, kind="stable"))
            ids, shown = found.ids.clone(), found.scores.clone()
            ids[:, : order.shape[1]] = found.ids.gather(1, order)
            shown[:, : order.shape[1]] = torch.from_numpy(combined).gather(1, order)
            title = "reranking" if len(self.topk) == 1 else f"reranking of {count}"
            stages[title] = Ranking(ids[:, :SAVED_RANKS], shown[:, :SAVED_RANKS], figures, seconds)
        return stages

    def _score(self, ids: Tensor) -> np.ndarray:
        """The score of each query with each of its candidates, (Q, M); those of an earlier run are used again."""
        hint = "TEST.RESUME False starts over, another TEST.OUT_DIR keeps both"
        store = DescriptorStore(self.scores, *ids.shape, self.source, self.resume, hint, stamps=self._stamps(ids))
        if store.complete:
            log.info("%s: used again, made from the same pictures, candidates and checkpoint", store.path)
            return np.load(store.path)
        network = self.build()
        device = next(network.parameters()).device
        maps = FeatureMaps(network, self.source, self.maps, self.maps_bytes, self.workers)
        bar = tqdm(
            total=ids.numel(), initial=int(store.done.sum()) * ids.shape[1], desc="CVNet-Rerank", unit="pair",
            dynamic_ncols=True, smoothing=0.05,
        )  # fmt: skip
        with bar, torch.inference_mode():
            for query in store.missing():
                ((_, own),) = maps.of([self.queries[query]])
                inputs = network.query_inputs(own[None].to(device))
                scores = np.zeros(ids.shape[1], dtype=np.float32)
                candidates = [self.database[number] for number in ids[query].tolist()]
                for places, keys in equal_sizes(maps.of(candidates), partial(network.keys_per_batch, inputs)):
                    scores[places] = network.score(inputs, keys.to(device)).cpu().numpy()
                    bar.update(len(places))
                store.write(int(query), scores)
                store.flush()
        store.finish()
        return np.load(store.path)

    def _stamps(self, ids: Tensor) -> list[str]:
        """Per query, what its scores depend on beside the source: its own picture and its candidates'."""
        numbers = ids.unique().tolist()
        known = dict(zip(numbers, file_stamps([self.database[number] for number in numbers]), strict=True))
        return [
            _digest(repr([own, [known[number] for number in row]]))
            for own, row in zip(file_stamps(self.queries), ids.tolist(), strict=True)
        ]


def ignored_by(truth: GroundTruth, protocol: str) -> np.ndarray:
    """The database numbers that leave the ranking."""
    return truth.listed[positive_and_ignored(truth, protocol)[1]]


class FeatureMaps:
    """Feature maps of pictures, (1024, h, w) float32 on the CPU, made once as long as there is room for them.

    Args:
        network: makes them.
        source: what they depend on beside the picture.
        folder: where they are kept; None keeps some in memory alone.
        limit: bytes that they may take there, those of earlier runs included.
        workers: processes that decode pictures.
    """

    def __init__(self, network: CVNetRerank, source: dict, folder: Path | None, limit: int, workers: int):
        self.network, self.workers, self.folder = network, workers, folder
        self.source = repr(sorted(source.items()))
        self.at_hand: dict[str, Tensor] = {}
        self.memory_left, self.disk_left = MEMORY_BYTES, limit
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.disk_left -= sum(file.stat().st_size for file in folder.iterdir())

    def of(self, images: Sequence[ImageFile]) -> Iterator[tuple[int, Tensor]]:
        """Each picture's number and map; those that are there already come first.

        Raises:
            InputError: where a picture is damaged, or a process that decodes one died.
        """
        stamps = [_digest(f"{stamp} {self.source}") for stamp in file_stamps(images)]
        missing = []
        for number, stamp in enumerate(stamps):
            if (there := self._find(stamp)) is None:
                missing.append(number)
            else:
                yield number, there
        device = next(self.network.parameters()).device
        pictures = ReadAhead(images, np.array(missing, dtype=np.int64), self.workers)
        try:
            for number, pixels in zip(missing, pictures, strict=True):
                if isinstance(pixels, ImageError):
                    raise pixels
                with torch.inference_mode():
                    made = self.network.feature_map(to_network_input(pixels[None].to(device)))[0].contiguous().cpu()
                self._keep(stamps[number], made)
                yield number, made
        except RuntimeError as error:
            raise pictures.death_of_a_worker(error) or error from None

    def _find(self, stamp: str) -> Tensor | None:
        if stamp in self.at_hand:
            return self.at_hand[stamp]
        if self.folder is None or not (path := self.folder / f"{stamp}.npy").exists():
            return None
        try:
            return torch.from_numpy(np.load(path))
        except (OSError, ValueError):  # damaged: made again
            self.disk_left += path.stat().st_size
            path.unlink()
            return None

    def _keep(self, stamp: str, made: Tensor) -> None:
        if made.nbytes <= self.memory_left:
            self.memory_left -= made.nbytes
            self.at_hand[stamp] = made
        if self.folder is not None and made.nbytes + 128 <= self.disk_left:  # with NumPy's header
            self.disk_left -= made.nbytes + 128
            new = self.folder / f"{stamp}.new"
            with new.open("wb") as file:
                np.save(file, made.numpy())
            new.replace(self.folder / f"{stamp}.npy")


def equal_sizes(
    maps: Iterable[tuple[int, Tensor]], most: Callable[[Tensor], int]
) -> Iterator[tuple[list[int], Tensor]]:
    """Batches of maps of equal size, (K, 1024, h, w), with their numbers.

    Args:
        maps: with their numbers.
        most: of maps like this one, (1, 1024, h, w), in a batch.
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
