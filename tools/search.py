"""Search a folder of your own images: descriptors, search and reranking, without ground truth.

python -m tools.search --database holiday/ --queries tower.jpg --weights ./weights
python -m tools.search --database holiday/ --queries details/ --weights ./weights --top 20 --json > found.json
python -m tools.search --database holiday/ --queries tower.jpg --index milvus:holiday.db
python -m tools.search --database holiday/ --queries tower.jpg --index milvus:http://localhost:19530
torchrun --nproc-per-node=8 -m tools.search --database holiday/ --queries details/

The folder is extracted once; the next search extracts only new and changed images. With --index, the folder is also
kept in a vector database, which is updated in place and provides the candidates. After a reranking, the score of a
result is the reranker's own, which only orders the results and may exceed 1; the cosine similarity follows it.
"""

from report.command import run_command  # isort: skip  # first, see there

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

from assembly import (
    check_index,
    extract,
    find_recipe,
    fusion_folder,
    image_folder_set,
    make_stages,
    option,
    start_session,
    with_index,
)
from config import FUSION, INDEX, LOADING, NETWORK, RERANKING, CommandLine, Parsed, fusion_parts
from extraction.extract import ImageSet
from extraction.folder import find_images
from extraction.images import ImageFile
from extraction.owner import owned
from extraction.processes import Processes
from model.errors import InputError, short_list
from model.recipe import Recipe
from modules.search import Database
from report.page import Page, Query, Section, first_hits, write_report
from revisitop.dataset import Dataset
from revisitop.exports import Names, check_forms, write_descriptors, write_rankings
from revisitop.fusion import fused
from revisitop.retrieve import SAVED_RANKS, Ranking
from revisitop.stages import search_for
from tools.milvus import MilvusDatabase, collection_name, connect

log = logging.getLogger(__name__)

_NAMED_AT_MOST = 50


@dataclass(frozen=True)
class Folder:
    """The readable images of a folder, with their descriptors.

    Attributes:
        root: the folder to which their names are relative.
        images: the N readable images.
        descriptors: (N, D), unit descriptors.
        unreadable: the names of the other images.
    """

    root: Path
    images: list[ImageFile]
    descriptors: Tensor
    unreadable: list[str]

    def name(self, number: int) -> str:
        return _name(self.images[number], self.root)


def main(argv: list[str]) -> None:
    args, cfg, _ = parse(argv)
    if not args.database.is_dir():
        raise InputError(f"--database {args.database}: there is no such folder")
    session = start_session(cfg, sys.stderr if args.json else sys.stdout)
    processes, device = session.processes, session.device
    milvus = connect(args.index) if args.index and session.first else None
    with option("TEST.EXPORT"):
        check_forms(cfg.TEST.EXPORT)
    weights, configs = zip(*(fusion_parts(cfg) if cfg.TEST.FUSION else [(1.0, cfg)]), strict=True)
    if saved := [each.TEST.FEATURES for each in configs if each.TEST.FEATURES]:
        raise InputError(f"TEST.FUSION: {saved[0]} has descriptors of a dataset; for a folder of images, give networks")
    recipes = [find_recipe(each) for each in configs]
    check_index(cfg, sum(recipe.dim for recipe in recipes))
    if args.queries.is_file() and (problem := ImageFile(args.queries).problem()):
        raise InputError(f"queries: {problem}")

    database_images, query_images = find_images(args.database), find_images(args.queries)
    query_folder = args.queries if args.queries.is_dir() else args.queries.parent
    extracted, files = [], []
    for each, recipe in zip(configs, recipes, strict=True):
        images = image_folder_set(args.database, database_images, recipe, session.output)
        queried = ImageSet(images.path.with_name("queries.npy"), "queries", query_images, query_folder)
        extracted.append(extract_folders([images, queried], recipe, device, each, processes))
        files.append(images.path)
    database, queries = (
        replace(folders[0], descriptors=fused([folder.descriptors for folder in folders], weights))
        for folders in zip(*extracted, strict=True)
    )
    cache = files[0].parent
    if len(files) > 1:
        parts = zip(weights, (file.parent for file in files), strict=True)
        cache = fusion_folder(session.output, args.database.resolve().name, parts)
    if milvus:
        names = [database.name(number) for number in range(len(database.images))]
        with owned(cache):
            rows = MilvusDatabase(milvus, args.index, collection_name(cache.name), names, database.descriptors)
    elif args.index:  # only one process updates and searches the vector database
        processes.end()
        return
    else:
        with owned(cache) if session.first else nullcontext(), processes.agreeing():
            rows = with_index(cfg, Database(database.descriptors), cache / "database", files, device, weights=weights)

    stages = make_stages(cfg, session.output.folder)
    everything = "ranks" in cfg.TEST.EXPORT
    searched = search_for(
        stages.values(), queries.descriptors, rows, device=device, processes=processes, everything=everything
    )
    processes.end()
    if not session.first:
        return
    rankings = {"retrieval": searched.ranking, **{title: stage(searched) for title, stage in stages.items()}}

    final = [*rankings.values()][-1]
    reranked = final is not searched.ranking
    scores = "the reranker's own, which only order the results and may exceed 1" if reranked else "cosine similarity"
    found = {queries.name(i): list(results(queries, database, final, i, args.top)) for i in range(len(queries.images))}
    if args.json:
        unreadable = {"database": database.unreadable, "queries": queries.unreadable}
        listed = [{"query": name, "results": [each._asdict() for each in hits]} for name, hits in found.items()]
        content = {"scores": scores, "database": str(database.root), "unreadable": unreadable, "queries": listed}
        print(json.dumps(content, indent=1))
    else:
        log.info("scores: %s%s", scores, "; then the cosine similarity" if reranked else "")
        for name, hits in found.items():
            log.info("")
            log.info("%s", name)
            for rank, file, score, cosine in hits:
                log.info("%4d  %s%7.4f  %s", rank, f"{score:7.4f}  " if reranked else "", cosine, file)
    run = session.output.new_run(f"search-{args.database.resolve().name}") if args.report or cfg.TEST.EXPORT else None
    if cfg.TEST.EXPORT:
        names = Names.of_files((queries.images, queries.root), (database.images, database.root))
        with option("TEST.EXPORT"):
            write_rankings(run, cfg.TEST.EXPORT, "search", rankings, names)
            own = Database(database.descriptors)
            write_descriptors(run, cfg.TEST.EXPORT, "search", queries.descriptors, own, names)
        log.info("rankings and descriptors for other programs are in %s", run)
    if args.report:
        networks = "; ".join(recipe.weights_in_words for recipe in recipes)
        settings = {"database": str(args.database), "queries": str(args.queries), "weights": networks}
        name = args.database.resolve().name
        page = Page(f"Search in {name}", settings, [section(queries, database, rankings)])
        log.info("the report is %s", write_report(page, run / "report"))
    if run:
        session.output.publish(run)


def parse(argv: list[str]) -> Parsed:
    truth = "it needs ground truth, as in test.py"
    instead = {"TEST.FEATURES": truth, "SupG.onemeval": truth, "TEST.DISTRACTORS": truth, "TEST.REPORT": "use --report"}
    instead |= {"TEST.DATA_DIR": "use --database", "TEST.DATASET_LIST": "use --database"}
    uses = ("TEST.DEVICE", "TEST.OUT_DIR", "TEST.RESUME", "TEST.EXPORT")
    line = CommandLine(__doc__, (*NETWORK, *FUSION, *LOADING, *INDEX, *RERANKING, *uses), instead)
    line.add("--database", type=Path, required=True, metavar="FOLDER", help="images, also in subfolders")
    line.add("--queries", type=Path, required=True, metavar="FOLDER|FILE", help="an image, or several")
    line.add_weights()
    line.add_flag("--depth", "MODEL.DEPTH", type=int, choices=(50, 101), help="layers of the ResNet encoder [50]")
    line.add_flag(
        "--max-pixels", "DATA_LOADER.MAX_PIXELS", type=int, metavar="N", help="skip images with more pixels [178956970]"
    )
    line.add("--index", type=milvus_uri, metavar="milvus:URI", help="keep the folder in Milvus, in a file or a server")
    line.add("--top", type=top, default=10, metavar="K", help=f"results per query, 1 to {SAVED_RANKS} [10]")
    line.add("--json", action="store_true", help="print JSON on stdout, and everything else on stderr")
    line.add("--report", action="store_true", help="write a page with the first 10 results of each query")
    parsed = line.parse(argv)
    if "cvnet" in parsed.cfg.TEST.RERANKER:
        raise InputError(f"TEST.RERANKER cvnet takes minutes per query; {truth}")
    if parsed.args.index and (parsed.cfg.TEST.INDEX or "dba" in parsed.cfg.TEST.RERANKER):
        taken = "TEST.INDEX" if parsed.cfg.TEST.INDEX else "TEST.RERANKER dba"
        raise InputError(f"--index and {taken} cannot be combined: leave one of them out")
    return parsed


def milvus_uri(text: str) -> str:
    kind, _, uri = text.partition(":")
    if kind != "milvus" or not uri:
        raise argparse.ArgumentTypeError(f"{text!r} is not milvus:FILE.db or milvus:http://HOST:PORT")
    return uri


def top(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= SAVED_RANKS:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 1 and {SAVED_RANKS}")
    return int(text)


def extract_folders(
    sets: Sequence[ImageSet],
    recipe: Recipe,
    device: torch.device,
    cfg: CfgNode,
    processes: Processes | None = None,
) -> list[Folder]:
    """Returns the readable images of each set, with their descriptors; the others are logged and skipped.

    Args:
        processes: the processes of a `torchrun`, which share the extraction; by default only this one.

    Raises:
        InputError: if none can be read.
    """
    folders = []
    extracted = extract(sets, recipe, cfg, device, processes, on_error="skip")
    for each, descriptors in zip(sets, extracted, strict=True):
        readable = descriptors.any(dim=1)  # an unreadable image has a row of zeros
        images = [each.images[i] for i in readable.nonzero().flatten().tolist()]
        bad = [_name(each.images[i], each.folder) for i in (~readable).nonzero().flatten().tolist()]
        if not images:
            problem = each.images[0].problem() or f"{each.images[0].path} has no descriptor"
            raise InputError(f"{each.title}: {problem}{' and more' if len(bad) > 1 else ''}")
        if bad:
            log.warning(
                "%s: %d of %d cannot be read and are skipped: %s",
                each.title, len(bad), len(descriptors), short_list(bad, _NAMED_AT_MOST),
            )  # fmt: skip
        folders.append(Folder(each.folder, images, descriptors[readable] if bad else descriptors, bad))
    return folders


class Result(NamedTuple):
    """A result of a query: its score and its cosine similarity, which differ after reranking."""

    rank: int
    file: str
    score: float
    cosine: float


def results(queries: Folder, database: Folder, final: Ranking, query: int, count: int) -> Iterator[Result]:
    ids = final.ids[query, :count]
    ids = ids[ids >= 0]  # an index may find fewer
    cosines = (database.descriptors[ids].double() @ queries.descriptors[query].double()).float()
    ranked = zip(ids.tolist(), final.scores[query, : len(ids)].tolist(), cosines.tolist(), strict=True)
    for rank, (number, score, cosine) in enumerate(ranked, start=1):
        yield Result(rank, database.name(number), round(score, 6), round(cosine, 6))


def section(queries: Folder, database: Folder, rankings: dict[str, Ranking]) -> Section:
    """Returns the section of the report: the queries in their order, with their results."""
    images = folder_dataset(database.root, database.images)
    shown = [
        Query(queries.name(row), image, first_hits(images, None, rankings, row))
        for row, image in enumerate(queries.images)
    ]
    return Section(images.name, shown, note=f"{len(shown)} queries, {len(database.images):,} images.")


def folder_dataset(folder: Path, images: Sequence[ImageFile]) -> Dataset:
    """Returns the images of a folder as a dataset without ground truth, in which each image is a query."""
    names = [_name(image, folder) for image in images]
    title = folder.resolve().name or str(folder)
    return Dataset(title, folder, images, images, [], (), "folder", names, names, np.arange(len(names)))


def _name(image: ImageFile, root: Path) -> str:
    return str(image.path.relative_to(root))


if __name__ == "__main__":
    run_command(main)
