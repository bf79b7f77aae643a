"""The paper's tables on this machine, as Markdown beside the published figures.

python -m revisitop.tables main
python -m revisitop.tables ablation MODEL.DEPTH 50
python -m revisitop.tables rerank TEST.DATASET_LIST "['roxford5k']" SupG.onemeval

main      ResNet-50 and ResNet-101, with and without reranking, with and without +1M distractors;
          with TEST.RERANKER cvnet, reranking by local features, too (hours to days, without +1M)
ablation  each of the four modules switched off, all of them, and reranking
rerank    reranking with other M, K and beta, one of them at a time

Rows come as they are done. Pictures are described once per network and setting, into
TEST.OUT_DIR/tables; an interrupted table goes on there. What is missing is said in its row.
"""

import argparse
import json
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from yacs.config import CfgNode

from config import (
    describe_arguments,
    descriptor_source,
    make_config,
    make_parser,
    make_reranker,
    model_arguments,
    read_config,
)
from model.errors import InputError, run_command
from model.extract import choose_device, prepare_process
from model.resnet import STAGE_DEPTHS
from modules.reranking import SuperGlobalReranker
from modules.search import Database
from revisitop import toy
from revisitop.dataset import Dataset
from revisitop.evaluate import PROTOCOLS, Result
from revisitop.features import add_distractors, check_distractors, find_distractors, load_distractors
from revisitop.run import dataset_lists, describe_lists, find_dataset, find_weights, make_folder, retrieve
from revisitop.runlog import start_log

log = logging.getLogger(__name__)

MODULES = {"gemp": "GeM+", "rgem": "Regional-GeM", "sgem": "Scale-GeM", "relup": "ReLU+"}
SWEEP = {"m": (50, 100, 200, 400, 800, 1600), "k": (1, 3, 5, 9, 15, 25), "beta": (0.0, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0)}
HEAD = (
    *("network", "dataset", "setting", "Easy"),
    *("Medium", "published", "difference", "Hard", "published", "difference", "note"),
)


@dataclass(frozen=True)
class Row:
    """A line of a table: figures in percent by protocol, the published ones, and what is missing."""

    depth: int
    dataset: str
    setting: str
    figures: dict[str, Result] | None = None
    published: dict[str, float] | None = None
    note: str = ""

    def cells(self) -> list[str]:
        cells = [f"R{self.depth}", self.dataset, self.setting]
        for protocol in PROTOCOLS:
            value = 100 * self.figures[protocol].map if self.figures else math.nan
            cells.append("" if math.isnan(value) else f"{value:.2f}")
            if protocol != "E":
                known = (self.published or {}).get(protocol)
                cells.append("" if known is None else f"{known:.1f}")
                cells.append("" if known is None or math.isnan(value) else f"{value - known:+.2f}")
        return [*cells, self.note]


def main(argv: list[str]) -> None:
    args = parse(argv)
    cfg = read_config(args)
    if cfg.TEST.FEATURES:
        raise InputError("TEST.FEATURES is for test.py; the tables describe the pictures themselves")
    folder = Path(cfg.TEST.OUT_DIR) / "tables"
    make_folder(folder)
    start_log(Path("log.txt"), cfg, screen=sys.stderr)
    prepare_process(choose_device(cfg.TEST.DEVICE))
    lines = [markdown(HEAD), markdown(["---"] * len(HEAD))]
    print("\n".join(lines), flush=True)
    missing = 0
    for row in TABLES[args.task](args):
        missing += row.figures is None
        lines.append(markdown(row.cells()))
        print(lines[-1], flush=True)
        (folder / f"{args.task}.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(f"\nPublished: {published()['source']}.")
    if "toy" in cfg.TEST.DATASET_LIST:
        log.info("%s", toy.DISCLAIMER)
    if missing:
        log.info("%d rows lack data or weights, see their notes; python -m revisitop.download --help", missing)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = make_parser(__doc__, "python -m revisitop.tables", TABLES)
    parser.add_argument(
        "--depth", type=int, action="append", choices=STAGE_DEPTHS, help="only this network's part of main [both]"
    )
    return parser.parse_intermixed_args(argv)


def main_table(args: argparse.Namespace) -> Iterator[Row]:
    for depth in args.depth or STAGE_DEPTHS:
        for distractors in (False, True):
            cfg = read_config(args, ("MODEL.DEPTH", depth), ("SupG.onemeval", distractors))
            for dataset in cfg.TEST.DATASET_LIST:
                rival = cfg.TEST.RERANKER == "cvnet" and not distractors
                yield from evaluate(cfg, dataset, f"R{depth}", {"": default_reranker(cfg)}, rival=rival)


def ablation_table(args: argparse.Namespace) -> Iterator[Row]:
    cfg = read_config(args)
    variants = {"": {}, **{f"without {MODULES[name]}": {name: False} for name in MODULES}}
    variants["without the four"] = dict.fromkeys(MODULES, False)
    for dataset in cfg.TEST.DATASET_LIST:
        for title, switched in variants.items():
            changed = read_config(args, *((f"SupG.{name}", value) for name, value in switched.items()))
            place = "-".join([f"R{cfg.MODEL.DEPTH}", *(f"no_{name}" for name in switched)])
            yield from evaluate(changed, dataset, place, {"": default_reranker(changed)}, title)


def rerank_table(args: argparse.Namespace) -> Iterator[Row]:
    cfg = read_config(args)
    own = {"m": cfg.SupG.rerank_m, "k": cfg.SupG.rerank_k, "beta": cfg.SupG.rerank_beta}
    rerankers = {}
    for name, values in SWEEP.items():
        for value in sorted({*values, own[name]}):
            settings = {**own, name: value}
            if settings["k"] <= settings["m"]:
                rerankers["M = {m}, K = {k}, beta = {beta:g}".format(**settings)] = SuperGlobalReranker(**settings)
    for dataset in cfg.TEST.DATASET_LIST:
        yield from evaluate(cfg, dataset, f"R{cfg.MODEL.DEPTH}", rerankers)


def default_reranker(cfg: CfgNode) -> SuperGlobalReranker:
    return SuperGlobalReranker(cfg.SupG.rerank_m, cfg.SupG.rerank_k, cfg.SupG.rerank_beta)


def evaluate(
    cfg: CfgNode,
    name: str,
    place: str,
    rerankers: dict[str, SuperGlobalReranker],
    network: str = "",
    rival: bool = False,
) -> Iterator[Row]:
    """A row of retrieval and one per reranker, or one that says what is missing.

    Args:
        cfg: of these rows.
        name: of the dataset.
        place: the folder of descriptors.
        rerankers: by what sets them apart.
        network: what sets it apart.
        rival: whether reranking by local features has rows, too.
    """
    depth, device = cfg.MODEL.DEPTH, choose_device(cfg.TEST.DEVICE)

    def setting(stage: str, reranker: str = "") -> str:
        return ", ".join(filter(None, [stage, network, reranker, "+1M" if cfg.SupG.onemeval else ""]))

    folder = Path(cfg.TEST.OUT_DIR) / "tables" / place
    try:
        prepared = prepare(cfg, name, folder, device)
    except InputError as error:
        yield Row(depth, name, setting("retrieval, reranking"), note=str(error))
        return
    ranked = (prepared.queries, prepared.database, prepared.dataset.ground_truth)
    for number, (words, reranker) in enumerate(rerankers.items()):
        stages = retrieve(*ranked, reranker, device)
        if number == 0:
            known = find_published(cfg, name, "retrieval", reranker)
            yield Row(depth, name, setting("retrieval"), stages["retrieval"].figures, known)
        known = find_published(cfg, name, "reranking", reranker)
        yield Row(depth, name, setting("reranking", words), stages["reranking"].figures, known)
    if rival:
        made_from = (prepared.checkpoint, prepared.source, folder, device)
        stages = retrieve(*ranked, make_reranker(cfg, prepared.dataset, (), *made_from), device)
        for stage, ranking in stages.items():
            if stage != "retrieval":
                yield Row(depth, name, setting(stage, "CVNet-Rerank"), ranking.figures)


@dataclass(frozen=True)
class Prepared:
    """A dataset, described."""

    dataset: Dataset
    queries: Tensor
    database: Database
    checkpoint: Path
    source: dict


def prepare(cfg: CfgNode, name: str, folder: Path, device: torch.device) -> Prepared:
    """Raises InputError where something is missing, before the long work."""
    dataset = find_dataset(name, Path(cfg.TEST.DATA_DIR))
    dataset.check_files()
    checkpoint = find_weights(dataset, Path(cfg.TEST.WEIGHTS), cfg.MODEL.DEPTH)
    source = descriptor_source(cfg, checkpoint)
    distractors = None
    if cfg.SupG.onemeval:
        path = find_distractors(cfg.TEST.DISTRACTORS, cfg.MODEL.DEPTH)
        distractors = load_distractors(path)
        check_distractors(path, source)
    make_folder(folder)
    queries, rows = describe_lists(
        dataset_lists(dataset, folder), **describe_arguments(cfg, checkpoint, source, device)
    )
    database = Database(rows) if distractors is None else add_distractors(rows, distractors)
    return Prepared(dataset, queries, database, checkpoint, source)


@cache
def published() -> dict:
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def find_published(cfg: CfgNode, name: str, stage: str, reranker: SuperGlobalReranker) -> dict[str, float] | None:
    """The paper's figures, for the paper's settings alone (in any precision)."""
    usual = make_config([("MODEL.DEPTH", cfg.MODEL.DEPTH), ("TEST.PRECISION", cfg.TEST.PRECISION)])
    same_reranker = repr(reranker) == repr(default_reranker(usual))
    if model_arguments(cfg) != model_arguments(usual) or (stage == "reranking" and not same_reranker):
        return None
    wanted = {"depth": cfg.MODEL.DEPTH, "stage": stage, "distractors": cfg.SupG.onemeval}
    return next((entry.get(name) for entry in published()["figures"] if wanted.items() <= entry.items()), None)


def markdown(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


TABLES = {"main": main_table, "ablation": ablation_table, "rerank": rerank_table}

if __name__ == "__main__":
    run_command(main)
