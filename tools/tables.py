"""The paper's tables on this machine, as Markdown beside the published figures.

python -m tools.tables main
python -m tools.tables ablation MODEL.DEPTH 50
python -m tools.tables rerank TEST.DATASET_LIST "['roxford5k']" SupG.onemeval

main      ResNet-50 and ResNet-101, or the network of MODEL.NAME, with and without reranking and +1M distractors;
          with TEST.RERANKER cvnet, reranking by local features, too (hours to days, without +1M)
ablation  each of the four modules switched off, all of them, and reranking
rerank    reranking with other M, K and beta, one of them at a time

Rows come as they are done, and stand in TEST.OUT_DIR/runs/latest, too. Images are extracted once per
network and setting, for test.py, too; an interrupted table resumes. What is missing is said in its row.
"""

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from yacs.config import CfgNode

from assembly import (
    RERANKERS,
    Experiment,
    Output,
    find_dataset,
    make_output,
    make_recipe,
    make_rerankers,
    network_title,
    prepare,
    results_needed,
    start_device,
)
from config import ADVICE, CommandLine, Parsed, idle_options, make_config, plain, varied
from model.errors import InputError, run_command
from model.resnet import STAGE_DEPTHS
from modules.reranking import RERANK_BETA, RERANK_K, RERANK_M, Reranker, SuperGlobalReranker
from report.log import start_log
from revisitop import toy
from revisitop.evaluate import Metrics, evaluate
from revisitop.protocols import REVISITED_PROTOCOLS, Protocol
from revisitop.retrieve import rerank, retrieve

log = logging.getLogger(__name__)

MODULES = {"gemp": "GeM+", "rgem": "Regional-GeM", "sgem": "Scale-GeM", "relup": "ReLU+"}
PUBLISHED = ("M", "H")  # the protocols of which the paper has figures
SWEEP = {"m": (50, 100, 200, 400, 800, 1600), "k": (1, 3, 5, 9, 15, 25), "beta": (0.0, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0)}


@dataclass(frozen=True)
class Row:
    """A line of a table: metrics by protocol, the published figures in percent, and what is missing."""

    network: str
    dataset: str
    setting: str
    protocols: Sequence[Protocol]
    metrics: dict[str, Metrics] | None = None
    published: dict[str, float] | None = None
    note: str = ""

    def cells(self) -> list[str]:
        cells = [self.network, self.dataset, self.setting]
        for protocol in self.protocols:
            value = 100 * self.metrics[protocol.name].map if self.metrics else math.nan
            cells.append("" if math.isnan(value) else f"{value:.2f}")
            if protocol.name in PUBLISHED:
                known = (self.published or {}).get(protocol.name)
                cells.append("" if known is None else f"{known:.1f}")
                cells.append("" if known is None or math.isnan(value) else f"{value - known:+.2f}")
        return [*cells, self.note]


class Reranked(NamedTuple):
    """A row of reranking.

    Attributes:
        stage: its title.
        words: what sets the reranker apart from the others of the table.
        reranker: the reranker.
        method: M, K and beta of SuperGlobal's reranking; None for another reranker.
    """

    stage: str
    words: str
    reranker: Reranker
    method: tuple[int, int, float] | None


class Part(NamedTuple):
    """Rows that share a network and its descriptors.

    Attributes:
        cfg: the options of these rows.
        words: what sets the network apart from the others of the table.
        reranked: the rows of reranking, of an experiment.
    """

    cfg: CfgNode
    words: str
    reranked: Callable[[Experiment], list[Reranked]]


def main(argv: list[str]) -> None:
    args, cfg, _ = parse(argv)
    output = make_output(cfg)
    head = start_log(Path("log.txt"), plain(cfg), screen=sys.stderr)
    superglobal = varied(cfg, {"TEST.RERANKER": "superglobal"})  # it has its rows beside a rival's
    idle = set(idle_options(cfg)) & set(idle_options(superglobal if cfg.TEST.RERANKER != "none" else cfg))
    for line in sorted(idle):
        log.warning("%s", line)
    device = start_device(cfg, head)
    lines: list[str] = []
    missing, run = 0, None

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    for protocols, names in by_protocols(cfg).items():  # a table for each kind of dataset
        say("\n".join([""] * bool(lines) + heading(protocols)))
        for part in TABLES[args.task](cfg, args.depth or list(STAGE_DEPTHS)):
            for row in chain.from_iterable(rows(part, name, protocols, output, device) for name in names):
                missing += row.metrics is None
                say(markdown(row.cells()))
                run = run or output.new_run(f"{args.task}-{'+'.join(cfg.TEST.DATASET_LIST)}")
                (run / f"{args.task}.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
                output.publish(run)
    print(f"\nPublished: {published()['source']}.")
    if "toy" in cfg.TEST.DATASET_LIST:
        log.info("%s", toy.DISCLAIMER)
    if missing:
        log.info("rows that lack data, weights or distractors: %d; their notes say what to do", missing)


def parse(argv: list[str]) -> Parsed:
    line = CommandLine(__doc__, prog="python -m tools.tables")
    line.refuse({"TEST.FEATURES": "the tables extract the images themselves", "TEST.REPORT": "it is for test.py"})
    line.add("task", choices=TABLES, help="see above")
    line.add("--depth", type=int, action="append", choices=STAGE_DEPTHS, help="only this network's part of main [both]")
    args, assumed = line.read(argv), {}
    line.name = f"python -m tools.tables {args.task}"
    if args.task == "main":
        line.refuse({"MODEL.DEPTH": "main has both networks, and --depth", "SupG.onemeval": "main has both"})
        assumed["SupG.onemeval"] = True
    elif args.depth:
        raise InputError(f"--depth is for main; {args.task} takes MODEL.DEPTH {args.depth[0]}")
    parsed = line.config(args, assumed)
    if args.task == "rerank" and (parsed.cfg.TEST.RERANKER != "superglobal" or not parsed.cfg.SupG.rerank):
        raise InputError("rerank sweeps SuperGlobal's reranking: leave TEST.RERANKER and SupG.rerank as they are")
    return parsed


def main_table(cfg: CfgNode, depths: Sequence[int]) -> Iterator[Part]:
    rival = cfg.TEST.RERANKER == "cvnet"
    for depth in depths if cfg.MODEL.NAME == "cvnet" else [cfg.MODEL.DEPTH]:
        yield Part(varied(cfg, {"MODEL.DEPTH": depth}), "", chosen)
        changes = {"MODEL.DEPTH": depth, "SupG.onemeval": True} | ({"TEST.RERANKER": "superglobal"} if rival else {})
        yield Part(varied(cfg, changes), "", chosen)


def ablation_table(cfg: CfgNode, depths: Sequence[int]) -> Iterator[Part]:
    variants = {"": (), **{f"without {MODULES[name]}": (name,) for name in MODULES}, "without the four": tuple(MODULES)}
    for words, off in variants.items():
        changed = varied(cfg, {f"SupG.{name}": False for name in off})
        yield Part(changed, words, chosen)


def rerank_table(cfg: CfgNode, depths: Sequence[int]) -> Iterator[Part]:
    own = {"m": cfg.SupG.rerank_m, "k": cfg.SupG.rerank_k, "beta": cfg.SupG.rerank_beta}
    methods = []
    for name, values in SWEEP.items():
        for value in sorted({*values, own[name]}):
            method = tuple({**own, name: value}.values())
            if method[1] <= method[0] and method not in methods:
                methods.append(method)
    sweep = [
        Reranked("reranking", f"M = {m}, K = {k}, beta = {beta:g}", SuperGlobalReranker(m, k, beta), (m, k, beta))
        for m, k, beta in methods
    ]
    yield Part(cfg, "", lambda experiment: sweep)


def chosen(experiment: Experiment) -> list[Reranked]:
    """What TEST.RERANKER names; before a rival of SuperGlobal's reranking, that."""
    cfg, name, device = experiment.cfg, experiment.cfg.TEST.RERANKER, experiment.device
    own = varied(cfg, {"TEST.RERANKER": "superglobal"})
    method = (cfg.SupG.rerank_m, cfg.SupG.rerank_k, cfg.SupG.rerank_beta)
    found = []
    if name != "none":
        usual = make_rerankers(own, experiment.subject, device)
        found = [Reranked(stage, "", each, method) for stage, each in usual.items()]
    if name not in ("none", "superglobal"):
        rivals = experiment.rerankers.items()
        found += [Reranked(stage, RERANKERS[name].title, each, None) for stage, each in rivals]
    return found


def by_protocols(cfg: CfgNode) -> dict[tuple[Protocol, ...], list[str]]:
    """The datasets by the protocols that judge them; one that cannot be read is with the revisited ones."""
    tables: dict[tuple[Protocol, ...], list[str]] = {}
    for name in cfg.TEST.DATASET_LIST:
        try:
            protocols = find_dataset(cfg, name).protocols
        except InputError:  # its rows will say so
            protocols = REVISITED_PROTOCOLS
        tables.setdefault(protocols, []).append(name)
    return tables


def heading(protocols: Sequence[Protocol]) -> list[str]:
    """The first two lines of a table."""
    cells = ["network", "dataset", "setting"]
    for protocol in protocols:
        usual = protocol in REVISITED_PROTOCOLS
        cells.append(protocol.title if usual else f"{protocol.measure.title} {protocol.title}")
        cells += ["published", "difference"] if protocol.name in PUBLISHED else []
    return [markdown([*cells, "note"]), markdown(["---"] * (len(cells) + 1))]


def rows(part: Part, name: str, protocols: Sequence[Protocol], output: Output, device: torch.device) -> Iterator[Row]:
    """A row of retrieval and one per reranker, all from one search; or one that says what is missing."""
    cfg = part.cfg

    def setting(stage: str, words: str = "") -> str:
        return ", ".join(filter(None, [stage, part.words, words, "+1M" if cfg.SupG.onemeval else ""]))

    try:
        experiment = prepare(cfg, name, output, device)
        queries, database = experiment.descriptors(cfg.TEST.RESUME)
    except InputError as error:
        reranks = cfg.TEST.RERANKER not in ("none", "superglobal") or (cfg.TEST.RERANKER != "none" and cfg.SupG.rerank)
        stages = "retrieval, reranking" if reranks else "retrieval"
        yield Row(network_title(cfg), name, setting(stages), protocols, note=error.in_options(ADVICE))
        return
    reranked, truth = part.reranked(experiment), experiment.dataset.ground_truth
    needed = results_needed(each.reranker for each in reranked)
    searched = retrieve(queries, database, needed, experiment.dataset.listed, device)
    known = find_published(cfg, name, "retrieval")
    whitening = experiment.facts().get("whitening", {})
    note = "whitening learnt on this database itself" if whitening.get("learnt_on_the_test_set") else ""
    yield Row(
        network_title(cfg), name, setting("retrieval"), protocols, evaluate(searched, truth, protocols), known, note
    )
    for stage, words, reranker, method in reranked:
        metrics = evaluate(rerank(searched, reranker, queries, database, device), truth, protocols)
        known = find_published(cfg, name, "reranking", method)
        yield Row(network_title(cfg), name, setting(stage, words), protocols, metrics, known, note)


@cache
def published() -> dict:
    path = Path(toy.__file__).with_name("published.json")
    return json.loads(path.read_text(encoding="utf-8"))


def find_published(
    cfg: CfgNode, name: str, stage: str, method: tuple[int, int, float] | None = None
) -> dict[str, float] | None:
    """Returns the paper's figures, for the paper's settings alone (in any precision).

    Args:
        stage: retrieval or reranking.
        method: M, K and beta of a reranking; None for another reranker, which has none.
    """
    usual = make_config([("MODEL.DEPTH", cfg.MODEL.DEPTH), ("TEST.PRECISION", cfg.TEST.PRECISION)])
    anywhere = Path()
    if make_recipe(cfg, anywhere) != make_recipe(usual, anywhere):
        return None
    if stage == "reranking" and method != (RERANK_M, RERANK_K, RERANK_BETA):
        return None
    wanted = {"depth": cfg.MODEL.DEPTH, "stage": stage, "distractors": cfg.SupG.onemeval}
    return next((entry.get(name) for entry in published()["figures"] if wanted.items() <= entry.items()), None)


def markdown(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


TABLES = {"main": main_table, "ablation": ablation_table, "rerank": rerank_table}

if __name__ == "__main__":
    run_command(main, ADVICE)
