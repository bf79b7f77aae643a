"""Create objects from options, for the commands. Library code does not know options; this module knows all."""

import difflib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset
from tqdm import tqdm
from yacs.config import CfgNode

from cvnet_rerank.pair_scores import CVNetReranker, PairScores
from extraction.cache import content_folder, plain_name
from extraction.extract import ImageSet, extract_sets, extract_shared
from extraction.images import ImageFile, set_pixel_limit
from extraction.loading import Loading
from extraction.owner import owned
from extraction.processes import Processes
from extraction.shards import check_shards, find_shards, is_shard
from model.checkpoint import find_checkpoint
from model.device import choose_device, device_name, prepare_process
from model.errors import InputError, short_list
from model.network_recipe import NetworkRecipe
from model.networks import short_name
from model.recipe import SCALE_SETS, Recipe
from model.whitened import WhitenedRecipe
from modules.diffusion import DiffusionReranker
from modules.expansion import QueryExpansion
from modules.reciprocal import KReciprocalReranker
from modules.reranking import SuperGlobalReranker
from modules.search import Database
from revisitop import toy
from revisitop.dataset import Dataset
from revisitop.descriptors import (
    add_distractors,
    check_distractors,
    database_file,
    descriptors_made_from,
    load_descriptors,
    load_distractors,
    load_ranking,
)
from revisitop.evaluate import most_ignored
from revisitop.index import indexed, new_index
from revisitop.layout_revisitop import load_distractor_list
from revisitop.layouts import dataset_folder, load_dataset
from revisitop.retrieve import Ranking
from revisitop.stages import Augmented, Reranked, Searched, SearchedAgain, Stage, search_for

log = logging.getLogger(__name__)

AnyRecipe = Recipe | NetworkRecipe | WhitenedRecipe

DEFAULT_WEIGHTS = Path("weights")
DOWNLOADED = ("roxford5k", "rparis6k", "gldv2")  # datasets that tools.download provides


@contextmanager
def option(key: str) -> Iterator[None]:
    """A context that adds the name of the option to an InputError."""
    try:
        yield
    except InputError as error:
        raise error.about(key) from None


def start_device(cfg: CfgNode, head: dict[str, Any], local_rank: int = 0) -> torch.device:
    """Prepares the process for the device of TEST.DEVICE, records it in the log and the head, and returns it."""
    with option("TEST.DEVICE"):
        device = choose_device(cfg.TEST.DEVICE, local_rank)
    prepare_process(device)
    set_pixel_limit(cfg.DATA_LOADER.MAX_PIXELS)
    head["device"] = device_name(device)
    log.info("device: %s", head["device"])
    return device


def make_recipe(cfg: CfgNode, weights: Path | str) -> AnyRecipe:
    """Returns the recipe of descriptors for the options."""
    method, scales = cfg.SupG, cfg.TEST.SCALE_LIST
    common = {
        "scales": SCALE_SETS[scales] if isinstance(scales, int) else tuple(scales),
        "relup": method.relup_threshold if method.relup else None,
        "gemp": method.gemp_p if method.gemp else None,
        "rgem": method.rgem_p if method.rgem else None,
        "rgem_window": method.rgem_window,
        "sgem": method.sgem_p if method.sgem else None,
        "precision": cfg.TEST.PRECISION,
        "max_side": cfg.TEST.MAX_SIDE or None,
    }
    if cfg.MODEL.NAME == "cvnet":
        recipe: AnyRecipe = Recipe(weights, cfg.MODEL.DEPTH, cfg.MODEL.HEADS.REDUCTION_DIM, **common)
    else:
        stages, ends = (
            None if names == ["auto"] else tuple(names) for names in (method.relup_stages, method.relup_ends)
        )
        recipe = NetworkRecipe(
            cfg.MODEL.NAME, str(weights), **common, relup_stages=stages, relup_ends=ends, pooling=cfg.MODEL.POOLING
        )
    return WhitenedRecipe(recipe, Path(cfg.MODEL.WHITENING)) if cfg.MODEL.WHITENING else recipe


def make_loading(cfg: CfgNode, device: torch.device) -> Loading:
    pin_memory = cfg.DATA_LOADER.PIN_MEMORY and device.type == "cuda"
    return Loading(cfg.DATA_LOADER.NUM_WORKERS, pin_memory, cfg.TEST.BATCH_SIZE)


def find_recipe(cfg: CfgNode, dataset: Dataset | None = None) -> AnyRecipe:
    """Returns the recipe with the weights of the options, after checking that they fit.

    Raises:
        InputError: if the weights are missing or do not fit.
    """
    recipe = make_recipe(cfg, find_weights(cfg, dataset))
    recipe.check()
    return recipe


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
        return find_checkpoint(Path(cfg.TEST.WEIGHTS) if given else DEFAULT_WEIGHTS, cfg.MODEL.DEPTH)


def find_dataset(cfg: CfgNode, name: str) -> Dataset:
    """Returns the dataset; toy is drawn if it is missing."""
    with option("TEST.DATA_DIR"):
        if name in toy.NAMES:
            draw = toy.ensure_dataset if name == "toy" else toy.ensure_landmarks
            draw(Path(cfg.TEST.DATA_DIR), lambda images: tqdm(images, desc="drawing toy", unit="img"))
        folder = Path(cfg.TEST.DATA_DIR)
        if dataset_folder(folder, name) is None:
            if name in DOWNLOADED:
                raise InputError(
                    f"no dataset {name} in {folder}; get it with python -m tools.download {name} --data-dir {folder}"
                )
            there = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
            if near := difflib.get_close_matches(name, [*DOWNLOADED, *toy.NAMES, *there], 1):
                raise InputError(f"no dataset {name} in {folder}; did you mean {near[0]}?")
        return load_dataset(name, folder)


@dataclass(frozen=True)
class Output:
    """TEST.OUT_DIR: descriptors, which runs share, and a folder of results for each run.

    Attributes:
        folder: TEST.OUT_DIR.
    """

    folder: Path

    @property
    def descriptors(self) -> Path:
        return self.folder / "descriptors"

    def new_run(self, title: str) -> Path:
        """Creates and returns the folder for the results of this run, runs/<date>-<title>."""
        start = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
        for number in count(1):
            run = self.folder / "runs" / f"{start}-{plain_name(title)}{f'-{number}' if number > 1 else ''}"
            try:
                run.mkdir(parents=True)
                return run
            except FileExistsError:  # another process started in the same second
                continue

    def publish(self, run: Path) -> None:
        """Links runs/latest to the run, if the file system supports links."""
        new = run.parent / f".latest.{os.getpid()}"
        with suppress(OSError):
            new.unlink(missing_ok=True)
            new.symlink_to(run.name)
            new.replace(run.parent / "latest")


def make_output(cfg: CfgNode) -> Output:
    """Creates TEST.OUT_DIR, with its parents.

    Raises:
        InputError: if it cannot be created or written to.
    """
    folder = Path(cfg.TEST.OUT_DIR)
    with option("TEST.OUT_DIR"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".writable.{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InputError(f"{folder} cannot be created or written to ({error.strerror})") from None
    return Output(folder)


def network_title(cfg: CfgNode, cvnet: str = "R") -> str:
    """Returns a short name of the network for file names, such as R50."""
    return f"{cvnet}{cfg.MODEL.DEPTH}" if cfg.MODEL.NAME == "cvnet" else plain_name(short_name(cfg.MODEL.NAME))


@dataclass(frozen=True)
class Distractors:
    """The descriptors of the million distractors.

    Attributes:
        paths: the file, or its shards.
        parts: (N_i, D) each, memory-mapped: one, or one per shard.
        images: their images, in the same order; empty if the list is missing or has another length.
    """

    paths: list[Path]
    parts: list[Tensor]
    images: Sequence[ImageFile]

    def __len__(self) -> int:
        return sum(map(len, self.parts))


def find_distractors(cfg: CfgNode) -> Distractors:
    """Returns the distractors of TEST.DISTRACTORS, or of the default file in the current folder."""
    if cfg.TEST.DISTRACTORS:
        candidates = [Path(cfg.TEST.DISTRACTORS)]
    else:
        candidates = [Path(f"feats_1m_{network_title(cfg, 'RN')}{suffix}") for suffix in (".pth", ".npy")]
    with option("TEST.DISTRACTORS"):
        found = ([path] if path.is_file() and not is_shard(path) else find_shards(path) for path in candidates)
        paths = next(filter(None, found), None)
    if paths is None and cfg.TEST.DISTRACTORS:
        raise InputError(f"TEST.DISTRACTORS: no file {candidates[0]}")
    if paths is None:
        raise InputError(
            f"SupG.onemeval: no file {candidates[0]}; create it with extract_rop1m.py, or set TEST.DISTRACTORS"
        )
    with option("TEST.DISTRACTORS"):
        if len(paths) > 1 or is_shard(paths[0]):
            check_shards(paths)
        parts = [load_distractors(path) for path in paths]
        if len(widths := {part.shape[1] for part in parts}) > 1:
            raise InputError(f"{paths[0]} and its other shards differ in dimensions: {short_list(sorted(widths))}")
    try:
        images: Sequence[ImageFile] = load_distractor_list(Path(cfg.TEST.DATA_DIR) / "revisitop1m")[1]
    except InputError:
        images = ()
    found = Distractors(paths, parts, images)
    return found if len(images) == len(found) else replace(found, images=())


def check_index(cfg: CfgNode, dim: int | None) -> None:
    """Raises InputError if TEST.INDEX is invalid for this number of dimensions, or conflicts with the rerankers."""
    if cfg.TEST.INDEX and "dba" in cfg.TEST.RERANKER:
        raise InputError("TEST.RERANKER dba replaces all rows and searches them exactly: leave TEST.INDEX out")
    if cfg.TEST.INDEX and dim:
        with option("TEST.INDEX"):
            new_index(cfg.TEST.INDEX, dim)


def with_index(
    cfg: CfgNode, database: Database, path: Path, files: Iterable[Path], device: torch.device, **made_from: Any
) -> Database:
    """Returns the database with the index of TEST.INDEX, whose file name begins with `path`; on the device without it.

    Args:
        files: the files of the rows; their sizes and times tell whether a saved index fits.
        device: where the database is searched if it has no index, see Database.fitted.
        made_from: further provenance of the rows.
    """
    if not cfg.TEST.INDEX:
        return database.fitted(device)
    stats = [(file, file.stat()) for file in files]
    made_from["files"] = [[str(file.resolve()), stat.st_size, stat.st_mtime_ns] for file, stat in stats]
    decoded = cfg.TEST.INDEX_ROWS == "decoded"
    with option("TEST.INDEX"):
        return indexed(database, cfg.TEST.INDEX, path, made_from, cfg.TEST.INDEX_SEARCH, decoded)


def own_images(folder: Path, images: Sequence[ImageFile], recipe: AnyRecipe, output: Output) -> ImageSet:
    """Returns the images of a folder as a set; each recipe and folder path has its own descriptors."""
    place = folder.resolve()
    kept = content_folder(output.descriptors, place.name, {"folder": str(place), **recipe.provenance()})
    return ImageSet(kept / "database.npy", "database", images, folder)


def extract_together(
    sets: Sequence[ImageSet],
    recipe: AnyRecipe,
    cfg: CfgNode,
    device: torch.device,
    processes: Processes | None = None,
    on_error: str = "list",
) -> list[Tensor]:
    """Returns the descriptors of sets that are kept in one folder, (N, D) each; extracts missing descriptors.

    Args:
        processes: the processes of a `torchrun`, which share the extraction; by default only this one.
        on_error: how damaged images are handled, see extraction.extract.extract_images.
    """
    loading, resume, first = make_loading(cfg, device), cfg.TEST.RESUME, processes is None or processes.rank == 0
    with owned(sets[0].path.parent) if first else nullcontext():
        if processes is not None and processes.count > 1:
            for each in sets:
                store = extract_shared(each, recipe, device, processes, loading, resume, on_error)
                if store is not None and not store.complete:
                    store.finish()
            resume = True  # reuses the descriptors that have just been extracted
        with processes.first_alone() if processes else nullcontext():
            return extract_sets(sets, recipe, device, loading, resume, on_error)


@dataclass(frozen=True)
class Experiment:
    """One dataset with everything that its evaluation needs, checked before the long computations begin.

    Attributes:
        cfg: the options.
        dataset: images and ground truth.
        recipe: the recipe of the descriptors; None if saved ones are evaluated.
        distractors: the distractors, or None.
        output: where descriptors and scores are kept.
        device: the device of the computations.
    """

    cfg: CfgNode
    dataset: Dataset
    recipe: AnyRecipe | None
    distractors: Distractors | None
    output: Output
    device: torch.device

    @cached_property
    def folder(self) -> Path:
        """The folder for the descriptors of these images by this recipe, and for scores computed from them."""
        return content_folder(
            self.output.descriptors,
            self.dataset.name,
            {"dataset": self.dataset.name, **self.recipe.provenance(), "images": self.dataset.fingerprint},
        )

    def saved_ranking(self) -> Ranking | None:
        """Returns the ranking in TEST.FEATURES, or None if it contains descriptors."""
        path = Path(self.cfg.TEST.FEATURES)
        if self.recipe is not None or path.suffix.lower() != ".pkl":
            return None
        with option("TEST.FEATURES"):
            ranking = load_ranking(path, self.dataset)
        if self.stages:
            log.warning("%s contains a ranking instead of descriptors: it is not reranked", path)
        if self.cfg.TEST.INDEX:
            log.warning("%s contains a ranking: TEST.INDEX has no effect", path)
        return ranking

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
        if self.recipe is None:
            with option("TEST.FEATURES"):
                queries, rows = load_descriptors(Path(self.cfg.TEST.FEATURES), self.dataset)
        else:
            log.info("checkpoint: %s, SHA-256 %s", self.recipe.checkpoint, self.recipe.checkpoint_sha256)
            log.info("descriptors: %s", self.folder)
            *others, rows = extract_together(self.sets, self.recipe, self.cfg, self.device, processes)
            queries = others[0] if others else rows[torch.from_numpy(self.dataset.in_database)]
        database = Database(rows) if self.distractors is None else add_distractors(rows, self.distractors.parts)
        return queries, self._indexed(database)

    def search(self, processes: Processes | None = None) -> Searched:
        """Searches for the results that the stages need; the processes of a `torchrun` share it, see descriptors."""
        queries, database = self.descriptors(processes)
        return search_for(self.stages.values(), queries, database, self.dataset.listed, self.device, processes)

    def _indexed(self, database: Database) -> Database:
        """Returns the database on the device, or with its TEST.INDEX, which is saved beside the descriptors."""
        if not self.cfg.TEST.INDEX:
            return database.fitted(self.device)
        name = f"{self.dataset.name}_db"
        if self.recipe is None:
            source = Path(self.cfg.TEST.FEATURES)
            folder = content_folder(self.output.descriptors, name, {"features": str(source.resolve())})
            files = [database_file(source, self.dataset)]
        else:
            folder, files = self.folder, [self.folder / f"{name}.npy"]
        if self.distractors is not None:
            files += self.distractors.paths
            name += "+distractors"
        return with_index(self.cfg, database, folder / name, files, self.device)

    def whitening_facts(self) -> dict[str, Any]:
        """Returns the provenance of the whitening, and whether it was learnt on this dataset's own database."""
        learnt = self.recipe.learnt_from
        own = learnt.get("dataset") == self.dataset.name
        facts = {"path": str(self.recipe.path), "kind": learnt.get("kind"), "source": learnt.get("source")}
        return {**facts, "learnt_on_the_test_set": own}

    @property
    def subject(self) -> "Subject":
        """Returns the information about the images for the stages."""
        database: Sequence[ImageFile] = self.dataset.database
        if self.distractors is not None:
            known = len(self.distractors.images)
            database = ConcatDataset([database, self.distractors.images]) if known else ()
        scores = self.folder / f"{self.dataset.name}_cvnet.npy" if self.recipe else None
        ignored = most_ignored(self.dataset.ground_truth, self.dataset.protocols)
        return Subject(self.recipe, self.dataset.queries, database, ignored, scores, self.output.folder)

    @cached_property
    def stages(self) -> dict[str, Stage]:
        """The stages of TEST.RERANKER, by title."""
        return make_stages(self.cfg, self.subject, self.device)

    def facts(self) -> dict[str, Any]:
        """Returns the facts about this dataset in results.json beside the metrics."""
        facts: dict[str, Any] = {}
        if self.recipe is None:
            path = Path(self.cfg.TEST.FEATURES)
            facts["features"] = str(path)
            facts["made_from"] = descriptors_made_from(path, self.dataset) or None
        else:
            facts["checkpoint"] = {"path": str(self.recipe.checkpoint), "sha256": self.recipe.checkpoint_sha256}
            facts["descriptors"] = str(self.folder)
            if isinstance(self.recipe, WhitenedRecipe):
                facts["whitening"] = self.whitening_facts()
        if self.cfg.TEST.INDEX:
            index = {"factory": self.cfg.TEST.INDEX, "parameters": self.cfg.TEST.INDEX_SEARCH}
            facts["index"] = {**index, "rows": self.cfg.TEST.INDEX_ROWS}
        if self.distractors is not None:
            facts["distractors"] = len(self.distractors)
        if self.dataset.name in toy.NAMES:
            own_weights = self.recipe is not None and self.cfg.TEST.WEIGHTS == "auto"
            facts["note"] = toy.DISCLAIMER if own_weights else toy.DRAWN_DISCLAIMER
        return facts


def prepare(cfg: CfgNode, name: str, output: Output, device: torch.device) -> Experiment:
    """Creates the experiment on a dataset.

    Raises:
        InputError: if anything is missing or does not fit, before the long computations.
    """
    dataset = find_dataset(cfg, name)
    if cfg.TEST.MAX_SIDE and name in DOWNLOADED:
        log.warning("TEST.MAX_SIDE %d is not the published protocol of %s", cfg.TEST.MAX_SIDE, name)
    recipe = None
    if not cfg.TEST.FEATURES:
        dataset.check_files()
        recipe = find_recipe(cfg, dataset)
    check_index(cfg, recipe.dim if recipe else None)
    distractors = None
    if cfg.SupG.onemeval:
        distractors = find_distractors(cfg)
        if recipe is None:
            log.warning(
                "TEST.FEATURES: it cannot be checked whether %s was extracted by the same network", distractors.paths[0]
            )
        else:
            with option("TEST.DISTRACTORS"):
                check_distractors(distractors.paths[0], recipe.provenance())
    experiment = Experiment(cfg, dataset, recipe, distractors, output, device)
    _ = experiment.stages  # raises if a stage is impossible
    return experiment


@dataclass(frozen=True)
class Subject:
    """What a stage may need to know about the images whose ranking it changes.

    Attributes:
        recipe: the recipe of their descriptors; None for saved ones of unknown origin.
        queries: the query images.
        database: the images of the rows; empty if unknown.
        spare: the largest number of images that a protocol drops from a ranking.
        scores: a file for scores that take long to compute; None without a recipe.
        folder: TEST.OUT_DIR, where a stage can store files.
    """

    recipe: AnyRecipe | None
    queries: Sequence[ImageFile]
    database: Sequence[ImageFile]
    spare: int
    scores: Path | None
    folder: Path


def make_stages(cfg: CfgNode, subject: Subject, device: torch.device) -> dict[str, Stage]:
    """Creates the stages of TEST.RERANKER, by title: "reranking", or "reranking by aqe" if there are several."""
    stages: dict[str, Stage] = {}
    names = [name for name in cfg.TEST.RERANKER if name in STAGES and (cfg.SupG.rerank or name != "superglobal")]
    for name in names:
        made = STAGES[name].make(cfg, subject, device)
        title = f"reranking by {name}" if len(names) > 1 else "reranking"
        stages |= {f"{title}{words}": stage for words, stage in made.items()}
    return stages


def cvnet_stages(cfg: CfgNode, subject: Subject, device: torch.device) -> dict[str, Stage]:
    if subject.recipe is None:
        raise InputError("TEST.RERANKER cvnet needs images and weights, which TEST.FEATURES does not provide")
    if not isinstance(subject.recipe, Recipe):
        raise InputError("TEST.RERANKER cvnet needs CVNet's own network, MODEL.NAME cvnet without MODEL.WHITENING")
    if not len(subject.database):
        raise InputError(
            "TEST.RERANKER cvnet needs the images of the distractors in the order of their descriptors, as listed in "
            f"{cfg.TEST.DATA_DIR}/revisitop1m/revisitop1m.txt"
        )
    counts = sorted({int(count) for count in cfg.TEST.TOPK_LIST})
    pairs = PairScores(
        subject.recipe,
        subject.queries,
        subject.database,
        subject.scores,
        m=counts[-1] + subject.spare,
        maps_folder=subject.folder / "cvnet_maps" if cfg.TEST.MAPS_GB else None,
        maps_bytes=int(cfg.TEST.MAPS_GB * 1e9),
        loading=make_loading(cfg, device),
        resume=cfg.TEST.RESUME,
    )
    words = " of {}" if len(counts) > 1 else ""
    return {words.format(count): Reranked(CVNetReranker(pairs, count, subject.spare)) for count in counts}


class StageKind(NamedTuple):
    """A choice of TEST.RERANKER.

    Attributes:
        title: the name in tables.
        make: creates its stages, by the suffix of their title.
    """

    title: str
    make: Callable[[CfgNode, Subject, torch.device], dict[str, Stage]]


def _one(make: Callable[[CfgNode, Subject], Stage]) -> Callable[[CfgNode, Subject, torch.device], dict[str, Stage]]:
    return lambda cfg, subject, device: {"": make(cfg, subject)}


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
    "superglobal": StageKind("SuperGlobal", _one(lambda cfg, subject: Reranked(superglobal_reranker(cfg)))),
    "aqe": StageKind("AQE", _one(lambda cfg, subject: SearchedAgain(query_expansion(cfg, 0.0)))),
    "alpha-qe": StageKind(
        "alpha-QE", _one(lambda cfg, subject: SearchedAgain(query_expansion(cfg, cfg.RERANK.QE_ALPHA)))
    ),
    "dba": StageKind("DBA", _one(lambda cfg, subject: Augmented(cfg.RERANK.DBA_K, subject.folder))),
    "k-reciprocal": StageKind("k-reciprocal", _one(lambda cfg, subject: Reranked(reciprocal_reranker(cfg)))),
    "diffusion": StageKind("diffusion", _one(lambda cfg, subject: Reranked(diffusion_reranker(cfg)))),
    "cvnet": StageKind("CVNet-Rerank", cvnet_stages),
}
