"""Choose M, K, beta, or any option of descriptors and rerankers, on a validation set; then evaluate on the test set.

python -m tools.tune --on rparis6k --test roxford5k
python -m tools.tune --on gldv2:Public --test gldv2:Private
python -m tools.tune --folds 5 --test NAME
python -m tools.tune --on NAME --test NAME --try SupG.rerank_k 5,9,15 --try SupG.gemp_p 3,4.6,6

Every combination of the values is evaluated on the validation set: another dataset, the queries of one usage, or the
other folds of the test set's own queries. The chosen values are compared with the paper's on the test set, with the
95 % interval of a paired bootstrap over its queries. Images are extracted once for each setting of the network, and
their descriptors are kept like those of test.py; rerankers need no further extraction. TEST.FEATURES takes a folder
with the saved descriptors of both sets instead.
"""

import argparse
import itertools
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from yacs.config import CfgNode

from assembly import Experiment, Output, find_dataset, make_output, prepare, start_device
from config import (
    ADVICE,
    INDEX,
    LOADING,
    NETWORK,
    RERANKING,
    CommandLine,
    default_config,
    idle_options,
    option_values,
    plain,
    varied,
)
from model.errors import InputError, run_command
from report.drawing import draw_heat_map, draw_lines
from report.log import start_log
from report.page import Page, Section, evaluated_section, write_report
from report.results import Evaluated, markdown, save_results
from revisitop.bootstrap import CONFIDENCE, Difference, paired_difference
from revisitop.evaluate import evaluate
from revisitop.layouts import dataset_folder
from revisitop.protocols import Protocol
from revisitop.retrieve import Ranking
from revisitop.stages import search_for

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
PAPER, CHOSEN = "reranking with the paper's values", "reranking with the chosen values"

Setting = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A dataset, or its queries of one usage (NAME:USAGE)."""

    name: str
    usage: str

    @classmethod
    def of(cls, text: str) -> "Part":
        name, _, usage = text.partition(":")
        return cls(name, usage)

    def protocols(self, experiment: Experiment) -> list[Protocol]:
        """Returns the protocols for settings: Medium and Hard of the revisited benchmarks, else all of the usage.

        Raises:
            InputError: if there is no such usage.
        """
        every = experiment.dataset.protocols
        if self.usage:
            chosen = [each for each in every if each.usage == self.usage]
            if not chosen:
                usages = ", ".join(each.usage for each in every if each.usage) or "no other"
                raise InputError(f"{self.name} has no queries of usage {self.usage!r}; it has {usages}")
            return chosen
        return [each for each in every if each.name in ("M", "H")] or list(every)

    def __str__(self) -> str:
        return f"{self.name}:{self.usage}" if self.usage else self.name


@dataclass(frozen=True)
class Curve:
    """The results of all settings on the validation set.

    Attributes:
        settings: the S settings, the paper's first.
        aps: (S, P, Q), AP by setting, protocol and query; NaN for a query without AP in a protocol.
    """

    settings: list[Setting]
    aps: np.ndarray

    def metrics(self, queries: np.ndarray | None = None) -> np.ndarray:
        """Returns the metric of each setting, (S,): the mean mAP over the protocols, for these queries."""
        aps = self.aps if queries is None else self.aps[:, :, queries]
        known = ~np.isnan(aps)
        counts = known.sum(axis=2)
        sums = np.where(known, aps, 0).sum(axis=2)
        maps = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
        return np.nanmean(maps, axis=1)

    def best(self, queries: np.ndarray | None = None) -> int:
        """Returns the number of the best setting, the first among equals, so that the paper's is preferred."""
        return int(np.nanargmax(self.metrics(queries)))


def main(argv: list[str]) -> None:
    args, cfg = parse(argv)
    grid = read_grid(args.tried, cfg)
    test, validation = Part.of(args.test), None if args.folds else Part.of(args.on)
    if validation == test:
        raise InputError(f"--on and --test are both {test}: give another dataset, or --folds")
    settings = combinations(cfg, grid)
    output = make_output(cfg)
    head = start_log(Path("log.txt"), plain(cfg))
    for line in idle_options(cfg):
        log.warning("%s", line)
    device = start_device(cfg, head)
    for name in {test.name, *([validation.name] if validation else [])}:
        if dataset_folder(Path(cfg.TEST.DATA_DIR), name) is None:
            find_dataset(cfg, name)  # draws toy, or reports a missing dataset; nothing is evaluated yet
    log.info("%d settings of %s", len(settings), ", ".join(grid))

    bench = Bench(cfg, output, device)
    curve = bench.curve(validation or test, settings)
    for line in in_words(curve):
        log.info("%s", line)
    chosen = settings[curve.best()]
    by_fold: list[Setting] = []
    if validation:
        method = str(validation)
        log.info("chosen on %s: %s", method, words(chosen))
        judged = bench.judge(test, settings[0], chosen)  # the test set is evaluated only here
    else:
        method = f"{args.folds} folds of the queries of {test}"
        judged, by_fold = bench.cross_validate(test, curve, args.folds)
        log.info("chosen by all queries, for use: %s", words(chosen))

    log.info("on %s, mAP in percent:", test)
    heading, *rows = judged.rows()
    for row in (heading, ["---"] * len(heading), *rows):
        log.info("%s", markdown(row))
    log.info("%s", judged.verdict())

    run = output.new_run(f"tune-{test.name}")
    tuning = {"validation": method, "test": str(test), "chosen": chosen, "paper": settings[0], "by fold": by_fold}
    tuning["settings"] = [
        {**setting, "figure": 100 * float(metric)} for setting, metric in zip(settings, curve.metrics(), strict=True)
    ]
    save_results(run, {**head, "tuning": tuning}, [judged.evaluated])
    output.publish(run)
    sections = [tuning_section(method, test, grid, curve, judged), evaluated_section(judged.evaluated)]
    page = Page(f"Tuning for {test}", {"command": head["command"], "date": head["date"]}, sections)
    log.info("the page is %s", write_report(page, run / "report"))


def parse(argv: list[str]) -> tuple[argparse.Namespace, CfgNode]:
    own = ("TEST.DEVICE", "TEST.OUT_DIR", "TEST.RESUME", "TEST.DATA_DIR", "TEST.FEATURES")
    uses = (*NETWORK, *LOADING, *INDEX, *RERANKING, *own)
    line = CommandLine(
        __doc__, uses, "python -m tools.tune", {"TEST.DATASET_LIST": "--on and --test name the datasets"}
    )
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
    """Returns the values to try for each option, including the paper's; by default the options of the reranker.

    Raises:
        InputError: if an option cannot be tried, or a value is invalid.
    """
    reranker = cfg.TEST.RERANKER[0] if cfg.SupG.rerank or cfg.TEST.RERANKER != ["superglobal"] else "none"
    if not tried:
        if reranker == "none":
            raise InputError("without a reranker there is nothing to tune by default: give --try KEY VALUES")
        return GRIDS[reranker]
    allowed = [key for key in (*NETWORK, *RERANKING) if key not in _FIXED]
    grid: dict[str, tuple] = {}
    for key, text in tried:
        if key not in allowed:
            raise InputError(f"--try {key}: this option cannot be tried; {', '.join(allowed)} can")
        values = [word.strip() for word in text.split(";" if ";" in text else ",") if word.strip()]
        if not values:
            raise InputError(f"--try {key} needs at least one value")
        typed = [option_values(varied(cfg, {key: word}))[key] for word in values]
        if (paper := option_values(default_config())[key]) not in typed:
            typed.append(paper)
        if all(isinstance(value, int | float) for value in typed):
            typed.sort()
        grid[key] = tuple(value for place, value in enumerate(typed) if value not in typed[:place])
        other = next((value for value in grid[key] if value != paper), paper)
        if idle := [line for line in idle_options(varied(cfg, {key: other})) if line.startswith(f"{key} ")]:
            raise InputError(f"--try {idle[0]}")
    return grid


def combinations(cfg: CfgNode, grid: Mapping[str, tuple]) -> list[Setting]:
    """Returns all valid combinations (K <= M), the paper's values first."""
    defaults = option_values(default_config())
    paper = {key: defaults[key] for key in grid}
    settings = [paper]
    for values in itertools.product(*grid.values()):
        setting = dict(zip(grid, values, strict=True))
        if setting == paper:
            continue
        try:
            varied(cfg, setting)
        except InputError:  # K above M
            continue
        settings.append(setting)
    varied(cfg, paper)
    return settings


@dataclass(frozen=True)
class Judged:
    """The results on the test set with the paper's values and with the chosen ones.

    Attributes:
        evaluated: the rankings and metrics of the test set.
        protocols: its P protocols.
        paper, chosen: per protocol, (Q,) AP.
    """

    evaluated: Evaluated
    protocols: list[Protocol]
    paper: list[np.ndarray]
    chosen: list[np.ndarray]

    def differences(self) -> list[Difference]:
        return [paired_difference(a, b) for a, b in zip(self.paper, self.chosen, strict=True)]

    def rows(self) -> list[list[str]]:
        """Returns the cells of a table, with its heading first."""
        rows = [["protocol", "paper's", "chosen", "difference", f"{CONFIDENCE:.0%} interval", ""]]
        for protocol, a, b, by in zip(self.protocols, self.paper, self.chosen, self.differences(), strict=True):
            means = [f"{100 * np.nanmean(each):.2f}" if by.queries else "" for each in (a, b)]
            interval = f"{100 * by.low:+.2f} to {100 * by.high:+.2f}"
            words = "same" if by.low == by.high == 0 else "may be chance" if by.is_within_chance else ""
            rows.append([protocol.title, *means, f"{100 * by.mean:+.2f}", interval, words])
        return rows

    def verdict(self) -> str:
        """Returns a sentence about the differences."""
        pairs = zip(self.protocols, self.differences(), strict=True)
        beyond = [protocol.title for protocol, difference in pairs if not difference.is_within_chance]
        if all(np.array_equal(a, b, equal_nan=True) for a, b in zip(self.paper, self.chosen, strict=True)):
            return "The chosen values give the same rankings of the test set as the paper's."
        if beyond:
            return f"The {CONFIDENCE:.0%} interval of the difference does not contain 0 for {', '.join(beyond)}."
        return (
            f"The difference may be chance, because every {CONFIDENCE:.0%} interval contains 0: "
            "on other queries of this kind the paper's values may be just as good."
        )


class Bench:
    """Evaluates settings; experiments with equal options of the network share their descriptors."""

    def __init__(self, cfg: CfgNode, output: Output, device: torch.device):
        self.cfg, self.output, self.device = cfg, output, device

    def by_network(self, settings: Sequence[Setting]) -> dict[tuple, list[int]]:
        """Returns the numbers of the settings, grouped by the options of the network."""
        groups: dict[tuple, list[int]] = {}
        for number, setting in enumerate(settings):
            shared = tuple((key, str(value)) for key, value in setting.items() if key in NETWORK)
            groups.setdefault(shared, []).append(number)
        return groups

    def rankings(self, name: str, settings: Sequence[Setting]) -> Iterator[tuple[int, Experiment, Ranking, Ranking]]:
        """Yields the number, experiment, search and last ranking of each setting, with one search per network."""
        for numbers in self.by_network(settings).values():
            first = prepare(varied(self.cfg, settings[numbers[0]]), name, self.output, self.device)
            experiments = [replace(first, cfg=varied(self.cfg, settings[number])) for number in numbers]
            stages = [list(each.stages.values()) for each in experiments]
            every = itertools.chain.from_iterable(stages)
            searched = search_for(every, *first.descriptors(), first.dataset.listed, self.device)
            for number, experiment, own in zip(numbers, experiments, stages, strict=True):
                ranking = searched.ranking
                for stage in own:
                    ranking = stage(searched)
                yield number, experiment, searched.ranking, ranking

    def curve(self, part: Part, settings: list[Setting]) -> Curve:
        """Returns the AP of all settings on a dataset."""
        aps: list[np.ndarray | None] = [None] * len(settings)
        bar = tqdm(total=len(settings), desc=f"settings on {part}", dynamic_ncols=True)
        with bar:
            for number, experiment, _, ranking in self.rankings(part.name, settings):
                metrics = evaluate(ranking, experiment.dataset.ground_truth, part.protocols(experiment))
                aps[number] = np.stack([each.ap for each in metrics.values()])
                bar.update()
        curve = Curve(settings, np.stack(aps))
        if np.isnan(curve.aps).all():
            raise InputError(f"{part} has no query with a positive image")
        return curve

    def judge(self, test: Part, paper: Setting, chosen: Setting) -> Judged:
        """Returns the results on the test set with the paper's values and with the chosen ones."""
        done = {number: rest for number, *rest in self.rankings(test.name, [paper, chosen])}
        experiment, searched, first = done[0]
        return judged_of(test, experiment, {"retrieval": searched, PAPER: first, CHOSEN: done[1][2]})

    def cross_validate(self, test: Part, curve: Curve, folds: int) -> tuple[Judged, list[Setting]]:
        """Returns the results with each query at the best setting of the other folds, and these settings."""
        judged = np.flatnonzero(~np.isnan(curve.aps[0]).all(axis=0))
        if len(judged) < folds:
            raise InputError(f"--folds {folds}: {test} has {len(judged)} queries with positive images; give fewer")
        order, choices = np.random.default_rng(0).permutation(judged), []
        of_query = np.zeros(curve.aps.shape[2], dtype=np.int64)
        for fold in range(folds):
            own = order[fold::folds]
            choices.append(curve.best(np.setdiff1d(judged, own)))
            of_query[own] = choices[-1]
            text = words(curve.settings[choices[-1]])
            log.info("fold %d, %d queries, chosen by the others: %s", fold + 1, len(own), text)
        used = sorted({0, *choices})
        done = {number: rest for number, *rest in self.rankings(test.name, [curve.settings[each] for each in used])}
        experiment, searched, paper = done[0]
        mixed = paper
        for place, number in enumerate(used):
            mixed = taken(mixed, done[place][2], of_query == number)
        rankings = {"retrieval": searched, PAPER: paper, CHOSEN: mixed}
        return judged_of(test, experiment, rankings), [curve.settings[each] for each in choices]


def judged_of(test: Part, experiment: Experiment, rankings: dict[str, Ranking]) -> Judged:
    dataset = experiment.dataset
    metrics = {stage: evaluate(ranking, dataset.ground_truth, dataset.protocols) for stage, ranking in rankings.items()}
    protocols = test.protocols(experiment) if test.usage else list(dataset.protocols)
    paper, chosen = ([metrics[stage][each.name].ap for each in protocols] for stage in (PAPER, CHOSEN))
    return Judged(Evaluated(dataset, rankings, metrics, experiment.facts()), protocols, paper, chosen)


def taken(first: Ranking, second: Ranking, chosen: np.ndarray) -> Ranking:
    """Returns the first ranking, with the results of these queries (Q,) taken from the second."""
    rows = torch.from_numpy(chosen)
    positions = [b if take else a for a, b, take in zip(first.positions, second.positions, chosen, strict=True)]
    ids, scores = (
        torch.where(rows[:, None], b, a) for a, b in ((first.ids, second.ids), (first.scores, second.scores))
    )
    return Ranking(ids, scores, positions, first.seconds)


def words(setting: Setting) -> str:
    return ", ".join(f"{key} {value}" for key, value in setting.items())


def in_words(curve: Curve) -> Iterator[str]:
    """Yields lines with the best settings and the paper's, and their metrics in percent."""
    metrics = curve.metrics()
    order = np.argsort(-np.nan_to_num(metrics, nan=-1), kind="stable")
    for place, number in enumerate(order, start=1):
        if place <= _SHOWN or number == 0:
            mark = "  (the paper's)" if number == 0 else ""
            yield f"{place:5d}  {100 * metrics[number]:6.2f}  {words(curve.settings[number])}{mark}"


def tuning_section(method: str, test: Part, grid: Mapping[str, tuple], curve: Curve, judged: Judged) -> Section:
    """Returns the section on the validation set: heat maps of pairs of options, curves of each, the best settings."""
    metrics, best = curve.metrics(), curve.settings[curve.best()]

    def best_with(**wanted: Any) -> float:
        own = [each for setting, each in zip(curve.settings, metrics, strict=True) if wanted.items() <= setting.items()]
        return 100 * max(own, default=np.nan)

    several = {key: values for key, values in grid.items() if len(values) > 1}
    plots = []
    for down, across in itertools.combinations(several, 2):
        values = [[best_with(**{down: d, across: a}) for a in several[across]] for d in several[down]]
        chosen = best[down], best[across]
        plots.append(draw_heat_map(values, (down, several[down]), (across, several[across]), chosen))
    for key, values in several.items():
        plots.append(draw_lines(key, values, [best_with(**{key: each}) for each in values], best[key]))
    listed = [
        [*(str(curve.settings[i][key]) for key in grid), f"{100 * metrics[i]:.2f}", "" if i else "the paper's"]
        for i in np.argsort(-np.nan_to_num(metrics, nan=-1), kind="stable")[:_ON_PAGE]
    ]
    tables = {
        f"On {test}, mAP in percent": judged.rows(),
        f"The best settings on {method}": [[*grid, "mAP", ""], *listed],
    }
    note = f"Chosen on {method}: {words(best)}. {judged.verdict()}"
    caption = (
        "The metric is the mean mAP of the protocols on the validation set, in percent; if other options were tried, "
        "too, with their best values. Red marks the chosen values."
    )
    return Section("Validation", [], note=note, plots=plots, caption=caption, tables=tables)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")
    run_command(main, ADVICE)
