"""Compare two runs query by query: which queries improved or got worse, and whether this may be chance.

python -m tools.compare output/runs/RUN_A output/runs/RUN_B
python -m tools.compare output/runs/latest:retrieval output/runs/latest:reranking

A run is a folder in TEST.OUT_DIR/runs, optionally followed by a colon and one of its stages (by default the last).
Differences are B - A in percentage points, with the 95 % interval of a paired bootstrap over the queries: if it
contains 0, other queries of the same kind might show the opposite. A page shows the first results of both runs.
"""

import json
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from assembly import find_dataset, make_output
from config import ADVICE, CommandLine, make_config, option_values, plain
from model.errors import InputError, run_command, short_list
from report.log import start_log
from report.page import SHOWN, Page, Query, Section, labelled_hits, write_report
from report.results import markdown, unique_names
from revisitop.bootstrap import CONFIDENCE, paired_difference
from revisitop.dataset import Dataset

log = logging.getLogger(__name__)

_NAMED = 5  # number of queries listed with the largest gains and losses


@dataclass(frozen=True)
class Run:
    """One stage of the results of a run.

    Attributes:
        letter: A or B.
        folder: the folder of the run.
        content: the content of its results.json.
        wanted: the requested stage; "" for the last.
    """

    letter: str
    folder: Path
    content: dict[str, Any]
    wanted: str

    def stage(self, dataset: str) -> str:
        """Returns the name of the stage.

        Raises:
            InputError: if the run has no such stage.
        """
        stages = [key for key, value in self.content["datasets"][dataset].items() if is_stage(value)]
        if self.wanted and self.wanted not in stages:
            raise InputError(f"{self.folder}: {dataset} has no stage {self.wanted}; it has {', '.join(stages)}")
        return self.wanted or stages[-1]

    def aps(self, dataset: str) -> dict[str, dict[str, float]]:
        """Returns the AP of each query, in percent, by protocol and name."""
        values = self.content["datasets"][dataset][self.stage(dataset)]
        return {name: each["AP"] for name, each in values.items() if isinstance(each, dict) and "AP" in each}

    def title(self, dataset: str) -> str:
        return f"{self.letter}: {self.stage(dataset)} of {self.folder.name}"

    def ids(self, dataset: str) -> np.ndarray | None:
        """Returns the first results, (Q, R); None if they are not saved."""
        path = self.folder / f"{dataset}_{self.stage(dataset).replace(' ', '_')}_ranks.npy"
        try:
            ids = np.load(path, allow_pickle=False)
        except (OSError, ValueError):
            return None
        return ids if ids.ndim == 2 and ids.dtype.kind in "iu" else None


@dataclass(frozen=True)
class Compared:
    """The AP of the same queries in two runs, by one protocol.

    Attributes:
        dataset, protocol: their names.
        names: the names of the queries.
        a, b: (Q,), between 0 and 1; NaN for a query without AP in this protocol.
    """

    dataset: str
    protocol: str
    names: list[str]
    a: np.ndarray
    b: np.ndarray

    def cells(self) -> list[str]:
        difference, changes = paired_difference(self.a, self.b), self.b - self.a
        known = changes[~np.isnan(changes)]
        counts = [int((known > 0).sum()), int((known < 0).sum()), int((known == 0).sum())]
        low, high = (f"{100 * each:+.2f}" for each in (difference.low, difference.high))
        words = "may be chance" if difference.is_within_chance else ""
        means = [f"{100 * np.nanmean(each):.2f}" for each in (self.a, self.b)]
        return [
            self.dataset, self.protocol, *means, f"{100 * difference.mean:+.2f}", f"{low} to {high}", *map(str, counts),
            words,
        ]  # fmt: skip

    def largest(self) -> Iterator[str]:
        """Yields a line with the largest gains, and one with the largest losses."""
        changes = self.b - self.a
        order = [int(i) for i in np.argsort(-np.nan_to_num(changes), kind="stable")]
        gains = [i for i in order if changes[i] > 0][:_NAMED]
        losses = [i for i in reversed(order) if changes[i] < 0][:_NAMED]
        for word, chosen in (("better", gains), ("worse", losses)):
            if chosen:
                listed = ", ".join(f"{self.names[i]} {100 * changes[i]:+.1f}" for i in chosen)
                yield f"{self.dataset}, {self.protocol}, {word} most: {listed}"


def main(argv: list[str]) -> None:
    line = CommandLine(__doc__, ("TEST.DATA_DIR", "TEST.OUT_DIR"), "python -m tools.compare")
    line.add("run_a", metavar="RUN_A", help="folder of a run, or FOLDER:STAGE")
    line.add("run_b", metavar="RUN_B", help="the run to compare it with")
    args, cfg, given = line.parse(argv)
    a, b = read_run("A", args.run_a), read_run("B", args.run_b)
    names = [name for name in a.content["datasets"] if name in b.content["datasets"]]
    if not names:
        raise InputError(f"{a.folder} has {known(a)}, {b.folder} has {known(b)}: no dataset is in both")
    start_log(Path("log.txt"), plain(cfg))
    for run in (a, b):
        log.info("%s: %s, of %s", run.letter, run.folder, run.content.get("date", "unknown date"))
    for text in differing_options(a, b):
        log.info("%s", text)
    for run, other in ((a, b), (b, a)):
        for name in run.content["datasets"]:
            if name not in other.content["datasets"]:
                log.warning("%s is only in %s", name, run.folder)
    interval = f"{CONFIDENCE:.0%} interval"
    head = ["dataset", "protocol", "A", "B", "B - A", interval, "better", "worse", "same", ""]
    for text in (markdown(head), markdown(["---"] * len(head))):
        print(text)
    sections, results = [], [compared for name in names for compared in compare(a, b, name)]
    for each in results:
        print(markdown(each.cells()), flush=True)
    for each in results:
        for text in each.largest():
            log.info("%s", text)
    own = a.content.get("config", {}).get("TEST", {}).get("DATA_DIR")
    if own and "TEST.DATA_DIR" not in given:
        cfg = make_config([("TEST.DATA_DIR", own), ("TEST.OUT_DIR", cfg.TEST.OUT_DIR)])
    for name in names:
        try:
            dataset = find_dataset(cfg, name)
            sections.append(section(a, b, dataset, [each for each in results if each.dataset == name]))
        except InputError as error:
            log.warning("%s is not on the page: %s", name, error.in_options(ADVICE))
    if sections:
        settings = {run.letter: f"{run.folder}, {run.content.get('command', '')}" for run in (a, b)}
        settings |= dict(text.split(": ", 1) for text in differing_options(a, b))
        folder = make_output(cfg).new_run(f"compare-{'+'.join(names)}")
        log.info("the page is %s", write_report(Page("Two runs compared", settings, sections), folder / "report"))


def read_run(letter: str, text: str) -> Run:
    """Returns the run of a folder, or FOLDER:STAGE.

    Raises:
        InputError: if it is not a run of this project.
    """
    folder, _, stage = (text, "", "") if Path(text).exists() else text.rpartition(":")
    path = Path(folder or text)
    path = path.parent if path.name == "results.json" else path
    try:
        content = json.loads((path / "results.json").read_text(encoding="utf-8"))
        stages = [value for dataset in content["datasets"].values() for value in dataset.values() if is_stage(value)]
    except FileNotFoundError:
        raise InputError(
            f"{path} is not a run: it has no results.json; runs are folders in TEST.OUT_DIR/runs"
        ) from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path}/results.json is damaged, or not from a run of test.py ({error})") from None
    if not stages:
        raise InputError(f"{path}/results.json has no results of a dataset")
    return Run(letter, path.resolve() if path.is_symlink() else path, content, stage)


def is_stage(value: Any) -> bool:
    return isinstance(value, dict) and "seconds" in value


def known(run: Run) -> str:
    return ", ".join(run.content["datasets"])


def compare(a: Run, b: Run, name: str) -> list[Compared]:
    """Compares the protocols that both runs have.

    Raises:
        InputError: if the queries differ.
    """
    aps_a, aps_b = a.aps(name), b.aps(name)
    compared = []
    for protocol in (each for each in aps_a if each in aps_b):
        names = list(aps_a[protocol])
        if set(names) != set(aps_b[protocol]):
            odd = sorted(set(names) ^ set(aps_b[protocol]))
            raise InputError(f"the queries of {name} differ between the runs: {short_list(odd)} only in one")
        values = ([_ratio(of[protocol][each]) for each in names] for of in (aps_a, aps_b))
        compared.append(Compared(name, protocol, names, *map(np.array, values)))
    if not compared:
        raise InputError(f"{name} was evaluated by different protocols: {', '.join(aps_a)} and {', '.join(aps_b)}")
    return compared


def _ratio(percent: float | None) -> float:
    return math.nan if percent is None else percent / 100


def differing_options(a: Run, b: Run) -> Iterator[str]:
    """Yields a line for each option whose value differs."""
    options_a, options_b = (dict(_flat(run.content.get("config", {}))) for run in (a, b))
    for key in option_values(make_config([])):
        if options_a.get(key) != options_b.get(key):
            yield f"{key}: A {options_a.get(key)}, B {options_b.get(key)}"


def _flat(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def section(a: Run, b: Run, dataset: Dataset, results: Sequence[Compared]) -> Section:
    """Returns the section of a dataset: its queries with the results of both runs, largest changes first.

    Raises:
        InputError: if the rankings are not saved, or are not of this dataset.
    """
    name = dataset.name
    ids = {run.letter: run.ids(name) for run in (a, b)}
    missing = [run.folder for run in (a, b) if ids[run.letter] is None]
    if missing:
        raise InputError(f"{missing[0]} has no saved rankings of it")
    names = unique_names(dataset)
    if any(len(each) != len(names) for each in ids.values()) or set(names) != set(results[0].names):
        raise InputError(f"the queries of the runs differ from those that {dataset.folder} has now")
    shown = next((each for each in results if each.protocol == "M"), results[0])
    own = dict(zip(shown.names, zip(shown.a, shown.b, strict=True), strict=True))
    queries = []
    for number, (image, query) in enumerate(zip(dataset.queries, names, strict=True)):
        rankings = {
            letter: labelled_hits(dataset, number, each[number, :SHOWN].tolist()) for letter, each in ids.items()
        }
        aps = {letter: float(ap) for letter, ap in zip("AB", own[query], strict=True) if not math.isnan(ap)}
        queries.append(Query(query, image, rankings, aps))
    queries.sort(key=lambda query: max(map(abs, query.changes.values()), default=-1), reverse=True)
    lines = [f"{each.protocol}: {paired_difference(each.a, each.b)}" for each in results]
    note = f"B - A in percentage points, with the {CONFIDENCE:.0%} interval: {'; '.join(lines)}."
    order = f"The queries whose AP ({shown.protocol}) differs most come first."
    headings = {run.letter: run.title(name) for run in (a, b)}
    return Section(name, queries, order, note=note, headings=headings)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")
    run_command(main, ADVICE)
