"""The steps of the page of tools.demo, without the page: extract, search, rerank, evaluate and explain one query."""

import math
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from yacs.config import CfgNode

from assembly import find_recipe, has_random_weights, image_folder_set, match_images, prepare
from config import varied
from extraction.extract import extract_batch
from extraction.folder import find_images
from extraction.images import FORMATS, Box, ImageError, ImageFile, crop, limit_side, read_image
from model.errors import InputError
from model.recipe import Recipe
from modules.explanation import Explanation, explain
from modules.reranking import SuperGlobalReranker
from modules.search import Database
from report.drawing import MatchDrawing, draw_match, jpeg_uri, read_thumbnail
from report.output import Output
from report.page import SHOWN, Hit, candidates_of, first_hits
from revisitop.dataset import Dataset
from revisitop.evaluate import evaluate, query_values
from revisitop.retrieve import Ranking, rerank, retrieve
from tools.search import extract_folders, folder_dataset

MODULES = {"GeM+": "SupG.gemp", "Regional-GeM": "SupG.rgem", "Scale-GeM": "SupG.sgem", "ReLU+": "SupG.relup"}
MOST_CANDIDATES = 1000  # largest M
QUERIES_SHOWN = 48
UPLOAD_SIDE = 1024  # uploads are reduced to this longer side, that of ROxford's images, to limit the memory
UPLOAD_PIXELS = 60_000_000
_SMALLEST_BOX = 8  # pixels; a smaller box is treated as a click
_THUMBNAIL_SIDE, _QUALITY = 160, 72
_NETWORKS = 2  # number of networks kept in memory, each with its own modules


@dataclass(frozen=True)
class QueryImage:
    """The image of a query, or the part of it in a box.

    Attributes:
        name: the name shown on the page.
        box: x0, y0, x1, y1 in its pixels; None for the whole image.
        file: its file, or None for an upload.
        pixels: (H, W, 3) uint8 RGB of an upload.
        number: its number among the queries of the gallery, or None.
    """

    name: str
    box: Box | None = None
    file: ImageFile | None = None
    pixels: np.ndarray | None = field(default=None, compare=False)
    number: int | None = None

    def read(self) -> np.ndarray:
        """Returns the whole image, (H, W, 3) uint8 RGB. Raises ImageError if the file cannot be read."""
        return self.pixels if self.pixels is not None else read_image(self.file.path)

    def read_box(self) -> np.ndarray:
        """Returns the part in the box."""
        return self.read() if self.box is None else crop(self.read(), self.box, Path(self.name))

    def with_box(self, numbers: Sequence[float] | None, in_pixels: bool = True) -> "QueryImage":
        """Returns the same image with this box, clipped to it; None or a very small box removes the box.

        Args:
            numbers: x0, y0, x1, y1, in pixels or as fractions of the sides.

        Raises:
            InputError: if they are not four finite numbers.
        """
        if numbers is None:
            return replace(self, box=None)
        if len(numbers) != 4 or not all(isinstance(each, int | float) and math.isfinite(each) for each in numbers):
            raise InputError("a box consists of four numbers, x0, y0, x1, y1 in pixels")
        height, width = self.read().shape[:2]
        x_scale, y_scale = (1, 1) if in_pixels else (width, height)
        x0, x1 = (min(max(x * x_scale, 0), width) for x in sorted(numbers[::2]))
        y0, y1 = (min(max(y * y_scale, 0), height) for y in sorted(numbers[1::2]))
        return replace(self, box=None if min(x1 - x0, y1 - y0) < _SMALLEST_BOX else (x0, y0, x1, y1))


def numbers_of(text: str) -> list[float] | None:
    """Parses the numbers of a text such as "1, 2, 3, 4"; None if it is empty.

    Raises:
        InputError: if it contains anything else.
    """
    try:
        return [float(word) for word in text.replace(",", " ").split()] or None
    except ValueError:
        raise InputError("a box consists of four numbers, x0, y0, x1, y1 in pixels") from None


@dataclass(frozen=True)
class Gallery:
    """Images that are searched, with their descriptors, and known queries.

    Attributes:
        dataset: the images; a folder has no ground truth.
        queries: (Q, D), the descriptors of the queries.
        database: (N, D), the descriptors of the database.
        key: its name and the modules of its descriptors.
    """

    dataset: Dataset
    queries: Tensor
    database: Database
    key: tuple[str, frozenset[str]] = ("", frozenset())

    @property
    def largest_m(self) -> int:
        return min(MOST_CANDIDATES, len(self.database))

    def query(self, number: int) -> QueryImage:
        """Returns a known query, with its box.

        Raises:
            InputError: if there is no query with this number.
        """
        if not 0 <= number < len(self.dataset.queries):
            raise InputError(f"there is no query {number}")
        image = self.dataset.queries[number]
        return QueryImage(self.dataset.query_name(number), image.box, ImageFile(image.path), number=number)

    def opening_query(self, reranker: SuperGlobalReranker) -> QueryImage:
        """Returns the query, among the first ones, whose AP rises most; without ground truth, the first."""
        queries, truth = self.queries[:QUERIES_SHOWN], self.dataset.ground_truth[:QUERIES_SHOWN]
        if not truth:
            return self.query(0)
        before = retrieve(queries, self.database, self.largest_m, self.dataset.listed[:QUERIES_SHOWN])
        after = rerank(before, reranker, queries, self.database)
        lost, gained = (query_values(evaluate(each, truth, self.dataset.protocols)) for each in (before, after))
        return self.query(int(np.argmax(np.nan_to_num(gained - lost, nan=-1))))


def find_queries(dataset: Dataset, text: str, count: int) -> tuple[list[int], int]:
    """Returns the numbers of the first queries whose name contains this text, and the number of all matches."""
    names = (dataset.query_name(number) for number in range(len(dataset.queries)))
    numbers = [number for number, name in enumerate(names) if text.lower() in name.lower()]
    return numbers[:count], len(numbers)


class Effect(NamedTuple):
    """The effect of reranking on one query."""

    before: list[Hit]  # the first results
    after: list[Hit]
    aps: dict[str, tuple[float, float]]  # AP before and after, by the title of the protocol; empty without ground truth
    seconds: float  # of the reranking


@dataclass(frozen=True)
class QuerySearch:
    """The search with one query, on which the page of one visitor depends.

    Attributes:
        image: the query.
        gallery: the images that are searched.
        descriptor: (1, D), that of the query.
        ranking: the ranking by cosine similarity, with as many results as the largest M.
        extraction_seconds: the time to extract the descriptor; that of the search is in the ranking.
    """

    image: QueryImage
    gallery: Gallery
    descriptor: Tensor
    ranking: Ranking
    extraction_seconds: float = 0.0

    def rerank(self, reranker: SuperGlobalReranker) -> Effect:
        dataset, number = self.gallery.dataset, self.image.number
        after = rerank(self.ranking, reranker, self.descriptor, self.gallery.database)
        rankings, aps = {"before": self.ranking, "after": after}, {}
        if number is not None and dataset.ground_truth:
            truth = [dataset.ground_truth[number]]
            before_after = [evaluate(each, truth, dataset.protocols) for each in rankings.values()]
            aps = {each.title: tuple(metrics[each.name].map for metrics in before_after) for each in dataset.protocols}
            aps = {title: pair for title, pair in aps.items() if not math.isnan(pair[0])}
        return Effect(**first_hits(dataset, number, rankings, 0), aps=aps, seconds=after.seconds)

    def explain(self, reranker: SuperGlobalReranker, place: int) -> tuple[Explanation, dict[int, Hit]] | None:
        """Explains the new place of the result at this place (from 0) in the search; see report.page.candidates_of.

        Returns None if the result is not reranked.
        """
        ids = self.ranking.ids[0, : reranker.m]
        if not 0 <= place < len(ids):
            return None
        explanation = explain(self.descriptor[0], self.gallery.database.rows(ids), place, reranker)
        return explanation, candidates_of(explanation, self.gallery.dataset, self.image.number, ids.tolist())


def search_gallery(gallery: Gallery, image: QueryImage, descriptor: Tensor, extraction_seconds: float) -> QuerySearch:
    """Searches with the descriptor (1, D) of an image, which is not among its own results."""
    dataset, number = gallery.dataset, image.number
    listed = None if number is None or not dataset.ground_truth else [dataset.listed[number]]
    excluded = None if number is None or dataset.excluded is None else dataset.excluded[[number]]
    ranking = retrieve(descriptor, gallery.database, max(gallery.largest_m, SHOWN), listed, excluded=excluded)
    return QuerySearch(image, gallery, descriptor, ranking, extraction_seconds)


def read_upload(path: Path) -> QueryImage:
    """Reads an uploaded image as a query, with its longer side limited to UPLOAD_SIDE.

    Raises:
        InputError: if it is not a readable image, or too large; the message has its name without the folder.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            size = image.width * image.height
    except Exception:  # decoders raise any exception
        raise InputError(f"{path.name}: not an image") from None
    if size > UPLOAD_PIXELS:
        raise InputError(f"{path.name} has more than {UPLOAD_PIXELS / 1e6:.0f} million pixels")
    try:
        small = Image.fromarray(read_image(path))
    except ImageError as error:
        raise InputError(f"{path.name}: {error.reason}") from None
    small.thumbnail((UPLOAD_SIDE, UPLOAD_SIDE))
    return QueryImage(path.name, pixels=np.array(small))


class Galleries:
    """What all visitors share: the galleries, each by the modules of its descriptors, and networks.

    Args:
        cfg: the options.
        output: where descriptors are saved.
        device: the device for the extraction.
        folder: a folder of images to use instead of the datasets of the options.

    Attributes:
        datasets: the datasets by name, or the folder; before its extraction, it contains unreadable images.
        modules: the modules that can be switched on or off.
        default_modules: those that the options switch on.
        network: the network in words.
    """

    def __init__(self, cfg: CfgNode, output: Output, device: torch.device, folder: Path | None = None):
        self.cfg, self.output, self.device, self.folder = cfg, output, device, folder
        one_scale = len(cfg.TEST.SCALE_LIST) == 1  # then Scale-GeM has no effect
        self.modules = [title for title in MODULES if not (one_scale and title == "Scale-GeM")]
        self.default_modules = [title for title in self.modules if cfg.SupG[MODULES[title].split(".")[1]]]
        if folder is None:  # reports missing data before the page starts
            self._experiments = {name: prepare(cfg, name, output, device) for name in cfg.TEST.DATASET_LIST}
            self.datasets = {name: each.dataset for name, each in self._experiments.items()}
            recipes = {name: each.recipe for name, each in self._experiments.items()}
        else:
            dataset = folder_dataset(folder, find_images(folder))
            self.datasets, recipes = {dataset.name: dataset}, {dataset.name: find_recipe(cfg)}
        self._recipes = {(name, frozenset(self.default_modules)): recipe for name, recipe in recipes.items()}
        self._galleries: dict[tuple, Gallery] = {}
        self._lock = threading.Lock()  # one extraction at a time
        random = any(
            has_random_weights(recipe, cfg, None if folder else self.datasets[name]) for name, recipe in recipes.items()
        )
        weights = " with random weights: this shows how the method works, not how accurate it is" if random else ""
        self.network = f"{next(iter(recipes.values())).title}{weights}"

    def reranker(self, gallery: Gallery, m: float, k: float, beta: float) -> SuperGlobalReranker:
        """Returns the reranker with the values of the sliders."""
        m = min(int(m), gallery.largest_m)
        return SuperGlobalReranker(m, min(int(k), m), float(beta), self.cfg.SupG.rerank_s2)

    def _cfg(self, modules: Collection[str]) -> CfgNode:
        """Returns the options with only these modules."""
        return varied(self.cfg, {MODULES[title]: title in modules for title in self.modules})

    def gallery(self, name: str, modules: Sequence[str]) -> Gallery:
        """Returns the images with their descriptors, and extracts missing ones, while other visitors wait.

        Raises:
            InputError: if a setting does not fit, or no image can be read.
        """
        key = name, frozenset(modules)
        with self._lock:
            if key not in self._galleries:
                recipe, cfg = self._recipe(key), self._cfg(modules)
                if self.folder is None:
                    rows = replace(self._experiments[name], cfg=cfg, recipe=recipe).descriptors()
                else:  # whose dataset then contains the readable images only
                    images = image_folder_set(self.folder, self.datasets[name].database, recipe, self.output)
                    (readable,) = extract_folders([images], recipe, self.device, cfg)
                    self.datasets[name] = folder_dataset(self.folder, readable.images)
                    rows = readable.descriptors, Database(readable.descriptors)
                self._galleries[key] = Gallery(self.datasets[name], *rows, key)
            return self._galleries[key]

    def _recipe(self, key: tuple) -> Recipe:
        """Returns the recipe for a gallery; only few keep their network in memory."""
        if key not in self._recipes:
            while len(self._recipes) >= _NETWORKS:
                del self._recipes[next(iter(self._recipes))]
            name, modules = key
            self._recipes[key] = find_recipe(self._cfg(modules), None if self.folder else self.datasets[name])
        return self._recipes[key]

    def search(self, name: str, modules: Sequence[str], image: QueryImage) -> QuerySearch:
        """Searches with a query, and extracts its descriptor if it is not saved.

        Raises:
            InputError: if the image cannot be read, or its descriptor cannot be extracted.
        """
        gallery, start, number = self.gallery(name, modules), time.perf_counter(), image.number
        if number is not None and image == gallery.query(number):
            descriptor = gallery.queries[number : number + 1].clone()
        else:
            descriptor = self._extract(gallery, image)
        return search_gallery(gallery, image, descriptor, time.perf_counter() - start)

    def _extract(self, gallery: Gallery, image: QueryImage) -> Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(image.read_box()))
        pixels = limit_side(pixels, self.cfg.TEST.MAX_SIDE or None)
        with self._lock:
            return extract_batch(self._recipe(gallery.key).extractor(self.device), [pixels]).cpu().clone()

    def match(self, search: QuerySearch, place: int) -> MatchDrawing:
        """Draws where the query matches the result at this place (from 0) in the search.

        Raises:
            InputError: if there is no such result, an image cannot be read, or this network has no match maps.
        """
        gallery, numbers = search.gallery, search.ranking.ids[0]
        if not 0 <= place < len(numbers):
            raise InputError(f"there is no result at place {place + 1}")
        images = search.image.read_box(), gallery.dataset.database[int(numbers[place])].read()
        with self._lock:
            match = match_images(self._recipe(gallery.key), self.device, *images)
        return draw_match(match, images)


@lru_cache(maxsize=20_000)
def thumbnail_uri(image: ImageFile, scale: int = 1) -> str | None:
    """Returns the image as a small JPEG, or None if it cannot be read; each image is decoded once."""
    try:
        return jpeg_uri(read_thumbnail(image, scale * _THUMBNAIL_SIDE), scale * _THUMBNAIL_SIDE, _QUALITY)
    except ImageError:
        return None


def preview_uri(image: QueryImage, side: int = 480) -> str:
    """Returns the whole query image as a JPEG. Raises ImageError if it cannot be read."""
    return jpeg_uri(Image.fromarray(image.read()), side, 80)
