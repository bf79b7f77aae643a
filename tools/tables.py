"""Reproduce the paper's tables on this machine, as Markdown, beside the published numbers.

python -m tools.tables main
python -m tools.tables ablation MODEL.DEPTH 50
python -m tools.tables rerank TEST.DATASET_LIST "['roxford5k']" SupG.onemeval
python -m tools.tables rerankers TEST.DATASET_LIST "['roxford5k']"

main       ResNet-50 and ResNet-101, or the network of MODEL.NAME, with and without reranking and +1M distractors;
           with TEST.RERANKER cvnet also reranking by local features (hours to days, without +1M)
ablation   each of the four modules switched off, all four off, and reranking with both forms of S2
rerank     reranking with other values of M, K and beta, one at a time
rerankers  SuperGlobal's reranking and the alternatives, or those of TEST.RERANKER: metrics, time, memory, bytes

Rows are printed as they are finished, and saved in TEST.OUT_DIR/runs/latest. Images are extracted once per network and
setting, shared with test.py; an interrupted table is resumed. A row says what it is missing.
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
    STAGES,
    Experiment,
    Output,
    Subject,
    find_dataset,
    make_output,
    make_recipe,
    make_stages,
    network_title,
    prepare,
    start_device,
)
from config import ADVICE, RERANKER_NAMES, CommandLine, Parsed, idle_options, make_config, plain, varied
from cvnet_rerank.pair_scores import map_bytes
from extraction.processes import Processes
from model.device import PeakMemory
from model.errors import InputError, run_command
from model.resnet import STAGE_DEPTHS
from modules.reranking import RERANK_BETA, RERANK_K, RERANK_M, SuperGlobalReranker
from modules.search import Database
from report.log import start_log
from report.results import markdown
from revisitop import toy
from revisitop.evaluate import Metrics, evaluate
from revisitop.index import FaissDatabase
from revisitop.protocols import REVISITED_PROTOCOLS, Protocol
from revisitop.retrieve import Ranking
from revisitop.stages import Reranked, Stage, search_for

log = logging.getLogger(__name__)

MODULES = {"gemp": "GeM+", "rgem": "Regional-GeM", "sgem": "Scale-GeM", "relup": "ReLU+"}
COSTS = ("ms per query", "peak memory, MB", "bytes per image")
PUBLISHED = ("M", "H")  # the protocols for which the paper has results
GLOBAL = tuple(name for name in RERANKER_NAMES if name != "cvnet")  # the default rerankers of the table rerankers
SWEEP = {
    "m": (50, 100, 200, 400, 800, 1600),
    "k": (1, 3, 5, 9, 15, 25),
    "beta": (0.0, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0),
    "s2": ("refined", "original"),
}


@dataclass(frozen=True)
class Row:
    """A row of a table: metrics by protocol, the published numbers in percent, and a note about what is missing."""

    network: str
    dataset: str
    setting: str
    protocols: Sequence[Protocol]
    metrics: dict[str, Metrics] | None = None
    published: dict[str, float] | None = None
    note: str = ""
    costs: tuple[str, ...] = ()

    def cells(self, with_costs: bool) -> list[str]:
        cells = [self.network, self.dataset, self.setting]
        for protocol in self.protocols:
            value = 100 * self.metrics[protocol.name].map if self.metrics else math.nan
            cells.append("" if math.isnan(value) else f"{value:.2f}")
            if protocol.name in PUBLISHED and not with_costs:
                known = (self.published or {}).get(protocol.name)
                cells.append("" if known is None else f"{known:.1f}")
                cells.append("" if known is None or math.isnan(value) else f"{value - known:+.2f}")
        if with_costs:
            cells += self.costs or [""] * len(COSTS)
        return [*cells, self.note]


class Variant(NamedTuple):
    """A row with reranking.

    Attributes:
        title: the title of its stage.
        words: what distinguishes it from the other rows of the table.
        stage: the stage that reranks.
        method: M, K, beta and S2 of SuperGlobal's reranking; None for another reranker.
        bytes_kept: bytes per image beside its descriptor.
    """

    title: str
    words: str
    stage: Stage
    method: tuple[int, int, float, str] | None = None
    bytes_kept: int = 0


class Part(NamedTuple):
    """Rows with the same network and descriptors.

    Attributes:
        cfg: the options of these rows.
        words: what distinguishes the network from the others of the table.
        variants: returns the rows with reranking for an experiment.
    """

    cfg: CfgNode
    words: str
    variants: Callable[[Experiment], list[Variant]]


def main(argv: list[str]) -> None:
    args, cfg, _ = parse(argv)
    table, output, processes = TABLES[args.task], make_output(cfg), Processes()
    first = processes.rank == 0
    head = start_log(Path("log.txt"), plain(cfg), screen=sys.stderr) if first else {}
    for line in idle_options(cfg) if first else ():
        log.warning("%s", line)
    device = start_device(cfg, head, processes.local)
    lines: list[str] = []
    missing, run = 0, None

    def say(line: str) -> None:
        if not first:
            return
        lines.append(line)
        print(line, flush=True)

    for protocols, names in by_protocols(cfg).items():  # a table per kind of dataset
        say("\n".join([""] * bool(lines) + heading(protocols, table.costs)))
        for part in table.parts(cfg, args.depth or list(STAGE_DEPTHS)):
            for row in chain.from_iterable(rows(part, name, protocols, output, device, processes) for name in names):
                missing += row.metrics is None
                say(markdown(row.cells(table.costs)))
                run = run or output.new_run(f"{args.task}-{'+'.join(cfg.TEST.DATASET_LIST)}")
                (run / f"{args.task}.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
                output.publish(run)
    processes.end()
    if not first:
        return
    if table.costs:
        print(f"\n{costs_explained(cfg, device)}")
    else:
        print(f"\nPublished: {published()['source']}.")
    if "toy" in cfg.TEST.DATASET_LIST:
        log.info("%s", toy.DISCLAIMER)
    if missing:
        log.info("rows without data, weights or distractors: %d; see their notes", missing)


def parse(argv: list[str]) -> Parsed:
    line = CommandLine(__doc__, prog="python -m tools.tables")
    line.refuse({"TEST.FEATURES": "the tables extract the images themselves", "TEST.REPORT": "use test.py"})
    line.add("task", choices=TABLES, help="the table, see above")
    line.add("--depth", type=int, action="append", choices=STAGE_DEPTHS, help="only this part of main [both]")
    args, assumed = line.read(argv), {}
    line.name += f" {args.task}"
    if args.task == "main":
        line.refuse({"MODEL.DEPTH": "main has both networks; use --depth", "SupG.onemeval": "main has both"})
        assumed["SupG.onemeval"] = True
    elif args.depth:
        raise InputError(f"--depth is for main; {args.task} takes MODEL.DEPTH {args.depth[0]}")
    if args.task == "rerankers":
        assumed["TEST.RERANKER"] = list(GLOBAL)
    parsed = line.config(args, assumed)
    if assumed.get("TEST.RERANKER") and parsed.cfg.TEST.INDEX:
        assumed["TEST.RERANKER"].remove("dba")  # dba replaces all rows, so that an index would not fit
    cfg = parsed.cfg
    if args.task == "rerank" and (cfg.TEST.RERANKER != ["superglobal"] or not cfg.SupG.rerank):
        raise InputError("rerank varies SuperGlobal's reranking: leave TEST.RERANKER and SupG.rerank at their defaults")
    if args.task == "rerankers" and "TEST.RERANKER" not in parsed.given:
        parsed = parsed._replace(cfg=varied(cfg, assumed))
    elif set(cfg.TEST.RERANKER) - {"none", "superglobal"} and "superglobal" not in cfg.TEST.RERANKER:
        parsed = parsed._replace(cfg=varied(cfg, {"TEST.RERANKER": ["superglobal", *cfg.TEST.RERANKER]}))
    return parsed


def main_table(cfg: CfgNode, depths: Sequence[int]) -> Iterator[Part]:
    fast = [name for name in cfg.TEST.RERANKER if name not in ("cvnet", "dba")]  # the others take days with +1M
    for depth in depths if cfg.MODEL.NAME == "cvnet" else [cfg.MODEL.DEPTH]:
        yield Part(varied(cfg, {"MODEL.DEPTH": depth}), "", chosen)
        changes = {"MODEL.DEPTH": depth, "SupG.onemeval": True, "TEST.RERANKER": fast or ["none"]}
        yield Part(varied(cfg, changes), "", chosen)


def ablation_table(cfg: CfgNode, depths: Sequence[int]) -> Iterator[Part]:
    variants = {"": (), **{f"without {MODULES[name]}": (name,) for name in MODULES}, "without the four": tuple(MODULES)}
    for words, off in variants.items():
        changed = varied(cfg, {f"SupG.{name}": False for name in off})
        yield Part(changed, words, chosen if off else both_readings)


def rerank_table(cfg: CfgNode, depths: Sequence[int]) -> Iterator[Part]:
    own = dict(zip(SWEEP, superglobal_method(cfg), strict=True))
    methods = []
    for name, values in SWEEP.items():
        for value in values if own[name] in values else sorted({*values, own[name]}):
            method = tuple({**own, name: value}.values())
            if method[1] <= method[0] and method not in methods:
                methods.append(method)
    sweep = [
        Variant("reranking", in_words(*method), Reranked(SuperGlobalReranker(*method)), method) for method in methods
    ]
    yield Part(cfg, "", lambda experiment: sweep)


def rerankers_table(cfg: CfgNode, depths: Sequence[int]) -> Iterator[Part]:
    yield Part(cfg, "", both_readings)


def superglobal_method(cfg: CfgNode) -> tuple[int, int, float, str]:
    return cfg.SupG.rerank_m, cfg.SupG.rerank_k, cfg.SupG.rerank_beta, cfg.SupG.rerank_s2


def in_words(m: int, k: int, beta: float, s2: str) -> str:
    return f"M = {m}, K = {k}, beta = {beta:g}{', S2 of the original rows' if s2 == 'original' else ''}"


def chosen(experiment: Experiment) -> list[Variant]:
    """Returns the rows of TEST.RERANKER; that of SuperGlobal has the usual title, the others their own."""
    variants = []
    for name in experiment.cfg.TEST.RERANKER:
        own = varied(experiment.cfg, {"TEST.RERANKER": [name]})
        stages = make_stages(own, experiment.subject, experiment.device)
        if name == "superglobal":
            variants += [Variant(title, "", stage, superglobal_method(own)) for title, stage in stages.items()]
        else:
            kept = map_bytes(experiment.subject.database) if name == "cvnet" else 0
            words = STAGES[name].title if name in STAGES else ""
            variants += [Variant(title, words, stage, bytes_kept=kept) for title, stage in stages.items()]
    return variants


def both_readings(experiment: Experiment) -> list[Variant]:
    """Returns these rows, and after SuperGlobal's the one with the other form of S2."""
    variants = []
    for each in chosen(experiment):
        variants.append(each)
        if each.method is not None:
            *method, s2 = each.method
            other = (*method, "original" if s2 == "refined" else "refined")
            words = f"S2 of the {other[-1]} rows"
            variants.append(Variant(each.title, words, Reranked(SuperGlobalReranker(*other)), other))
    return variants


def by_protocols(cfg: CfgNode) -> dict[tuple[Protocol, ...], list[str]]:
    """Returns the datasets grouped by their protocols; unreadable ones are grouped with the revisited ones."""
    tables: dict[tuple[Protocol, ...], list[str]] = {}
    for name in cfg.TEST.DATASET_LIST:
        try:
            protocols = find_dataset(cfg, name).protocols
        except InputError:  # its rows report this
            protocols = REVISITED_PROTOCOLS
        tables.setdefault(protocols, []).append(name)
    return tables


def heading(protocols: Sequence[Protocol], costs: bool) -> list[str]:
    """Returns the first two lines of a table, with columns for the costs or for the published numbers."""
    cells = ["network", "dataset", "setting"]
    for protocol in protocols:
        usual = protocol in REVISITED_PROTOCOLS
        cells.append(protocol.title if usual else f"{protocol.measure.title} {protocol.title}")
        cells += ["published", "difference"] if protocol.name in PUBLISHED and not costs else []
    cells += COSTS if costs else ()
    return [markdown([*cells, "note"]), markdown(["---"] * (len(cells) + 1))]


def rows(
    part: Part, name: str, protocols: Sequence[Protocol], output: Output, device: torch.device, processes: Processes
) -> Iterator[Row]:
    """Yields a row for retrieval and one per reranker, from a single search; or a row that says what is missing.

    The processes of a `torchrun` share extraction and search; only the first one yields rows.
    """
    cfg = part.cfg

    def setting(stage: str, words: str = "") -> str:
        return ", ".join(filter(None, [stage, part.words, words, "+1M" if cfg.SupG.onemeval else ""]))

    try:
        with processes.agreeing():
            experiment = prepare(cfg, name, output, device)
            if processes.count == 1:
                queries, database = experiment.descriptors()
    except InputError as error:
        if processes.rank > 0:
            return
        reranks = set(cfg.TEST.RERANKER) - ({"none"} if cfg.SupG.rerank else {"none", "superglobal"})
        stages = "retrieval, reranking" if reranks else "retrieval"
        yield Row(network_title(cfg), name, setting(stages), protocols, note=error.in_options(ADVICE))
        return
    if processes.count > 1:  # an error in only one of them, such as a damaged image, ends all of them
        queries, database = experiment.descriptors(processes)
    variants, truth = part.variants(experiment), experiment.dataset.ground_truth
    stages = [each.stage for each in variants]
    with PeakMemory(device) as peak:
        searched = search_for(stages, queries, database, experiment.dataset.listed, device, processes)
    if processes.rank > 0:
        return
    known = find_published(cfg, name, "retrieval")
    whitening = experiment.facts().get("whitening", {})
    note = "whitening learnt on this database itself" if whitening.get("learnt_on_the_test_set") else ""
    yield Row(
        network_title(cfg), name, setting("retrieval"), protocols, evaluate(searched.ranking, truth, protocols), known,
        note, costs_of(searched.ranking, peak, bytes_per_row(database)),
    )  # fmt: skip
    for title, words, stage, method, bytes_kept in variants:
        with PeakMemory(device) as peak:
            ranking = stage(searched)
        metrics = evaluate(ranking, truth, protocols)
        known = find_published(cfg, name, "reranking", method)
        once = f"{ranking.once:.1f} s once for the database" if ranking.once else ""
        yield Row(
            network_title(cfg), name, setting(title, words), protocols, metrics, known,
            ", ".join(filter(None, [note, once])), costs_of(ranking, peak, bytes_per_row(database) + bytes_kept),
        )  # fmt: skip


def bytes_per_row(database: Database) -> int:
    """Returns the bytes of a float32 descriptor and its share of an index; only the latter if rows are decoded."""
    if not isinstance(database, FaissDatabase):
        return 4 * database.dim
    own = 0 if database.decoded else 4 * database.dim
    return own + round(database.size / len(database))


def costs_of(ranking: Ranking, peak: PeakMemory, bytes_kept: int) -> tuple[str, ...]:
    """Returns the cells of COSTS."""
    memory = "" if peak.bytes is None else f"{peak.bytes / 1e6:.0f}"
    return f"{1000 * ranking.seconds / len(ranking.ids):.1f}", memory, f"{bytes_kept:,}"


def costs_explained(cfg: CfgNode, device: torch.device) -> str:
    """Returns a text about what each row reorders, and about the meaning of the costs."""
    subject = Subject(None, (), (), 0, None, Path())
    lines = []
    for name in cfg.TEST.RERANKER:
        if name in STAGES and name != "cvnet":
            for stage in make_stages(varied(cfg, {"TEST.RERANKER": [name]}), subject, device).values():
                lines.append(f"{STAGES[name].title}: {stage.shortlist}.")
        elif name == "cvnet":
            lines.append(f"{STAGES[name].title}: the first results that a protocol does not ignore, as published.")
    lines.append("Times are those of the stage only, after the search; memory is what it used in addition.")
    lines.append("Bytes include a float32 descriptor and everything else that is kept of an image.")
    return "\n".join(lines)


@cache
def published() -> dict:
    path = Path(toy.__file__).with_name("published.json")
    return json.loads(path.read_text(encoding="utf-8"))


def find_published(
    cfg: CfgNode, name: str, stage: str, method: tuple[int, int, float, str] | None = None
) -> dict[str, float] | None:
    """Returns the paper's numbers, which apply only to the paper's settings and exact search (in any precision).

    Args:
        stage: retrieval or reranking.
        method: M, K, beta and S2 of a reranking; None for another reranker, which has no published numbers.
    """
    usual = make_config([("MODEL.DEPTH", cfg.MODEL.DEPTH), ("TEST.PRECISION", cfg.TEST.PRECISION)])
    anywhere = Path()
    if make_recipe(cfg, anywhere) != make_recipe(usual, anywhere) or cfg.TEST.INDEX:
        return None
    if stage == "reranking" and method != (RERANK_M, RERANK_K, RERANK_BETA, "refined"):
        return None
    wanted = {"depth": cfg.MODEL.DEPTH, "stage": stage, "distractors": cfg.SupG.onemeval}
    return next((entry.get(name) for entry in published()["figures"] if wanted.items() <= entry.items()), None)


class Table(NamedTuple):
    """A kind of table.

    Attributes:
        parts: returns its parts, given the options and the depths of the networks.
        costs: whether it has columns for time and memory instead of published numbers.
    """

    parts: Callable[[CfgNode, Sequence[int]], Iterator[Part]]
    costs: bool = False


TABLES = {
    "main": Table(main_table),
    "ablation": Table(ablation_table),
    "rerank": Table(rerank_table),
    "rerankers": Table(rerankers_table, costs=True),
}

if __name__ == "__main__":
    run_command(main, ADVICE)
