"""Reproduce the paper's tables on this machine, as Markdown, beside the published numbers.

python -m tools.tables main
python -m tools.tables ablation MODEL.DEPTH 50
python -m tools.tables rerank TEST.DATASET_LIST "['roxford5k']" SupG.onemeval
python -m tools.tables rerankers TEST.DATASET_LIST "['roxford5k']"

main       ResNet-50 and ResNet-101, or the network of MODEL.NAME, with and without reranking and +1M distractors, or
           only those of MODEL.DEPTH and SupG.onemeval, if they are given; with TEST.RERANKER cvnet also reranking by
           local features (hours to days, without +1M)
ablation   each of the four modules switched off, all four off, and reranking with both forms of S2
rerank     reranking with other values of M, K and beta, one at a time
rerankers  SuperGlobal's reranking and the alternatives, or those of TEST.RERANKER: metrics, time, memory, bytes

Rows are printed as they are finished, and saved in TEST.OUT_DIR/runs/latest. Images are extracted once per network and
setting, shared with test.py; an interrupted table is resumed. A row says what it is missing.
"""

import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from yacs.config import CfgNode

from assembly import (
    RERANKERS,
    Session,
    Variant,
    find_dataset,
    make_stages,
    network_title,
    prepare,
    prepare_variants,
    rankings_of,
    small_set_advice,
    start_session,
)
from config import FUSION, INDEX, NETWORK, RERANKING, CommandLine, Parsed, active_rerankers, as_words, varied
from cvnet_rerank.pair_scores import map_bytes
from model.cvnet import STAGE_DEPTHS
from model.errors import InputError
from report.command import run_command
from report.results import at_k_in_words, markdown_table
from revisitop import toy
from revisitop.evaluate import Metrics
from revisitop.index import FaissDatabase
from revisitop.protocols import REVISITED_PROTOCOLS, Protocol
from revisitop.published import find_figures, nearest_reproduction, published

log = logging.getLogger(__name__)

MODULES = {"gemp": "GeM+", "rgem": "Regional-GeM", "sgem": "Scale-GeM", "relup": "ReLU+"}
COSTS = ("ms per query", "peak memory, MB", "bytes per image")
PUBLISHED = ("M", "H")  # the protocols for which the paper has results
GLOBAL = [name for name in RERANKERS if name != "cvnet"]  # the default rerankers of the table rerankers
SWEEP = {
    "m": (50, 100, 200, 400, 800, 1600),
    "k": (1, 3, 5, 9, 15, 25),
    "beta": (0.0, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0),
    "s2": ("refined", "original"),
}


@dataclass(frozen=True)
class Row:
    """A row of a table: metrics by protocol, the published numbers in percent, and a note about what is missing.

    Attributes:
        reproduced: beside published numbers, the independent reproduction of each that is nearest.
    """

    network: str
    dataset: str
    setting: str
    protocols: Sequence[Protocol]
    metrics: dict[str, Metrics] | None = None
    published: dict[str, float] = field(default_factory=dict)
    note: str = ""
    costs: tuple[str, ...] = ("",) * len(COSTS)
    reproduced: dict[str, float] = field(default_factory=dict)

    def cells(self, with_costs: bool, with_reproductions: bool = False) -> Iterator[tuple[str, str]]:
        """Yields the title of each column, and the text in it; costs replace the published numbers."""
        yield from (("network", self.network), ("dataset", self.dataset), ("setting", self.setting))
        for protocol in self.protocols:
            value = 100 * self.metrics[protocol.name].main if self.metrics else math.nan
            metric = "" if protocol in REVISITED_PROTOCOLS else f"{protocol.measure.main_title} "
            yield f"{metric}{protocol.title}", "" if math.isnan(value) else f"{value:.2f}"
            if protocol.name in PUBLISHED and not with_costs:
                known = self.published.get(protocol.name)
                yield "published", "" if known is None else f"{known:.1f}"
                yield "difference", "" if known is None or math.isnan(value) else f"{value - known:+.2f}"
                if with_reproductions:
                    nearest = self.reproduced.get(protocol.name)
                    yield "reproduced by others", "" if nearest is None else f"{nearest:.2f}"
        if with_costs:
            yield from zip(COSTS, self.costs, strict=True)
        for protocol in self.protocols:
            kappas = protocol.measure.kappas
            values = at_k_in_words(self.metrics[protocol.name]).split() if self.metrics else []
            larger = ["-"] * (len(kappas) - len(values)) if values else []  # k above the database
            yield f"{protocol.title} {protocol.measure.at}@{','.join(map(str, kappas))}", " ".join([*values, *larger])
        yield "note", self.note


class RowGroup(NamedTuple):
    """Rows with the same network and descriptors: retrieval, and reranking with different options.

    Attributes:
        cfg: the options of these rows.
        words: what distinguishes the network from the others of the table.
        variants: returns the options of each row with reranking, by what distinguishes it from the others.
    """

    cfg: CfgNode
    words: str
    variants: Callable[[CfgNode], dict[str, CfgNode]]


def main(argv: list[str]) -> None:
    args, cfg, given = parse(argv)
    kind, session = TABLES[args.task], start_session(cfg, sys.stderr)
    output, lines, missing, run = session.output, [], 0, None
    revisited = [name for figures in published()["figures"] for name in figures]
    seen: dict[Path, str] = {}

    def say(*new: str) -> None:
        if session.first:
            lines.extend(new)
            print("\n".join(new), flush=True)

    for protocols, names in by_protocols(session).items():  # a table per kind of dataset
        table: list[str] = []
        for group in kind.groups(cfg, given):
            # The distractors are those of the revisited benchmarks, unless others are given.
            listed = names if args.task != "main" or not group.cfg.SupG.onemeval or cfg.TEST.DISTRACTORS else revisited
            for row in (row for name in names if name in listed for row in rows(group, name, protocols, session, seen)):
                missing += row.metrics is None
                titles, cells = zip(*row.cells(kind.costs, args.reproductions), strict=True)
                new = markdown_table([titles, cells])[2 * bool(table) :]  # the heading once
                say(*[""] * bool(lines and not table), *new)
                table += new
                run = run or output.new_run(f"{args.task}-{'+'.join(cfg.TEST.DATASET_LIST)}")
                (run / f"{args.task}.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
                output.publish(run)
    session.processes.end()
    if not session.first:
        return
    if kind.costs:
        print(f"\n{costs_explained(cfg)}")
    elif any(name in revisited for name in cfg.TEST.DATASET_LIST):
        print(f"\nPublished: {published()['source']}.")
    if args.reproductions:
        print(f"Reproduced by others: {', '.join(each['source'] for each in published()['reproductions'])}.")
    if "toy" in cfg.TEST.DATASET_LIST:
        log.info("%s", toy.DISCLAIMER)
    if missing:
        log.info("rows without data, weights or distractors: %d; see their notes", missing)


def parse(argv: list[str]) -> Parsed:
    instead = {"TEST.FEATURES": "give saved descriptors as TEST.FUSION", "TEST.REPORT": "use test.py"}
    line = CommandLine(__doc__, instead=instead)
    line.add("task", choices=TABLES, help="the table, see above")
    line.add_flag("--depth", "MODEL.DEPTH", type=int, choices=STAGE_DEPTHS, help="network [50; of main both]")
    line.add("--reproductions", action="store_true", help="also the independent reproductions nearest to the results")
    args, cfg, given = line.parse(argv, lambda args: TABLES[args.task].defaults)
    if args.task == "rerank" and active_rerankers(cfg) != ["superglobal"]:
        raise InputError("rerank varies SuperGlobal's reranking: leave TEST.RERANKER and SupG.rerank at their defaults")
    names = cfg.TEST.RERANKER
    if args.task == "rerankers" and "TEST.RERANKER" not in given and cfg.TEST.INDEX:
        names = [name for name in names if name != "dba"]  # it replaces all rows, so that an index would not fit
    elif {*names} - {"none", "superglobal"} and "superglobal" not in names:
        names = ["superglobal", *names]
    return Parsed(args, varied(cfg, {"TEST.RERANKER": names}), given)


def main_table(cfg: CfgNode, given: set[str]) -> Iterator[RowGroup]:
    fast = [name for name in cfg.TEST.RERANKER if name not in ("cvnet", "dba")]  # the others take days with +1M
    one_network = "MODEL.DEPTH" in given or cfg.MODEL.NAME != "cvnet" or cfg.TEST.FUSION
    for depth in [cfg.MODEL.DEPTH] if one_network else STAGE_DEPTHS:
        for million in [cfg.SupG.onemeval] if "SupG.onemeval" in given else (False, True):
            names = fast or "none" if million else cfg.TEST.RERANKER
            changes = {"MODEL.DEPTH": depth, "SupG.onemeval": million, "TEST.RERANKER": names}
            yield RowGroup(varied(cfg, changes), "", each_reranker)


def ablation_table(cfg: CfgNode, given: set[str]) -> Iterator[RowGroup]:
    modules = {"": (), **{f"without {MODULES[name]}": (name,) for name in MODULES}, "without the four": tuple(MODULES)}
    for words, off in modules.items():
        changed = varied(cfg, {f"SupG.{name}": False for name in off})
        yield RowGroup(changed, words, each_reranker if off else each_reading)


def rerank_table(cfg: CfgNode, given: set[str]) -> Iterator[RowGroup]:
    default = {name: cfg.SupG[f"rerank_{name}"] for name in SWEEP}
    methods = [{**default, name: value} for name, values in SWEEP.items() for value in sorted({*values, default[name]})]
    variants = {}
    for method in (method for method in methods if method["k"] <= method["m"]):
        words = f"M = {method['m']}, K = {method['k']}, beta = {method['beta']:g}"
        words += ", S2 of the original rows" if method["s2"] == "original" else ""
        variants[words] = varied(cfg, {f"SupG.rerank_{name}": value for name, value in method.items()})
    yield RowGroup(cfg, "", lambda cfg: variants)


def rerankers_table(cfg: CfgNode, given: set[str]) -> Iterator[RowGroup]:
    yield RowGroup(cfg, "", each_reading)


def each_reranker(cfg: CfgNode) -> dict[str, CfgNode]:
    """Returns the options of each reranker by its title; SuperGlobal has none."""
    titles = {**RERANKERS, "superglobal": ""}
    return {titles[name]: varied(cfg, {"TEST.RERANKER": [name]}) for name in active_rerankers(cfg)}


def each_reading(cfg: CfgNode) -> dict[str, CfgNode]:
    """Returns these options, and after SuperGlobal's those with the other form of S2."""
    variants = {}
    for words, each in each_reranker(cfg).items():
        variants[words] = each
        if not words:
            other = "original" if cfg.SupG.rerank_s2 == "refined" else "refined"
            variants[f"S2 of the {other} rows"] = varied(each, {"SupG.rerank_s2": other})
    return variants


def by_protocols(session: Session) -> dict[tuple[Protocol, ...], list[str]]:
    """Returns the datasets grouped by their protocols, after the log's advice for small ones.

    Unreadable ones are grouped with the revisited ones.
    """
    tables: dict[tuple[Protocol, ...], list[str]] = {}
    for name in session.cfg.TEST.DATASET_LIST:
        protocols = REVISITED_PROTOCOLS
        with suppress(InputError):  # its rows report this
            dataset = find_dataset(session.cfg, name)
            protocols = dataset.protocols
            if session.first and (advice := small_set_advice(session.cfg, dataset)):
                log.warning("%s", advice)
        tables.setdefault(protocols, []).append(name)
    return tables


def rows(
    group: RowGroup, name: str, protocols: Sequence[Protocol], session: Session, seen: dict[Path, str]
) -> Iterator[Row]:
    """Yields a row for retrieval and one per reranker, from a single search; or a row that says what is missing.

    The processes of a `torchrun` share extraction and search; only the first one yields rows.

    Args:
        seen: the words of the group for which descriptors were extracted first, by their folder.
    """
    cfg, processes = group.cfg, session.processes
    network = network_title(cfg)

    def setting(stage: str, words: str = "") -> str:
        return ", ".join(filter(None, [stage, group.words, words, "+1M" if cfg.SupG.onemeval else ""]))

    try:
        with processes.agreeing():
            experiment = prepare(cfg, name, session.output, session.device)
            variants = group.variants(cfg)
            experiments = prepare_variants(experiment, variants.values())
            if processes.count == 1:
                queries, database = experiment.descriptors()
    except InputError as error:
        if session.first:
            stages = "retrieval, reranking" if active_rerankers(cfg) else "retrieval"
            yield Row(network, name, setting(stages), protocols, note=str(error))
        return
    if processes.count > 1:  # an error in only one of them, such as a damaged image, ends all of them
        queries, database = experiment.descriptors(processes)
    words_of = {id(each): words for each, words in zip(experiments, variants, strict=True)}
    whitening = experiment.facts().get("whitening", {})
    note = "whitening learnt on this database itself" if whitening.get("learnt_on_the_test_set") else ""
    if experiment.distractors and (count := len(experiment.distractors.rows)) != published()["distractors"]:
        note = ", ".join(filter(None, [note, f"{count:,} distractors instead of a million"]))
    if (same := seen.setdefault(experiment.folder, group.words)) != group.words:
        note = f"no effect: the descriptors are those {same or 'of all modules'}"
    for each in rankings_of(experiment, experiments, queries, database, processes):
        ranking, metrics = each.ranking, experiment.evaluate(each.ranking)
        once = f"{ranking.once:.1f} s once for the database" if ranking.once else ""
        key = paper_setting(each.experiment.cfg, name, each.stage is not None)
        maps = {protocol: 100 * of.map for protocol, of in metrics.items()}
        yield Row(
            network, name, setting(each.title, words_of.get(id(each.experiment), "")), protocols, metrics,
            find_figures(published()["figures"], *key) if key else {}, ", ".join(filter(None, [note, once])),
            costs_of(each), nearest_reproduction(*key, maps) if key else {},
        )  # fmt: skip


def costs_of(variant: Variant) -> tuple[str, ...]:
    """Returns the cells of COSTS. A descriptor that is decoded from an index takes no bytes of its own."""
    ranking, experiment, database = variant.ranking, variant.experiment, variant.searched.database
    memory = "" if variant.peak_bytes is None else f"{variant.peak_bytes / 1e6:.0f}"
    kept = 4 * database.dim
    if isinstance(database, FaissDatabase):
        kept = round(database.size / len(database)) + (0 if database.decoded else kept)
    if variant.stage and experiment.cfg.TEST.RERANKER == ["cvnet"]:
        kept += map_bytes(experiment.database_images)
    return f"{1000 * ranking.seconds / len(ranking.ids):.1f}", memory, f"{kept:,}"


def costs_explained(cfg: CfgNode) -> str:
    """Returns a text about what each row reorders, and about the meaning of the costs."""
    lines = []
    for name in active_rerankers(cfg):
        shortlist = "the first results that a protocol does not ignore, as published"
        if name != "cvnet":  # it needs images
            (stage,) = make_stages(varied(cfg, {"TEST.RERANKER": [name]})).values()
            shortlist = stage.shortlist
        lines.append(f"{RERANKERS[name]}: {shortlist}.")
    lines.append("Times are those of the stage only, after the search; memory is what it used in addition.")
    lines.append("Bytes include a float32 descriptor and everything else that is kept of an image.")
    return "\n".join(lines)


def paper_setting(cfg: CfgNode, name: str, reranked: bool) -> tuple[int, str, bool, str] | None:
    """Returns what identifies a result of the paper, see find_figures; None for other settings than the paper's.

    Its settings are its exact search, and its network, in any precision.
    """
    settings = {*NETWORK, *FUSION, *INDEX, *(RERANKING if reranked else ())}
    if as_words(cfg, *settings - {"MODEL.DEPTH", "TEST.WEIGHTS", "TEST.PRECISION"}):
        return None
    return cfg.MODEL.DEPTH, "reranking" if reranked else "retrieval", cfg.SupG.onemeval, name


class TableKind(NamedTuple):
    """A kind of table.

    Attributes:
        groups: returns its groups of rows, from the options, and the keys of those that are given.
        defaults: defaults of options that differ from those of test.py.
        costs: whether it has columns for time and memory instead of published numbers.
    """

    groups: Callable[[CfgNode, set[str]], Iterator[RowGroup]]
    defaults: Mapping[str, Any]
    costs: bool = False


TABLES = {
    "main": TableKind(main_table, {"SupG.onemeval": True}),
    "ablation": TableKind(ablation_table, {}),
    "rerank": TableKind(rerank_table, {}),
    "rerankers": TableKind(rerankers_table, {"TEST.RERANKER": GLOBAL}, costs=True),
}

if __name__ == "__main__":
    run_command(main)
