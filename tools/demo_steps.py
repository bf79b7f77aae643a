"""The steps of the page of tools.demo, without the page: extract, search, rerank, evaluate and explain one query."""

import logging
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from yacs.config import CfgNode

from assembly import Experiment, Output, find_recipe, own_images, prepare
from config import varied
from extraction.extract import extract_batch
from extraction.images import FORMATS, Box, ImageError, ImageFile, crop, read_image
from model.errors import InputError
from modules.explanation import explain
from modules.reranking import SuperGlobalReranker
from modules.search import Database, search
from report.drawing import jpeg_uri, read_thumbnail
from report.page import SHOWN, Hit, Why, explained_hit, labelled_hits, moves
from revisitop.dataset import Dataset
from revisitop.evaluate import evaluate
from revisitop.explained import Explained
from revisitop.retrieve import Ranking, rerank
from tools.search import extract_folders, find_images

log = logging.getLogger(__name__)

MODULES = {"GeM+": "SupG.gemp", "Regional-GeM": "SupG.rgem", "Scale-GeM": "SupG.sgem", "ReLU+": "SupG.relup"}
MOST_CANDIDATES = 1000  # largest M
UPLOAD_SIDE = 1024  # uploads are reduced to this longer side, that of ROxford's images, to limit the memory
UPLOAD_PIXELS = 60_000_000
_SMALLEST_BOX = 8  # pixels; a smaller box is treated as a click
_THUMBNAIL_SIDE, _QUALITY = 160, 72
_NETWORKS = 2  # number of networks kept in memory, each with its own modules


@dataclass(frozen=True)
class Collection:
    """Images with their descriptors, and the known queries.

    Attributes:
        dataset: the images; a folder has no ground truth.
        queries: (Q, D), the descriptors of the queries.
        database: (N, D), the descriptors of the database.
        unreadable: names of images that were skipped.
    """

    dataset: Dataset
    queries: Tensor
    database: Database
    unreadable: Sequence[str] = ()

    @property
    def most(self) -> int:
        """The largest possible M."""
        return min(MOST_CANDIDATES, len(self.database))

    def named(self, text: str, count: int) -> tuple[list[int], int]:
        """Returns the numbers of the first queries whose name contains this text, and the number of all matches."""
        names = (self.dataset.query_name(number) for number in range(len(self.dataset.queries)))
        numbers = [number for number, name in enumerate(names) if text.lower() in name.lower()]
        return numbers[:count], len(numbers)


@dataclass(frozen=True)
class Asked:
    """A query: an image, or the part of it in a box.

    Attributes:
        name: the name shown on the page.
        box: x0, y0, x1, y1 in its pixels; None for the whole image.
        image: its file, or None for an upload.
        pixels: (H, W, 3) uint8 RGB of an upload.
        number: its number among the queries of the collection, or None.
    """

    name: str
    box: Box | None = None
    image: ImageFile | None = None
    pixels: np.ndarray | None = field(default=None, compare=False)
    number: int | None = None

    def whole(self) -> np.ndarray:
        """Returns the whole image, (H, W, 3) uint8 RGB. Raises ImageError if the file cannot be read."""
        return self.pixels if self.pixels is not None else read_image(self.image.path)

    def in_box(self) -> np.ndarray:
        return self.whole() if self.box is None else crop(self.whole(), self.box, Path(self.name))

    def pixels_of(self, fractions: Sequence[float]) -> list[float]:
        """Converts x0, y0, x1, y1 from fractions of the sides to pixels."""
        height, width = self.whole().shape[:2]
        return [part * side for part, side in zip(fractions, 2 * (width, height), strict=False)]

    def boxed(self, numbers: Sequence[float] | None) -> "Asked":
        """Returns the same image with this box in pixels, clipped to it; None or a very small box removes the box.

        Raises:
            InputError: if they are not four finite numbers.
        """
        if numbers is None:
            return replace(self, box=None)
        if len(numbers) != 4 or not all(isinstance(each, int | float) and math.isfinite(each) for each in numbers):
            raise InputError("a box consists of four numbers, x0, y0, x1, y1 in pixels")
        height, width = self.whole().shape[:2]
        (x0, x1), (y0, y1) = (
            sorted(min(max(each, 0), side) for each in pair)
            for pair, side in ((numbers[::2], width), (numbers[1::2], height))
        )
        small = x1 - x0 < _SMALLEST_BOX or y1 - y0 < _SMALLEST_BOX
        return replace(self, box=None if small else (x0, y0, x1, y1))


@dataclass(frozen=True)
class Found:
    """The search results of one query, which the page of one visitor depends on.

    Attributes:
        asked: the query.
        collection: the searched collection.
        query: (1, D), its descriptor.
        ranking: the ranking by cosine similarity, with as many results as the largest M.
        extracted, searched: the seconds of extraction and search.
    """

    asked: Asked
    collection: Collection
    query: Tensor
    ranking: Ranking
    extracted: float
    searched: float


@dataclass(frozen=True)
class Compared:
    """The first results before and after reranking.

    Attributes:
        before, after: the first results.
        places: the places before reranking, of the first results before and after it.
        aps: average precision before and after, by the title of the protocol; empty without ground truth.
        seconds: the seconds of reranking.
    """

    before: list[Hit]
    after: list[Hit]
    places: tuple[list[int], list[int]]
    aps: dict[str, tuple[float, float]]
    seconds: float


def read_upload(path: Path, name: str) -> Asked:
    """Reads an uploaded image as a query, with its longer side limited to UPLOAD_SIDE.

    Raises:
        InputError: if it is not a readable image, or too large; the message has its name without the path.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > UPLOAD_PIXELS:
                raise InputError(f"{name} has more than {UPLOAD_PIXELS / 1e6:.0f} million pixels")
        pixels = read_image(path)
    except ImageError as error:
        raise InputError(f"{name}: {error.reason}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name}: not an image") from None
    small = Image.fromarray(pixels)
    small.thumbnail((UPLOAD_SIDE, UPLOAD_SIDE))
    return Asked(name, pixels=np.array(small))


def find(collection: Collection, asked: Asked, query: Tensor, extracted: float = 0.0) -> Found:
    """Searches the collection with a descriptor (1, D)."""
    start = time.perf_counter()
    listed = (
        None
        if asked.number is None or not collection.dataset.ground_truth
        else [collection.dataset.listed[asked.number]]
    )
    found = search(query, collection.database, max(collection.most, SHOWN), listed)
    seconds = time.perf_counter() - start
    return Found(asked, collection, query, Ranking(*found, seconds), extracted, seconds)


def compare(found: Found, reranker: SuperGlobalReranker) -> Compared:
    """Reranks, and returns the first results before and after it."""
    dataset, searched = found.collection.dataset, found.ranking
    reranked = rerank(searched, reranker, found.query, found.collection.database)
    number = found.asked.number if dataset.ground_truth else None
    ids = {stage: each.ids[0].tolist() for stage, each in (("before", searched), ("after", reranked))}
    gained, place = moves(ids), {each: place for place, each in enumerate(ids["before"])}
    hits = {
        stage: labelled_hits(dataset, number, ids[stage][:SHOWN], each.scores[0, :SHOWN].tolist(), moved=gained[stage])
        for stage, each in (("before", searched), ("after", reranked))
    }
    aps = {}
    if number is not None:
        truth = [dataset.ground_truth[number]]
        before, after = (evaluate(each, truth, dataset.protocols) for each in (searched, reranked))
        aps = {each.protocol.title: (each.map, after[name].map) for name, each in before.items()}
        aps = {title: pair for title, pair in aps.items() if not math.isnan(pair[0])}
    places = tuple([place[each] for each in ids[stage][:SHOWN]] for stage in ("before", "after"))
    return Compared(hits["before"], hits["after"], places, aps, reranked.seconds)


def explained(found: Found, reranker: SuperGlobalReranker, place: int) -> Why:
    """Explains the new place of the result that was at this place (from 0) in the search.

    Raises:
        InputError: if the result is not reranked.
    """
    dataset, ids = found.collection.dataset, found.ranking.ids[0, : reranker.m]
    if not 0 <= place < len(ids):
        raise InputError(f"the result at place {place + 1} keeps its place: only the first {len(ids)} are reranked")
    reason = explain(found.query[0], found.collection.database.rows(ids), place, reranker)
    number = found.asked.number if dataset.ground_truth else None
    return explained_hit(dataset, Explained(number, ids, reason, reranker.s2 == "original"))


class Library:
    """The data that all visitors share: datasets, descriptors by modules, and networks.

    Args:
        cfg: the options.
        output: where descriptors are saved.
        device: the device for the extraction.
        folder: a folder of images to use instead of the datasets of the options.
    """

    def __init__(self, cfg: CfgNode, output: Output, device: torch.device, folder: Path | None = None):
        self.cfg, self.output, self.device, self.folder = cfg, output, device, folder
        self._collections: dict[tuple, Collection] = {}
        self._networks: dict[tuple, Any] = {}
        self._lock = threading.Lock()  # one extraction at a time
        if folder is None:  # reports missing data before the page starts
            self.experiments: dict[str, Experiment] = {
                name: prepare(cfg, name, output, device) for name in cfg.TEST.DATASET_LIST
            }
            self.names = list(self.experiments)
        else:
            self.names, self.images = [folder.resolve().name or str(folder)], find_images(folder)
            find_recipe(cfg)
        several = len(cfg.TEST.SCALE_LIST) > 1
        # With one scale, Scale-GeM has no effect.
        self.modules = [title for title in MODULES if several or title != "Scale-GeM"]
        self.chosen = tuple(title for title in self.modules if self._is_on(title))

    def _is_on(self, title: str) -> bool:
        return getattr(self.cfg.SupG, MODULES[title].split(".")[1])

    def _with(self, modules: Sequence[str]) -> CfgNode:
        return varied(self.cfg, {MODULES[title]: title in modules for title in self.modules})

    def collection(self, name: str, modules: Sequence[str]) -> Collection:
        """Returns the images with their descriptors, and extracts missing ones, while other visitors wait.

        Raises:
            InputError: if a setting does not fit, or no image can be read.
        """
        key = name, frozenset(modules)
        with self._lock:
            if key not in self._collections:
                cfg = self._with(modules)
                self._collections[key] = self._folder(cfg) if self.folder else self._dataset(cfg, name)
            return self._collections[key]

    def _dataset(self, cfg: CfgNode, name: str) -> Collection:
        known = self.experiments[name]
        experiment = replace(known, cfg=cfg, recipe=find_recipe(cfg, known.dataset))
        queries, database = experiment.descriptors()
        return Collection(known.dataset, queries, database)

    def _folder(self, cfg: CfgNode) -> Collection:
        recipe = find_recipe(cfg)
        images = own_images(self.folder, self.images, recipe, self.output)
        (own,) = extract_folders([images], recipe, self.device, cfg)
        names = [own.name(number) for number in range(len(own.images))]
        dataset = Dataset(
            self.names[0], self.folder, own.images, own.images, [], (), "folder", names, names, np.arange(len(names))
        )
        return Collection(dataset, own.descriptors, Database(own.descriptors), own.unreadable)

    def ask(self, collection: Collection, number: int) -> Asked:
        """Returns a query of the collection, with its own box.

        Raises:
            InputError: if there is no query with this number.
        """
        if not 0 <= number < len(collection.dataset.queries):
            raise InputError(f"there is no query {number}")
        image = collection.dataset.queries[number]
        return Asked(collection.dataset.query_name(number), image.box, ImageFile(image.path), number=number)

    def find(self, name: str, modules: Sequence[str], asked: Asked) -> Found:
        """Searches with a query, and extracts its descriptor if it is not saved.

        Raises:
            InputError: if its image cannot be read, or its descriptor cannot be extracted.
        """
        collection, start = self.collection(name, modules), time.perf_counter()
        own = None if asked.number is None else collection.dataset.queries[asked.number]
        if own is not None and own.box == asked.box:
            query = collection.queries[asked.number : asked.number + 1].clone()
        else:
            query = self._extract(name, modules, asked)
        return find(collection, asked, query, time.perf_counter() - start)

    def _extract(self, name: str, modules: Sequence[str], asked: Asked) -> Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(asked.in_box()))
        with self._lock:
            key = name, frozenset(modules)
            if key not in self._networks:
                while len(self._networks) >= _NETWORKS:
                    del self._networks[next(iter(self._networks))]
                dataset = None if self.folder else self.experiments[name].dataset
                self._networks[key] = find_recipe(self._with(modules), dataset).extractor(self.device)
            return extract_batch(self._networks[key], [pixels]).cpu().clone()


@lru_cache(maxsize=20_000)
def thumbnail_uri(image: ImageFile, scale: int = 1) -> str | None:
    """Returns the image as a small JPEG, or None if it cannot be read; each image is decoded once."""
    try:
        return jpeg_uri(read_thumbnail(image, scale * _THUMBNAIL_SIDE), scale * _THUMBNAIL_SIDE, _QUALITY)
    except ImageError:
        return None


def preview_uri(asked: Asked, side: int = 480) -> str:
    """Returns the whole query image as a JPEG. Raises ImageError if it cannot be read."""
    return jpeg_uri(Image.fromarray(asked.whole()), side, 80)
