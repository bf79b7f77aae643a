"""Create objects from options, for the commands. Library code does not know options; this module knows all."""

import logging
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset
from tqdm import tqdm
from yacs.config import CfgNode

from config import (
    DATASET,
    FUSION,
    NETWORK,
    active_rerankers,
    as_words,
    fusion_parts,
    idle_options,
    option_values,
    plain,
    varied,
)
from cvnet_rerank.stage import local_feature_stages
from extraction.extract import ImageSet, extract_sets, provenance_of
from extraction.images import ImageFile, ReadingLimits, limit_side, set_reading_limits
from extraction.loading import Loading
from extraction.processes import Processes
from extraction.provenance import content_folder, file_fingerprint, plain_name, read_provenance
from model.checkpoint import find_checkpoint
from model.device import PeakMemory, choose_device, device_name, prepare_process
from model.errors import InputError, nearest
from model.libraries import comes_with_weights, short_name
from model.recipe import WHOLE, Recipe
from modules.activation import RELUP_THRESHOLD
from modules.checks import Array
from modules.diffusion import DiffusionReranker
from modules.expansion import QueryExpansion
from modules.explanation import Explanation
from modules.matching import Match
from modules.reciprocal import KReciprocalReranker
from modules.reranking import SuperGlobalReranker
from modules.search import Database
from report.log import start_log
from report.output import Output, open_output
from revisitop import toy
from revisitop.dataset import Dataset
from revisitop.descriptors import SavedDescriptors, check_distractors, load_distractors, load_features
from revisitop.evaluate import Metrics, evaluate, ignored_images
from revisitop.exports import Names, check_forms, write_descriptors, write_rankings
from revisitop.fusion import fused
from revisitop.index import indexed, new_index
from revisitop.layout_revisitop import load_distractor_list
from revisitop.layouts import dataset_folder, load_dataset
from revisitop.retrieve import Ranking
from revisitop.stages import Augmented, Reranked, Searched, SearchedAgain, Stage, search_for

log = logging.getLogger(__name__)

DEFAULT_WEIGHTS = Path("weights")
DOWNLOADED = ("roxford5k", "rparis6k", "gldv2")  # datasets that tools.download provides


@contextmanager
def option(key: str) -> Iterator[None]:
    """A context that puts the name of an option, or of a flag, before the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{key}: {error}") from None


def make_recipe(cfg: CfgNode, weights: Path | str) -> Recipe:
    """Returns the recipe of descriptors for the options."""
    method = cfg.SupG
    stages, ends = (None if names == ["auto"] else tuple(names) for names in (method.relup_stages, method.relup_ends))
    return Recipe(
        network=cfg.MODEL.NAME,
        weights=weights,
        depth=cfg.MODEL.DEPTH,
        reduction_dim=cfg.MODEL.HEADS.REDUCTION_DIM,
        scales=tuple(cfg.TEST.SCALE_LIST),
        relup_threshold=method.relup_threshold if method.relup else None,
        relup_stages=stages,
        relup_ends=ends,
        pooling=cfg.MODEL.POOLING,
        gemp_p=method.gemp_p if method.gemp else None,
        rgem_p=method.rgem_p if method.rgem else None,
        rgem_window=method.rgem_window,
        sgem_p=method.sgem_p if method.sgem else None,
        precision=cfg.TEST.PRECISION,
        max_side=cfg.TEST.MAX_SIDE or None,
        whitening=Path(cfg.MODEL.WHITENING) if cfg.MODEL.WHITENING else None,
        mean=tuple(cfg.MODEL.MEAN) or None,
        std=tuple(cfg.MODEL.STD) or None,
        size=(cfg.MODEL.SIZE[0], cfg.MODEL.SIZE[-1]) if cfg.MODEL.SIZE else None,
        multiple=cfg.MODEL.MULTIPLE or None,
    )


def make_loading(cfg: CfgNode, device: torch.device) -> Loading:
    pin_memory = cfg.DATA_LOADER.PIN_MEMORY and device.type == "cuda"
    return Loading(cfg.DATA_LOADER.NUM_WORKERS, pin_memory, cfg.TEST.BATCH_SIZE)


def find_recipe(cfg: CfgNode, dataset: Dataset | None = None) -> Recipe:
    """Returns the recipe with the weights of the options, after checking that they fit.

    Raises:
        InputError: if the weights are missing or do not fit, or a threshold is given for ReLU+ that no layer has.
    """
    weights = find_weights(cfg, dataset)
    recipe = make_recipe(cfg, weights)
    _ = recipe.backbone  # raises for what no other option changes
    try:
        recipe.check()
    except InputError as error:
        if recipe.is_cvnet:
            raise
        advice = _network_advice(cfg, weights)
        text = f"this network needs {advice}: {error}" if advice else f"{error}; see docs/networks.md"
        raise InputError(text) from None
    threshold = cfg.SupG.relup_threshold
    if threshold != RELUP_THRESHOLD and "ReLU+" in recipe.idle_modules:
        raise InputError(
            f"SupG.relup_threshold {threshold:g} has no effect: ReLU+ changes no layer of {recipe.network} by default; "
            f"name layers with SupG.relup_stages {','.join(recipe.rectifier_stages)}"
        )
    return recipe


def _network_advice(cfg: CfgNode, weights: Path | str) -> str:
    """Returns the options that a network needs which these options do not suit."""
    no_rgem, one_scale = {"SupG.rgem": False}, {"TEST.SCALE_LIST": 1}
    for changes in (
        *(no_rgem, one_scale),
        {"MODEL.POOLING": "average", **no_rgem},  # tokens
        {"MODEL.POOLING": "none", **no_rgem, **one_scale},  # descriptors
    ):
        other = varied(cfg, changes)
        with suppress(InputError):
            make_recipe(other, weights).check()
            if not idle_options(other):
                before, after = option_values(cfg), option_values(other)
                words = [f"{key} {value}" for key, value in changes.items() if after[key] != before[key]]
                return " ".join(words)
    return ""


def log_recipe(recipe: Recipe) -> None:
    """Logs what descriptors depend on, see Recipe.in_words, and where ReLU+ could go if it is nowhere by default."""
    for line in recipe.in_words():
        log.info("%s", line)
    if recipe.pooling != WHOLE and "ReLU+" in recipe.idle_modules and recipe.rectifier_stages:
        log.info(
            "ReLU+ has no place in this network (in the paper: the first stages); to try it, add SupG.relup_stages %s",
            ",".join(recipe.rectifier_stages),
        )


def find_weights(cfg: CfgNode, dataset: Dataset | None = None) -> Path | str:
    """Returns the checkpoint, or for other networks a file, "pretrained" or "untrained".

    By default, the checkpoint is in ./weights, and other networks are pretrained; toy uses random weights.
    """
    given = cfg.TEST.WEIGHTS != "auto"
    if cfg.MODEL.NAME != "cvnet":
        drawn = dataset is not None and dataset.name in toy.NAMES
        return cfg.TEST.WEIGHTS if given else "untrained" if drawn else "pretrained"
    if dataset is not None and dataset.name in toy.NAMES and not given:
        with option("TEST.DATA_DIR"):
            return toy.ensure_weights(dataset.folder.parent / "toy", cfg.MODEL.DEPTH)
    with option("TEST.WEIGHTS"):
        try:
            return find_checkpoint(Path(cfg.TEST.WEIGHTS) if given else DEFAULT_WEIGHTS, cfg.MODEL.DEPTH)
        except InputError as error:
            advice = "" if given else "; or take another network, MODEL.NAME in docs/networks.md"
            raise InputError(f"{error}{advice}") from None


def has_random_weights(recipe: Recipe, cfg: CfgNode, dataset: Dataset | None = None) -> bool:
    """Returns whether the network is untrained, as that of toy is by default."""
    if recipe.is_cvnet:
        return dataset is not None and dataset.name in toy.NAMES and cfg.TEST.WEIGHTS == "auto"
    return str(recipe.weights) == "untrained" and not comes_with_weights(recipe.network)


def find_dataset(cfg: CfgNode, name: str) -> Dataset:
    """Returns the dataset; toy is drawn if it is missing."""
    with option("TEST.DATA_DIR"):
        folder = Path(cfg.TEST.DATA_DIR)
        if name in toy.NAMES:
            draw = toy.ensure_dataset if name == "toy" else toy.ensure_landmarks
            draw(folder, lambda images: tqdm(images, desc="drawing toy", unit="img"))
        if dataset_folder(folder, name) is None:
            if name in DOWNLOADED and not (folder / name).is_dir():
                raise InputError(
                    f"no dataset {name} in {folder}; get it with python -m tools.download {name} --data-dir {folder}"
                )
            if not folder.is_dir():
                raise InputError(f"there is no folder {folder}")
            names = [path.name for path in folder.iterdir() if path.is_dir()]
            if name not in names and (hint := nearest(name, [*DOWNLOADED, *toy.NAMES, *names])):
                raise InputError(f"no dataset {name} in {folder}; {hint}")
        try:
            return load_dataset(name, folder, radius=cfg.TEST.PLACE_RADIUS, crop_queries=cfg.TEST.CROP_QUERIES)
        except InputError as error:
            command = f"; python -m tools.download {name} --data-dir {folder} fetches what is missing"
            raise InputError(f"{error}{command if name in DOWNLOADED else ''}") from None


@dataclass(frozen=True)
class Session:
    """A command from its start: its options, its place in a `torchrun`, the head of its log, and its device.

    Attributes:
        cfg: the options.
        processes: the processes of a `torchrun`, or only this one.
        head: what results.json begins with: date, command, versions, options, device; empty but in the first process.
        device: the device of the computations.
    """

    cfg: CfgNode
    processes: Processes
    head: dict[str, Any]
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process is the one that logs, evaluates and writes results."""
        return self.processes.rank == 0

    @property
    def run_title(self) -> str:
        """A short name of the run: its datasets and its network."""
        network = "features" if self.cfg.TEST.FEATURES else network_title(self.cfg)
        return f"{'+'.join(self.cfg.TEST.DATASET_LIST)}-{network}"

    @cached_property
    def output(self) -> Output:
        """TEST.OUT_DIR, which is created. Raises InputError if it cannot be created or written to."""
        with option("TEST.OUT_DIR"):
            return open_output(Path(self.cfg.TEST.OUT_DIR))


def start_session(cfg: CfgNode, screen: TextIO | None = None) -> Session:
    """Joins the processes of a `torchrun`, opens log.txt, and prepares the process for the device of TEST.DEVICE.

    Args:
        cfg: the options.
        screen: where the lines of the log are shown; the standard output by default.
    """
    processes = Processes()
    head = start_log(Path("log.txt"), plain(cfg), screen) if processes.rank == 0 else {}
    with option("TEST.DEVICE"):
        device = choose_device(cfg.TEST.DEVICE, processes.local)
    prepare_process(device)
    set_reading_limits(ReadingLimits(cfg.DATA_LOADER.MAX_PIXELS, cfg.DATA_LOADER.TRUNCATED))
    head["device"] = device_name(device)
    log.info("device: %s", head["device"])
    return Session(cfg, processes, head, device)


def network_title(cfg: CfgNode, cvnet: str = "R") -> str:
    """Returns a short name of the network, or of those that are fused, for file names, such as R50."""
    if cfg.TEST.FUSION:
        return "+".join(plain_name(Path(name).stem) for name in cfg.TEST.FUSION)
    return f"{cvnet}{cfg.MODEL.DEPTH}" if cfg.MODEL.NAME == "cvnet" else plain_name(short_name(cfg.MODEL.NAME))


@dataclass(frozen=True)
class Distractors:
    """The descriptors of the million distractors.

    Attributes:
        path: the file.
        rows: (N, D), memory-mapped.
        images: their images, in the same order; empty if the list is missing or has another length.
    """

    path: Path
    rows: Tensor
    images: Sequence[ImageFile]


def find_distractors(cfg: CfgNode) -> Distractors:
    """Returns the distractors of TEST.DISTRACTORS, or of the default file in the current folder."""
    name = cfg.TEST.DISTRACTORS
    candidates = (
        [Path(name)] if name else [Path(f"feats_1m_{network_title(cfg, 'RN')}{end}") for end in (".pth", ".npy")]
    )
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        advice = "" if name else "; create it with extract_rop1m.py, or set TEST.DISTRACTORS"
        raise InputError(f"{'TEST.DISTRACTORS' if name else 'SupG.onemeval'}: no file {candidates[0]}{advice}")
    with option("TEST.DISTRACTORS"):
        rows = load_distractors(path)
    images: Sequence[ImageFile] = ()
    with suppress(InputError):
        _, images = load_distractor_list(Path(cfg.TEST.DATA_DIR) / "revisitop1m")
    return Distractors(path, rows, images if len(images) == len(rows) else ())


def check_index(cfg: CfgNode, dim: int | None) -> None:
    """Raises InputError if TEST.INDEX is invalid for this number of dimensions, or conflicts with the rerankers."""
    if cfg.TEST.INDEX and "dba" in cfg.TEST.RERANKER:
        raise InputError("TEST.RERANKER dba replaces all rows and searches them exactly: leave TEST.INDEX out")
    if cfg.TEST.INDEX and dim:
        with option("TEST.INDEX"):
            new_index(cfg.TEST.INDEX, dim)


def with_index(
    cfg: CfgNode, database: Database, path: Path, files: Sequence[Path], device: torch.device, **provenance: Any
) -> Database:
    """Returns the database with the index of TEST.INDEX, whose file name begins with `path`; on the device without it.

    Args:
        files: the files of the rows, whose fingerprints tell whether a saved index fits.
        device: where the database is searched if it has no index, see Database.fitted.
        provenance: what else the rows depend on.
    """
    if not cfg.TEST.INDEX:
        return database.fitted(device)
    provenance["fingerprints"] = [file_fingerprint(file) for file in files]
    decoded = cfg.TEST.INDEX_ROWS == "decoded"
    with option("TEST.INDEX"):
        return indexed(database, cfg.TEST.INDEX, path, provenance, cfg.TEST.INDEX_SEARCH, decoded)


def descriptor_folder(output: Output, name: str, images: Path, recipe: Recipe) -> Path:
    """Returns the folder for the descriptors of the images in a folder by a recipe."""
    return content_folder(output.descriptors, name, {"folder": str(images.resolve()), **recipe.provenance()})


def fusion_folder(output: Output, name: str, parts: Iterable[tuple[float, Path]]) -> Path:
    """Returns the folder for what is computed from fused descriptors, given the weights and folders of the parts."""
    return content_folder(output.descriptors, name, {"fusion": [[weight, folder.name] for weight, folder in parts]})


def image_folder_set(folder: Path, images: Sequence[ImageFile], recipe: Recipe, output: Output) -> ImageSet:
    """Returns the images of a folder as a set; each recipe and folder path has its own descriptors."""
    place = descriptor_folder(output, folder.resolve().name, folder, recipe)
    return ImageSet(place / "database.npy", "database", images, folder)


def extract(
    sets: Sequence[ImageSet],
    recipe: Recipe,
    cfg: CfgNode,
    device: torch.device,
    processes: Processes | None = None,
    on_error: str = "stop",
) -> list[Tensor]:
    """Returns the descriptors of sets, (N, D) each, extracting missing ones; see extraction.extract.extract_sets."""
    log_recipe(recipe)
    return extract_sets(sets, recipe, device, make_loading(cfg, device), cfg.TEST.RESUME, on_error, processes)


def match_images(recipe: Recipe, device: torch.device, *pixels: Array) -> Match:
    """Returns where two images match, see modules.matching.match_maps. (H, W, 3) uint8 RGB each.

    Raises:
        InputError: if the parts of this network do not sum to the cosine.
    """
    first, second = (limit_side(torch.from_numpy(each.copy()), recipe.max_side) for each in pixels)
    return recipe.extractor(device).match(first, second)


@dataclass(frozen=True)
class Experiment:
    """One dataset with everything that its evaluation needs, checked before the long computations begin.

    Attributes:
        cfg: the options.
        dataset: images and ground truth.
        recipe: the recipe of the descriptors; None if saved ones are evaluated, or several are fused.
        features: the saved descriptors, or a ranking, which is evaluated as it is; None if images are extracted.
        distractors: the distractors, or None.
        output: where descriptors and scores are kept.
        device: the device of the computations.
        parts: the weights and the experiments whose descriptors are fused.
    """

    cfg: CfgNode
    dataset: Dataset
    recipe: Recipe | None
    features: SavedDescriptors | Ranking | None
    distractors: Distractors | None
    output: Output
    device: torch.device
    parts: tuple[tuple[float, "Experiment"], ...] = ()

    @cached_property
    def folder(self) -> Path:
        """The folder for the descriptors of these images, and for scores and indexes computed from them."""
        name, folder = self.dataset.name, self.dataset.folder
        if self.parts:
            return fusion_folder(self.output, name, [(weight, part.folder) for weight, part in self.parts])
        if self.recipe is None:
            return content_folder(
                self.output.descriptors, name, {"features": str(Path(self.cfg.TEST.FEATURES).resolve())}
            )
        return descriptor_folder(self.output, name, folder, self.recipe)

    @property
    def sets(self) -> list[ImageSet]:
        """Returns the images to extract: the queries, unless they are database images, and the database."""
        name, folder = self.dataset.name, self.dataset.folder  # images of different classes may have equal names
        sets = [ImageSet(self.folder / f"{name}_db.npy", f"{name} database", self.dataset.database, folder)]
        if self.dataset.in_database is None:
            queries = self.folder / f"{name}_query.npy"
            sets.insert(0, ImageSet(queries, f"{name} queries", self.dataset.queries, folder))
        return sets

    def descriptors(self, processes: Processes | None = None) -> tuple[Tensor, Database]:
        """Returns the query descriptors (Q, D) and the database with the distractors; extracts missing descriptors.

        Args:
            processes: the processes of a `torchrun`, which share the extraction; by default only this one.
        """
        queries, parts, files = self._rows(processes)
        name = f"{self.dataset.name}_db{'+distractors' if len(parts) > 1 else ''}"
        weights = [weight for weight, _ in self.parts] or [1.0]
        return queries, with_index(self.cfg, Database(parts), self.folder / name, files, self.device, weights=weights)

    def _rows(self, processes: Processes | None) -> tuple[Tensor, list[Tensor], list[Path]]:
        """Returns the query descriptors, the rows of the database and of the distractors, and the files of the rows."""
        if self.parts:
            weights, experiments = zip(*self.parts, strict=True)
            queries, parts, files = zip(*(each._rows(processes) for each in experiments), strict=True)
            with option("TEST.FUSION"):
                rows = [fused(each, weights, self.output.folder) for each in zip(*parts, strict=True)]
                return fused(queries, weights, self.output.folder), rows, [file for each in files for file in each]
        if isinstance(self.features, Ranking):
            raise InputError(f"TEST.FEATURES: {self.cfg.TEST.FEATURES} has a ranking; this command needs descriptors")
        if self.features is not None:
            queries, rows, file = self.features
            files = [file]
        else:
            log.info("descriptors: %s", self.folder)
            *others, rows = extract(self.sets, self.recipe, self.cfg, self.device, processes)
            queries = others[0] if others else rows[torch.from_numpy(self.dataset.in_database)]
            files = [self.sets[-1].path]
        parts = [rows]
        if self.distractors is not None:
            if self.distractors.rows.shape[1] != rows.shape[1]:
                width = self.distractors.rows.shape[1]
                raise InputError(f"the distractors have {width} dimensions, the database {rows.shape[1]}")
            if self.distractors.path.resolve() in [file.resolve() for file in files]:
                raise InputError(f"TEST.DISTRACTORS: {self.distractors.path} has the rows of the database itself")
            log.info("distractors: %d in %s", len(self.distractors.rows), self.distractors.path)
            parts.append(self.distractors.rows)
            files.append(self.distractors.path)
        return queries, parts, files

    def search(self, processes: Processes | None = None) -> Searched:
        """Searches for the results that the stages need; the processes of a `torchrun` share it, see descriptors."""
        if isinstance(self.features, Ranking):
            return Searched(self.features, torch.empty(0, 1), Database(torch.empty(0, 1)))
        return self.search_with(self.stages.values(), *self.descriptors(processes), processes)

    def search_with(
        self, stages: Iterable[Stage], queries: Tensor, database: Database, processes: Processes | None = None
    ) -> Searched:
        """Searches for the results that these stages and the measures of the dataset need; see search."""
        dataset = self.dataset
        everything = "ranks" in self.cfg.TEST.EXPORT
        return search_for(
            stages, queries, database, dataset.listed, self.device, processes, everything,
            dataset.excluded, dataset.depth,
        )  # fmt: skip

    def evaluate(self, ranking: Ranking) -> dict[str, Metrics]:
        """Returns the metrics of a ranking by each protocol of the dataset."""
        dataset = self.dataset
        return evaluate(ranking, dataset.ground_truth, dataset.protocols, len(dataset.database))

    def export(self, folder: Path, rankings: Mapping[str, Ranking], searched: Searched) -> None:
        """Writes rankings and descriptors into a folder for other programs, in the forms of TEST.EXPORT."""
        dataset, forms = self.dataset, self.cfg.TEST.EXPORT
        if not forms:
            return
        with option("TEST.EXPORT"):
            queries, database = (
                [name(number) for number in range(len(images))]
                for name, images in ((dataset.query_name, dataset.queries), (dataset.database_name, dataset.database))
            )
            distractors = map(str, range(len(searched.database) - len(database)))
            write_rankings(folder, forms, dataset.name, rankings, Names(queries, [*database, *distractors]))
            files = Names.of_files((dataset.queries, dataset.folder), (dataset.database, dataset.folder))
            write_descriptors(folder, forms, dataset.name, searched.queries, searched.database, files)

    @cached_property
    def stages(self) -> dict[str, Stage]:
        """The stages of TEST.RERANKER, by title; none for a saved ranking."""
        if isinstance(self.features, Ranking):
            return {}
        return make_stages(self.cfg, self.output.folder, self._local_feature_stages)

    def _local_feature_stages(self, counts: Sequence[int]) -> dict[int, Stage]:
        """Returns the stages of CVNet-Rerank, by the number of candidates."""
        if self.recipe is None:
            raise InputError("TEST.RERANKER cvnet needs one network, without TEST.FEATURES and TEST.FUSION")
        if not self.recipe.is_cvnet or self.recipe.whitening is not None:
            raise InputError("TEST.RERANKER cvnet needs CVNet's own network, MODEL.NAME cvnet without MODEL.WHITENING")
        if not len(self.database_images):
            raise InputError(
                "TEST.RERANKER cvnet needs the images of the distractors in the order of their descriptors, as listed "
                f"in {self.cfg.TEST.DATA_DIR}/revisitop1m/revisitop1m.txt"
            )
        maps_folder = self.output.folder / "cvnet_maps" if self.cfg.TEST.MAPS_GB else None
        return local_feature_stages(
            counts,
            {
                each.name: [ignored_images(truth, each) for truth in self.dataset.ground_truth]
                for each in self.dataset.protocols
            },
            recipe=self.recipe,
            queries=self.dataset.queries,
            database=self.database_images,
            path=self.folder / f"{self.dataset.name}_cvnet.npy",
            maps_folder=maps_folder,
            maps_bytes=int(self.cfg.TEST.MAPS_GB * 1e9),
            loading=make_loading(self.cfg, self.device),
            resume=self.cfg.TEST.RESUME,
        )

    @property
    def database_images(self) -> Sequence[ImageFile]:
        """The images of the rows, those of the distractors included; empty if these are unknown."""
        if self.distractors is None:
            return self.dataset.database
        images = self.distractors.images
        return ConcatDataset([self.dataset.database, images]) if len(images) else ()

    def matches(self, ranking: Ranking, explanations: Mapping[int, Explanation]) -> dict[int, Any]:
        """Draws where explained results match their queries (MatchDrawing), by the number of the query, if known."""
        from report.drawing import draw_match  # imports matplotlib, which other commands do not need

        matches = {}
        for query, explanation in explanations.items() if self.recipe else ():
            number = int(ranking.ids[query, explanation.before])
            if number < len(self.database_images):
                try:
                    images = [image.read() for image in (self.dataset.queries[query], self.database_images[number])]
                    matches[query] = draw_match(match_images(self.recipe, self.device, *images), images)
                except InputError as error:
                    log.warning("%s", error)
        return matches

    def facts(self) -> dict[str, Any]:
        """Returns the facts about this dataset in results.json beside the metrics."""
        facts: dict[str, Any] = {}
        recipe = self.recipe
        if self.parts:
            facts["fusion"] = [{"weight": weight, **part.facts()} for weight, part in self.parts]
            for part in facts["fusion"]:  # what must be stated with the metrics
                if part.get("whitening", {}).get("learnt_on_the_test_set"):
                    facts["whitening"] = part["whitening"]
        elif recipe is None:
            facts["features"] = self.cfg.TEST.FEATURES
            facts["made_from"] = read_provenance(getattr(self.features, "file", Path(self.cfg.TEST.FEATURES)))
        else:
            facts["network"] = {"title": recipe.title, "modules": recipe.modules_in_words}
            facts["checkpoint"] = {"path": recipe.weights_in_words, "sha256": recipe.weights_sha256}
            facts["descriptors"] = str(self.folder)
            if recipe.whitening is not None:
                learnt = recipe.whitening_provenance
                facts["whitening"] = {
                    "path": str(recipe.whitening),
                    **{key: learnt.get(key) for key in ("kind", "source")},
                    "learnt_on_the_test_set": learnt.get("dataset") == self.dataset.name,
                }
        facts["stages"] = [repr(getattr(stage, "reranker", stage)) for stage in self.stages.values()]
        if self.cfg.TEST.INDEX:
            index = {"factory": self.cfg.TEST.INDEX, "parameters": self.cfg.TEST.INDEX_SEARCH}
            facts["index"] = {**index, "rows": self.cfg.TEST.INDEX_ROWS}
        if self.distractors is not None:
            facts["distractors"] = len(self.distractors.rows)
        random = any(
            each.recipe is not None and has_random_weights(each.recipe, each.cfg, self.dataset)
            for each in (self, *(part for _, part in self.parts))
        )
        if self.dataset.name in toy.NAMES:
            facts["note"] = toy.DISCLAIMER if random else toy.DRAWN_DISCLAIMER
        elif random:
            facts["note"] = "random weights: the metrics show that the code works, not how accurate the method is"
        return facts


def prepare(cfg: CfgNode, name: str, output: Output, device: torch.device) -> Experiment:
    """Creates the experiment on a dataset.

    Raises:
        InputError: if anything is missing or does not fit, before the long computations.
    """
    dataset = find_dataset(cfg, name)
    if cfg.TEST.MAX_SIDE and name in DOWNLOADED:
        log.warning("TEST.MAX_SIDE %d is not the published protocol of %s", cfg.TEST.MAX_SIDE, name)
    if not cfg.TEST.FUSION:
        experiment = _with_descriptors(cfg, dataset, output, device)
        check_index(cfg, experiment.recipe.dim if experiment.recipe else None)
    else:
        parts = tuple((weight, _with_descriptors(part, dataset, output, device)) for weight, part in fusion_parts(cfg))
        if any(isinstance(part.features, Ranking) for _, part in parts):
            raise InputError("TEST.FUSION: a ranking cannot be fused; give descriptors")
        dims = [part.recipe.dim if part.recipe else 0 for _, part in parts]
        check_index(cfg, sum(dims) if all(dims) else None)
        experiment = Experiment(cfg, dataset, None, None, parts[0][1].distractors, output, device, parts)
    with option("TEST.EXPORT"):
        check_forms(cfg.TEST.EXPORT, not isinstance(experiment.features, Ranking))
    if isinstance(experiment.features, Ranking) and (active_rerankers(cfg) or cfg.TEST.INDEX):
        log.warning("%s contains a ranking instead of descriptors: it is not searched or reranked", cfg.TEST.FEATURES)
    _ = experiment.stages  # raises if a stage is impossible
    return experiment


def _with_descriptors(cfg: CfgNode, dataset: Dataset, output: Output, device: torch.device) -> Experiment:
    """Creates the experiment with the descriptors of one network, or saved ones."""
    recipe = features = None
    if cfg.TEST.FEATURES:
        with option("TEST.FEATURES"):
            features = load_features(Path(cfg.TEST.FEATURES), dataset)
    else:
        dataset.check_files()
        recipe = find_recipe(cfg, dataset)
    distractors = None
    if cfg.SupG.onemeval:
        distractors = find_distractors(cfg)
        if recipe is None:
            log.warning(
                "TEST.FEATURES: it cannot be checked whether %s was extracted by the same network", distractors.path
            )
        else:
            with option("TEST.DISTRACTORS"):
                check_distractors(distractors.path, provenance_of(recipe, recipe.extractor(device)))
    return Experiment(cfg, dataset, recipe, features, distractors, output, device)


def small_set_advice(cfg: CfgNode, dataset: Dataset) -> str | None:
    """Returns a line if SuperGlobal's reranking averages more results than a query usually has positive images."""
    positives, k = float(median(dataset.positives or [0])), cfg.SupG.rerank_k
    if "superglobal" not in active_rerankers(cfg) or positives >= k + 1:
        return None
    smaller, keys = max(1, int(positives) - 1), (*NETWORK, *DATASET, "TEST.FEATURES", *FUSION)
    folds = str(min(5, len(dataset.positives)))
    words = ["tools.tune", "--folds", folds, "--test", dataset.name, *as_words(cfg, *keys)]
    if cfg.TEST.FUSION:  # whose weights are tried by default
        words += ["--try", "SupG.rerank_k", f"{smaller},{k}"]
    command = f", or {shlex.join(['python', '-m', *words])}" if len(dataset.positives) > 1 else ""
    return (
        f"{dataset.name}: the median number of positive images is {positives:g}, less than the K + 1 = {k + 1} results "
        f"that the reranking averages; try SupG.rerank{f'_k {smaller}' if smaller < k else ' False'}{command}"
    )


def prepare_all(session: Session) -> list[Experiment]:
    """Creates the experiments on all datasets, see prepare; of several processes the first one alone draws toy."""
    cfg = session.cfg
    with session.processes.agreeing():
        return [prepare(cfg, name, session.output, session.device) for name in cfg.TEST.DATASET_LIST]


def prepare_variants(first: Experiment, cfgs: Iterable[CfgNode]) -> list[Experiment]:
    """Creates experiments with the descriptors of the first, but other options of the rerankers.

    Raises:
        InputError: if a stage is impossible.
    """
    experiments = [replace(first, cfg=cfg) for cfg in cfgs]
    for each in experiments:
        _ = each.stages
    return experiments


class Variant(NamedTuple):
    """The ranking of a stage of an experiment that shares its search with others.

    Attributes:
        experiment: the experiment; the first of them for the search.
        title: "retrieval", or the title of the stage.
        ranking: its ranking.
        searched: the search.
        stage: the stage; None for the search.
        peak_bytes: the memory that it used; None if unknown.
    """

    experiment: Experiment
    title: str
    ranking: Ranking
    searched: Searched
    stage: Stage | None
    peak_bytes: int | None


def rankings_of(
    first: Experiment,
    experiments: Sequence[Experiment],
    queries: Tensor,
    database: Database,
    processes: Processes | None = None,
) -> Iterator[Variant]:
    """Yields the ranking of a search, and that of each stage of the experiments, see prepare_variants.

    The processes of a `torchrun` share the search; only the first one computes the stages.
    """
    stages = [stage for each in experiments for stage in each.stages.values()]
    with PeakMemory(first.device) as peak:
        searched = first.search_with(stages, queries, database, processes)
    if processes and processes.rank > 0:
        return
    yield Variant(first, "retrieval", searched.ranking, searched, None, peak.bytes)
    for experiment in experiments:
        for title, stage in experiment.stages.items():
            with PeakMemory(first.device) as peak:
                ranking = stage(searched)
            yield Variant(experiment, title, ranking, searched, stage, peak.bytes)


def make_stages(
    cfg: CfgNode,
    folder: Path | None = None,
    local_features: Callable[[Sequence[int]], dict[int, Stage]] | None = None,
) -> dict[str, Stage]:
    """Creates the stages of TEST.RERANKER, by title: "reranking", or "reranking by aqe" if there are several.

    Args:
        folder: a folder for the temporary files of stages.
        local_features: creates the stages of CVNet-Rerank; None where there are no images.
    """
    stages: dict[str, Stage] = {}
    names = active_rerankers(cfg)
    if unknown := [name for name in names if name not in RERANKERS]:
        hint = nearest(unknown[0], RERANKERS) or f"they are {', '.join(RERANKERS)}, none"
        raise InputError(f"TEST.RERANKER: there is no reranker {unknown[0]!r}; {hint}")
    for name in names:
        title = f"reranking by {name}" if len(names) > 1 else "reranking"
        if name != "cvnet":
            stages[title] = STAGES[name].make(cfg, folder)
        elif local_features is None:
            raise InputError("TEST.RERANKER cvnet needs the images of a dataset, as in test.py")
        else:
            several = len(cfg.TEST.TOPK_LIST) > 1
            for number, stage in local_features(sorted({*cfg.TEST.TOPK_LIST})).items():
                stages[f"{title} of {number}" if several else title] = stage
    return stages


class StageKind(NamedTuple):
    """A choice of TEST.RERANKER: its title in tables, and a function that creates its stage."""

    title: str
    make: Callable[[CfgNode, Path | None], Stage]


def superglobal_reranker(cfg: CfgNode) -> SuperGlobalReranker:
    method = cfg.SupG
    return SuperGlobalReranker(method.rerank_m, method.rerank_k, method.rerank_beta, method.rerank_s2)


def query_expansion(cfg: CfgNode, alpha: float) -> QueryExpansion:
    return QueryExpansion(cfg.RERANK.QE_N, alpha, max(cfg.RERANK.QE_N, cfg.SupG.rerank_m))


def reciprocal_reranker(cfg: CfgNode) -> KReciprocalReranker:
    return KReciprocalReranker(cfg.SupG.rerank_m, cfg.RERANK.K1, cfg.RERANK.K2, cfg.RERANK.LAMBDA)


def diffusion_reranker(cfg: CfgNode) -> DiffusionReranker:
    own = cfg.RERANK
    return DiffusionReranker(
        cfg.SupG.rerank_m, own.DIFFUSION_K, own.DIFFUSION_KQ, own.DIFFUSION_GAMMA, own.DIFFUSION_ALPHA
    )


STAGES = {
    "superglobal": StageKind("SuperGlobal", lambda cfg, folder: Reranked(superglobal_reranker(cfg))),
    "aqe": StageKind("AQE", lambda cfg, folder: SearchedAgain(query_expansion(cfg, 0.0))),
    "alpha-qe": StageKind("alpha-QE", lambda cfg, folder: SearchedAgain(query_expansion(cfg, cfg.RERANK.QE_ALPHA))),
    "dba": StageKind("DBA", lambda cfg, folder: Augmented(cfg.RERANK.DBA_K, folder)),
    "k-reciprocal": StageKind("k-reciprocal", lambda cfg, folder: Reranked(reciprocal_reranker(cfg))),
    "diffusion": StageKind("diffusion", lambda cfg, folder: Reranked(diffusion_reranker(cfg))),
}
RERANKERS = {**{name: kind.title for name, kind in STAGES.items()}, "cvnet": "CVNet-Rerank"}  # and their titles
