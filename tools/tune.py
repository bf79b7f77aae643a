"""Choose M, K, beta, or any option of descriptors and rerankers, on a validation set; then evaluate on the test set.

python -m tools.tune --on rparis6k --test roxford5k
python -m tools.tune --on gldv2:Public --test gldv2:Private
python -m tools.tune --folds 5 --test NAME
python -m tools.tune --on NAME --test NAME --try SupG.rerank_k 5,9,15 --try SupG.gemp_p 3,4.6,6

Every combination of the values is evaluated on the validation set: another dataset, the queries of one usage, or the
other folds of the test set's own queries. With TEST.FUSION, the weights are tried by default. The chosen values are
compared with the defaults on the test set, with the 95 % interval of a paired bootstrap over its queries. Images are
extracted once for each setting of the network, and their descriptors are kept like those of test.py; rerankers need no
further extraction. TEST.FEATURES takes a folder with the saved descriptors of both sets instead.
"""

import argparse
import itertools
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from yacs.config import CfgNode

from assembly import (
    Session,
    Variant,
    find_dataset,
    prepare,
    prepare_variants,
    rankings_of,
    start_session,
)
from config import (
    DATASET,
    FUSION,
    INDEX,
    LOADING,
    NETWORK,
    RERANKING,
    CommandLine,
    active_rerankers,
    as_typed,
    as_words,
    idle_options,
    make_config,
    option_values,
    varied,
)
from model.errors import InputError, nearest
from report.command import run_command
from report.drawing import draw_heat_map, draw_lines
from report.page import Page, Section, evaluated_section, write_report
from report.results import Evaluated, PairedValues, markdown_table, paired_table, save_results
from revisitop.bootstrap import CONFIDENCE
from revisitop.dataset import Dataset
from revisitop.layouts import dataset_folder
from revisitop.protocols import Protocol
from revisitop.retrieve import Ranking

log = logging.getLogger(__name__)

# The values that are tried by default for each reranker.
GRIDS: dict[str, dict[str, tuple]] = {
    "superglobal": {
        "SupG.rerank_m": (100, 200, 400, 800),
        "SupG.rerank_k": (3, 5, 9, 15, 25),
        "SupG.rerank_beta": (0.05, 0.1, 0.15, 0.25, 0.5, 1.0),
    },
    "aqe": {"RERANK.QE_N": (1, 2, 5, 10, 20, 50)},
    "alpha-qe": {"RERANK.QE_N": (2, 5, 10, 20, 50), "RERANK.QE_ALPHA": (1.0, 2.0, 3.0, 4.0, 5.0)},
    "dba": {"RERANK.DBA_K": (2, 3, 5, 10, 20)},
    "k-reciprocal": {
        "RERANK.K1": (10, 20, 30, 50), "RERANK.K2": (3, 6, 10), "RERANK.LAMBDA": (0.1, 0.3, 0.5, 0.7),
    },
    "diffusion": {
        "RERANK.DIFFUSION_K": (10, 20, 50, 100), "RERANK.DIFFUSION_KQ": (3, 5, 10, 20),
        "RERANK.DIFFUSION_GAMMA": (1.0, 2.0, 3.0, 5.0),
    },
}  # fmt: skip
_FIXED = ("TEST.RERANKER", "SupG.rerank", "MODEL.NAME", "TEST.WEIGHTS")
_SHOWN = 10  # number of settings in the log
_ON_PAGE = 30
DEFAULT, CHOSEN = "reranking with the default values", "reranking with the chosen values"

Setting = dict[str, Any]


class QuerySet(NamedTuple):
    """A dataset, or its queries of one usage (NAME:USAGE)."""

    name: str
    usage: str

    @classmethod
    def of(cls, text: str) -> "QuerySet":
        name, _, usage = text.partition(":")
        return cls(name, usage)

    def protocols(self, dataset: Dataset) -> list[Protocol]:
        """Returns the protocols for settings: Medium and Hard of the revisited benchmarks, else all of the usage.

        Raises:
            InputError: if there is no such usage.
        """
        every = dataset.protocols
        if not self.usage:
            return [each for each in every if each.name in ("M", "H")] or list(every)
        protocols = [each for each in every if each.usage == self.usage]
        if not protocols:
            usages = ", ".join(each.usage for each in every if each.usage) or "no other"
            raise InputError(f"{self.name} has no queries of usage {self.usage!r}; it has {usages}")
        return protocols

    def __str__(self) -> str:
        return f"{self.name}:{self.usage}" if self.usage else self.name


@dataclass(frozen=True)
class Curve:
    """The results of all settings on the validation set.

    Attributes:
        settings: the S settings, that of the defaults first.
        values: (S, P, Q), the main metric (AP or recall@1) by setting, protocol and query; NaN for a query without one.
        title: the name of the mean of the values.
    """

    settings: list[Setting]
    values: np.ndarray
    title: str

    def metrics(self, queries: np.ndarray | None = None) -> np.ndarray:
        """Returns the metric of each setting, (S,): the mean over the protocols of that over these queries."""
        values = self.values if queries is None else self.values[:, :, queries]
        with np.errstate(invalid="ignore"):  # a protocol without queries has no mean
            means = np.nansum(values, axis=2) / (~np.isnan(values)).sum(axis=2)
        return np.nanmean(means, axis=1)

    def order(self, queries: np.ndarray | None = None) -> list[int]:
        """Returns the numbers of the settings, best first; equal ones keep their order: the defaults are preferred."""
        return np.argsort(-np.nan_to_num(self.metrics(queries), nan=-1), kind="stable").tolist()


def main(argv: list[str]) -> None:
    args, cfg = parse(argv)
    grid = read_grid(args.tried, cfg)
    test, validation = QuerySet.of(args.test), None if args.folds else QuerySet.of(args.on)
    if validation == test:
        raise InputError(f"--on and --test are both {test}: give another dataset, or --folds")
    session = start_session(cfg)
    if dataset_folder(Path(cfg.TEST.DATA_DIR), test.name) is None:
        find_dataset(cfg, test.name)  # draws toy, or reports a missing dataset; nothing is evaluated yet
    dataset = find_dataset(cfg, (validation or test).name)
    for queries in (queries for queries in (validation, test) if queries and queries.name == dataset.name):
        queries.protocols(dataset)  # raises for a usage that it does not have
    settings = combinations(cfg, grid, len(dataset.database))
    log.info("%d settings of %s", len(settings), ", ".join(grid))

    curve = curve_of(session, validation or test, settings)
    for line in markdown_table(settings_table(curve, _SHOWN)):
        log.info("%s", line)
    best = settings[curve.order()[0]]
    method = str(validation or f"{args.folds} folds of the queries of {test}")
    by_fold, fold_of_query = ([], None) if validation else cross_validate(curve, test, args.folds)
    log.info("chosen on %s: %s", method, words(best))
    evaluated, pairs = judge(session, test, settings[0], by_fold or [best], fold_of_query)  # the test set is read here

    options = as_words(varied(cfg, best))
    log.info("to use it: %s", shlex.join(["python", "test.py", "TEST.DATASET_LIST", test.name, *options]))

    table = paired_table(pairs, "default", "chosen")
    pairs_with_retrieval = [evaluated.pair("retrieval", CHOSEN, each.protocol) for each in pairs]
    conclusion = " ".join(filter(None, [verdict(pairs), without_reranking(pairs_with_retrieval)]))
    values = "each query has the values chosen by the other folds" if by_fold else "all queries have the chosen values"
    log.info("on %s (%s; retrieval has the default ones):", test, values)
    for line in (*evaluated.lines(), f"on {test}, in percent:", *markdown_table(table), conclusion):
        log.info("%s", line)

    run = session.output.new_run(f"tune-{test.name}")
    tuning = {"validation": method, "test": str(test), "chosen": best, "default": settings[0], "by fold": by_fold}
    metrics = (100 * curve.metrics()).tolist()
    tuning["settings"] = [{**setting, "figure": metric} for setting, metric in zip(settings, metrics, strict=True)]
    save_results(run, {**session.head, "tuning": tuning}, [evaluated])
    session.output.publish(run)
    tables = {f"On {test}, in percent": table}
    note = f"Chosen on {method}: {words(best)}. {conclusion}"
    sections = [tuning_section(method, grid, curve, note, tables), evaluated_section(evaluated)]
    page = Page(f"Tuning for {test}", {key: session.head[key] for key in ("command", "date")}, sections)
    log.info("the page is %s", write_report(page, run / "report"))


def parse(argv: list[str]) -> tuple[argparse.Namespace, CfgNode]:
    uses = ("TEST.DEVICE", "TEST.OUT_DIR", "TEST.RESUME", *DATASET, "TEST.FEATURES", *FUSION)
    instead = {"TEST.DATASET_LIST": "--on and --test name the datasets"}
    line = CommandLine(__doc__, (*NETWORK, *LOADING, *INDEX, *RERANKING, *uses), instead)
    line.add("--on", metavar="NAME[:USAGE]", help="the validation set")
    line.add("--folds", type=int, metavar="N", help="instead of --on: cross-validation over the queries of --test")
    line.add("--test", required=True, metavar="NAME[:USAGE]", help="the test set")
    line.add(
        "--try", dest="tried", nargs=2, action="append", metavar=("KEY", "VALUES"),
        help="an option and its values, 5,9,15 (or split by ;); may be repeated [the options of the reranker]",
    )  # fmt: skip
    args, cfg, _ = line.parse(argv)
    if (args.on is None) == (args.folds is None):
        raise InputError("give either --on, a validation set, or --folds, to use the queries of --test")
    if args.folds is not None and args.folds < 2:
        raise InputError(f"--folds must be at least 2, got {args.folds}")
    if len(cfg.TEST.RERANKER) > 1 or "cvnet" in cfg.TEST.RERANKER:
        raise InputError(f"TEST.RERANKER: tuning takes one of {', '.join(GRIDS)} or none; cvnet would take days")
    return args, cfg


def read_grid(tried: Sequence[Sequence[str]] | None, cfg: CfgNode) -> dict[str, tuple]:
    """Returns the values to try for each option, including the default.

    By default, these are the weights of a fusion, or else the options of the reranker.

    Raises:
        InputError: if an option cannot be tried, or a value is invalid.
    """
    if not tried and cfg.TEST.FUSION:
        return {"TEST.FUSION_WEIGHTS": ([], *weights_to_try(len(cfg.TEST.FUSION)))}  # equal ones by default
    if not tried:
        for reranker in active_rerankers(cfg):
            return dict(GRIDS[reranker])
        raise InputError("without a reranker there is nothing to tune by default: give --try KEY VALUES")
    allowed = [key for key in (*NETWORK, *RERANKING, "TEST.FUSION_WEIGHTS") if key not in _FIXED]
    grid: dict[str, tuple] = {}
    for key, text in tried:
        if key not in allowed:
            hint = nearest(key, allowed) or "those of the network and of the rerankers can"
            raise InputError(f"--try {key}: this option cannot be tried; {hint}")
        configs = [varied(cfg, {key: word.strip()}) for word in text.split(";" if ";" in text else ",") if word.strip()]
        if not configs:
            raise InputError(f"--try {key} needs at least one value")
        for line in (idle_options(each).get(key) for each in configs):
            if line:
                raise InputError(f"--try {line}")
        values = [option_values(each)[key] for each in (*configs, make_config())]
        values = [value for place, value in enumerate(values) if value not in values[:place]]
        numbers = all(isinstance(value, int | float) for value in values)
        grid[key] = tuple(sorted(values) if numbers else values)
    return grid


def weights_to_try(parts: int) -> Iterator[list[float]]:
    """Yields weights of so many parts that add to 1, in steps of a tenth for two and a fifth for more."""
    steps = 10 if parts == 2 else 5
    for numbers in itertools.product(range(steps + 1), repeat=parts):
        if sum(numbers) == steps:
            yield [number / steps for number in numbers]


def combinations(cfg: CfgNode, grid: dict[str, tuple], size: int) -> list[Setting]:
    """Returns all valid combinations (K <= M), that of the defaults first.

    Args:
        grid: the values of each option; of values of M that take in the whole database, one is left.
        size: number of images in the database.
    """
    default = {key: option_values(make_config())[key] for key in grid}
    varied(cfg, default)  # raises if the defaults do not fit the options that are not tried
    if "SupG.rerank_m" in grid:
        m = default["SupG.rerank_m"]
        whole = m if m >= size else min((each for each in grid["SupG.rerank_m"] if each >= size), default=m)
        grid["SupG.rerank_m"] = tuple(each for each in grid["SupG.rerank_m"] if each < size or each == whole)
    settings = [default]
    for values in itertools.product(*grid.values()):
        setting = dict(zip(grid, values, strict=True))
        try:
            varied(cfg, setting)
        except InputError:  # K above M
            continue
        if setting != default:
            settings.append(setting)
    return settings


def last_rankings(session: Session, name: str, settings: Sequence[Setting]) -> Iterator[tuple[int, Variant, Variant]]:
    """Yields the number, the search and the last ranking of each setting; those of a network share one search."""
    networks: dict[str, list[int]] = {}
    for number, setting in enumerate(settings):
        network = words({key: value for key, value in setting.items() if key in (*NETWORK, *FUSION)})
        networks.setdefault(network, []).append(number)
    try:
        for numbers in networks.values():
            cfgs = [varied(session.cfg, settings[number]) for number in numbers]
            first = prepare(cfgs[0], name, session.output, session.device)
            experiments = prepare_variants(first, cfgs)
            rankings = rankings_of(first, experiments, *first.descriptors())
            logging.getLogger("assembly").setLevel(logging.WARNING)  # a recipe is logged once, not for each setting
            search = next(rankings)
            for number, experiment in zip(numbers, experiments, strict=True):
                *_, last = [search, *(next(rankings) for _ in experiment.stages)]
                yield number, search, last
    finally:
        logging.getLogger("assembly").setLevel(logging.NOTSET)


def curve_of(session: Session, queries: QuerySet, settings: list[Setting]) -> Curve:
    """Returns the results of all settings on a dataset."""
    values: list[np.ndarray | None] = [None] * len(settings)
    with tqdm(total=len(settings), desc=f"settings on {queries}", dynamic_ncols=True) as bar:
        for number, search, last in last_rankings(session, queries.name, settings):
            protocols, metrics = queries.protocols(search.experiment.dataset), search.experiment.evaluate(last.ranking)
            values[number] = np.stack([metrics[each.name].values for each in protocols])
            bar.update()
    curve = Curve(settings, np.stack(values), protocols[0].measure.main_title)
    if np.isnan(curve.values).all():
        raise InputError(f"{queries} has no query with a positive image")
    return curve


def cross_validate(curve: Curve, test: QuerySet, folds: int) -> tuple[list[Setting], np.ndarray]:
    """Returns the best setting of the other folds for each fold, and the number of the fold of each query, (Q,).

    Raises:
        InputError: if there are fewer queries with positive images than folds.
    """
    positive = np.flatnonzero(~np.isnan(curve.values[0]).all(axis=0))
    if len(positive) < folds:
        raise InputError(f"--folds {folds}: {test} has {len(positive)} queries with positive images; give fewer")
    order, by_fold = np.random.default_rng(0).permutation(positive), []
    fold_of_query = np.zeros(curve.values.shape[2], dtype=np.int64)
    for fold in range(folds):
        queries = order[fold::folds]
        by_fold.append(curve.settings[curve.order(np.setdiff1d(positive, queries))[0]])
        fold_of_query[queries] = fold
        log.info("fold %d, %d queries, chosen by the others: %s", fold + 1, len(queries), words(by_fold[-1]))
    return by_fold, fold_of_query


def judge(
    session: Session,
    test: QuerySet,
    default: Setting,
    by_fold: Sequence[Setting],
    fold_of_query: np.ndarray | None = None,
) -> tuple[Evaluated, list[PairedValues]]:
    """Returns the results on the test set with the default values, and with those chosen for the fold of each query.

    The pairs are the values of its queries with both, per protocol.

    Args:
        by_fold: the chosen setting for each fold; a single one for all queries without folds.
        fold_of_query: (Q,), the number of the fold of each query; None without folds.
    """
    settings = {words(setting): setting for setting in (default, *by_fold)}  # each once
    found = sorted(last_rankings(session, test.name, [*settings.values()]), key=lambda variant: variant[0])
    rankings_of_settings = {text: last.ranking for text, (_, _, last) in zip(settings, found, strict=True)}
    search, first = found[0][1], rankings_of_settings[words(default)]
    experiment, chosen = search.experiment, first
    for fold, setting in enumerate(by_fold):
        ranking = rankings_of_settings[words(setting)]
        chosen = ranking if fold_of_query is None else combined(chosen, ranking, fold_of_query == fold)
    rankings = {"retrieval": search.ranking, DEFAULT: first, CHOSEN: chosen}
    metrics = {stage: experiment.evaluate(ranking) for stage, ranking in rankings.items()}
    evaluated = Evaluated(experiment.dataset, rankings, metrics, experiment.facts())
    protocols = test.protocols(experiment.dataset) if test.usage else experiment.dataset.protocols
    return evaluated, [evaluated.pair(DEFAULT, CHOSEN, each.name) for each in protocols]


def combined(first: Ranking, second: Ranking, in_second: np.ndarray) -> Ranking:
    """Returns the first ranking, with the results of these queries (Q,) bool taken from the second."""
    rows = torch.from_numpy(in_second)[:, None]
    positions = [b if take else a for a, b, take in zip(first.positions, second.positions, in_second, strict=True)]
    ids, scores = torch.where(rows, second.ids, first.ids), torch.where(rows, second.scores, first.scores)
    return Ranking(ids, scores, positions, first.seconds)


def verdict(pairs: Sequence[PairedValues]) -> str:
    """Returns a sentence about the differences between the defaults and the chosen values on the test set."""
    if all(np.array_equal(each.a, each.b, equal_nan=True) for each in pairs):
        return "The chosen values are as good as the defaults for each query of the test set."
    if beyond := [each.protocol for each in pairs if not each.difference.is_within_chance]:
        return f"The {CONFIDENCE:.0%} interval of the difference does not contain 0 for protocol {', '.join(beyond)}."
    return (
        f"The difference may be chance, because every {CONFIDENCE:.0%} interval contains 0: "
        "on other queries of this kind the defaults may be just as good."
    )


def without_reranking(pairs: Sequence[PairedValues]) -> str:
    """Returns a sentence if the results before reranking, with the default values, are better; "" otherwise."""
    means = {
        each.protocol: [float(100 * np.nanmean(values)) for values in (each.a, each.b)]
        for each in pairs
        if each.difference.queries
    }
    if not (better := {name: before for name, (before, after) in means.items() if before > after}):
        return ""
    figures = ", ".join(f"{name} {before:.2f}" for name, before in better.items())
    return f"Retrieval without reranking is better, {figures} with the default values: compare with TEST.RERANKER none."


def words(setting: Setting) -> str:
    return ", ".join(f"{key} {as_typed(value) or 'default'}" for key, value in setting.items())


def settings_table(curve: Curve, shown: int) -> list[list[str]]:
    """Returns the cells of a table of the best settings, and the default one, with their metrics in percent."""
    metrics, numbers = curve.metrics(), dict.fromkeys([*curve.order()[:shown], 0])
    rows = [
        [*map(as_typed, curve.settings[i].values()), f"{100 * metrics[i]:.2f}", "" if i else "the default"]
        for i in numbers
    ]
    return [[*curve.settings[0], curve.title, ""], *rows]


def tuning_section(
    method: str, grid: Mapping[str, tuple], curve: Curve, note: str, tables: dict[str, list[list[str]]]
) -> Section:
    """Returns the section on the validation set: heat maps of pairs of options, curves of each, the best settings."""
    metrics, best = curve.metrics(), curve.settings[curve.order()[0]]

    def best_with(**wanted: Any) -> float:
        own = [each for setting, each in zip(curve.settings, metrics, strict=True) if wanted.items() <= setting.items()]
        return 100 * max(own, default=np.nan)

    several = {key: values for key, values in grid.items() if len(values) > 1}
    plots = []
    for down, across in itertools.combinations(several, 2):
        values = [[best_with(**{down: d, across: a}) for a in several[across]] for d in several[down]]
        plots.append(
            draw_heat_map(values, (down, several[down]), (across, several[across]), (best[down], best[across]))
        )
    for key, values in several.items():
        plots.append(draw_lines(key, values, [best_with(**{key: each}) for each in values], best[key]))
    tables = {**tables, f"The best settings on {method}": settings_table(curve, _ON_PAGE)}
    caption = (
        f"The metric is the mean {curve.title} of the protocols on the validation set, in percent; if other options "
        "were tried, too, with their best values. Red marks the chosen values."
    )
    return Section("Validation", [], note=note, plots=plots, caption=caption, tables=tables)


if __name__ == "__main__":
    run_command(main)
