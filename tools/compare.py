"""Compare two runs query by query: which queries improved or got worse, and whether this may be chance.

python -m tools.compare output/runs/RUN_A output/runs/RUN_B
python -m tools.compare output/runs/latest:retrieval output/runs/latest:reranking

A run is a folder in TEST.OUT_DIR/runs, optionally followed by a colon and one of its stages (by default the last).
Differences are B - A in percentage points, with the 95 % interval of a paired bootstrap over the queries: if it
contains 0, other queries of the same kind might show the opposite. A page shows the first results of both runs.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from assembly import find_dataset, start_session
from config import DATASET, CommandLine, make_config, option_values, varied
from extraction.arrays import read_arrays_of
from extraction.files import read_json
from model.errors import InputError, short_list
from report.command import run_command
from report.page import SHOWN, Page, Query, Section, labelled_hits, write_report
from report.results import OF_EACH_QUERY, PairedValues, markdown_table, paired_table, unique_names
from revisitop.bootstrap import CONFIDENCE
from revisitop.dataset import Dataset

log = logging.getLogger(__name__)


class Results(NamedTuple):
    """The results of a stage on a dataset: its name, and its metrics in percent by protocol."""

    stage: str
    metrics: dict[str, dict[str, Any]]

    def main_values(self, protocol: str) -> tuple[str, dict[str, float]]:
        """Returns the name of the main metric, and its value for each query in percent by name."""
        metrics = self.metrics[protocol]
        for key in metrics:
            if key.endswith(OF_EACH_QUERY):
                return key.removesuffix(OF_EACH_QUERY), metrics[key]
        return next(key for key in metrics if key.startswith("mAP")), metrics["AP"]

    def in_words(self, protocol: str) -> str:
        """Returns the metrics in percent as text: mAP 81.00, mP@1 90.00, mP@5 85.50."""
        return ", ".join(
            f"{key} {value:.2f}" for key, value in self.metrics[protocol].items() if isinstance(value, float)
        )


@dataclass(frozen=True)
class Run:
    """One stage of the results of a run.

    Attributes:
        letter: A or B.
        folder: the folder of the run.
        content: the content of its results.json.
        results: the results of the stage, by dataset.
    """

    letter: str
    folder: Path
    content: dict[str, Any]
    results: dict[str, Results]

    def ids(self, dataset: str) -> np.ndarray:
        """Returns the first results, (Q, R). Raises InputError if they are not saved."""
        path = self.folder / f"{dataset}_{self.results[dataset].stage.replace(' ', '_')}_ranks.npy"
        ids = read_arrays_of(path).only
        if ids is None or ids.ndim != 2 or ids.dtype.kind not in "iu":
            raise InputError(f"{path} has no rankings (Q, R)")
        return ids


def main(argv: list[str]) -> None:
    line = CommandLine(__doc__, (*DATASET, "TEST.OUT_DIR"))
    line.add("run_a", metavar="RUN_A", help="folder of a run, or FOLDER:STAGE")
    line.add("run_b", metavar="RUN_B", help="the run to compare it with")
    args, cfg, given = line.parse(argv)
    a, b = read_run("A", args.run_a), read_run("B", args.run_b)
    names = [name for name in a.results if name in b.results]
    if not names:
        only_a, only_b = (", ".join(run.results) for run in (a, b))
        raise InputError(f"{a.folder} has {only_a}, {b.folder} has {only_b}: no dataset is in both")
    session = start_session(cfg)
    for run, other in ((a, b), (b, a)):
        stages = ", ".join(dict.fromkeys(each.stage for each in run.results.values()))
        date = run.content.get("date", "unknown date")
        log.info("%s: the stage %s of %s, of %s", run.letter, stages, run.folder, date)
        for name in sorted(run.results.keys() - other.results.keys()):
            log.warning("%s is only in %s", name, run.folder)
    options = differing_options(a, b)
    for key, values in options.items():
        log.info("%s: %s", key, values)

    results = {name: compare(a, b, name) for name in names}
    every = [pairs for name in names for pairs in results[name]]
    print("\n".join(markdown_table(paired_table(every))), flush=True)
    for pairs in every:
        for text in pairs.largest():
            log.info("%s", text)
        for run in (a, b):
            name, protocol = pairs.dataset, pairs.protocol
            log.info("%s, %s, %s: %s", name, protocol, run.letter, run.results[name].in_words(protocol))

    before = {f"TEST.{key}": value for key, value in a.content.get("config", {}).get("TEST", {}).items()}
    cfg = varied(cfg, {key: before[key] for key in DATASET if key in before and key not in given})
    sections = []
    for name in names:
        try:
            sections.append(section(a, b, find_dataset(cfg, name), results[name]))
        except InputError as error:
            log.warning("%s is not on the page: %s", name, error)
    if sections:
        settings = {run.letter: f"{run.folder}, {run.content.get('command', '')}" for run in (a, b)}
        page = Page("Two runs compared", settings | options, sections)
        folder = session.output.new_run(f"compare-{'+'.join(names)}")
        log.info("the page is %s", write_report(page, folder / "report"))


def read_run(letter: str, text: str) -> Run:
    """Returns the run of a folder, or FOLDER:STAGE.

    Raises:
        InputError: if it is not a run of this project.
    """
    folder, _, stage = (text, "", "") if Path(text).exists() else text.rpartition(":")
    path = Path(folder or text)
    path = path.parent if path.name == "results.json" else path
    if not (path / "results.json").exists():
        runs = sorted(each.parent for each in path.parent.glob("2*/results.json"))  # by their dates
        hint = f"the newest there is {runs[-1]}" if runs else "runs are folders in output/runs"
        raise InputError(f"{path} is not a run, which has a results.json; {hint}")
    content, results = read_json(path / "results.json"), {}
    try:
        for name, entry in content["datasets"].items():
            stages = {key: value for key, value in entry.items() if isinstance(value, dict) and "seconds" in value}
            if stage and stage not in stages:
                raise InputError(f"{path}: {name} has no stage {stage}; it has {', '.join(stages)}")
            last = stage or [*stages][-1]
            protocols = {key: each for key, each in stages[last].items() if isinstance(each, dict) and "AP" in each}
            results[name] = Results(last, protocols)
    except (KeyError, AttributeError, TypeError, IndexError) as error:
        raise InputError(f"{path}/results.json is not from a run of test.py ({error})") from None
    return Run(letter, path.resolve() if path.is_symlink() else path, content, results)


def compare(a: Run, b: Run, name: str) -> list[PairedValues]:
    """Compares the protocols that both runs have.

    Raises:
        InputError: if the queries differ.
    """
    first, second = a.results[name], b.results[name]
    compared = []
    for protocol in (each for each in first.metrics if each in second.metrics):
        (metric, values_a), (other, values_b) = (each.main_values(protocol) for each in (first, second))
        if metric != other:
            continue
        names = list(values_a)
        if odd := sorted({*names} ^ values_b.keys()):
            raise InputError(f"the queries of {name} differ between the runs: {short_list(odd)} only in one")
        values = (np.array([of[each] for each in names], dtype=float) / 100 for of in (values_a, values_b))
        compared.append(PairedValues(name, protocol, metric, names, *values))
    if not compared:
        words = " and ".join(", ".join(each.metrics) for each in (first, second))
        raise InputError(f"{name} was evaluated by different protocols: {words}")
    return compared


def differing_options(a: Run, b: Run) -> dict[str, str]:
    """Returns the values of each option that differs, as text."""

    def value(run: Run, key: str) -> Any:
        node = run.content.get("config", {})
        for name in key.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        return node

    keys = [key for key in option_values(make_config()) if value(a, key) != value(b, key)]
    return {key: f"A {value(a, key)}, B {value(b, key)}" for key in keys}


def section(a: Run, b: Run, dataset: Dataset, results: Sequence[PairedValues]) -> Section:
    """Returns the section of a dataset: its queries with the results of both runs, largest changes first.

    Raises:
        InputError: if the rankings are not saved, or are not of this dataset.
    """
    name, names = dataset.name, unique_names(dataset)
    ids = {run.letter: run.ids(name) for run in (a, b)}
    if any(len(each) != len(names) for each in ids.values()) or {*names} != {*results[0].names}:
        raise InputError(f"the queries of the runs differ from those that {dataset.folder} has now")
    shown = next((each for each in results if each.protocol == "M"), results[0])
    pairs = dict(zip(shown.names, zip(shown.a, shown.b, strict=True), strict=True))
    queries = []
    for number, (image, query) in enumerate(zip(dataset.queries, names, strict=True)):
        rankings = {
            letter: [*labelled_hits(dataset, number, each[number, :SHOWN].tolist()).values()]
            for letter, each in ids.items()
        }
        values = {letter: float(each) for letter, each in zip("AB", pairs[query], strict=True) if not math.isnan(each)}
        queries.append(Query(query, image, rankings, values))
    queries.sort(key=lambda query: max(map(abs, query.changes.values()), default=-1), reverse=True)
    lines = [f"{each.protocol}: {each.difference}" for each in results]
    note = f"B - A in percentage points, with the {CONFIDENCE:.0%} interval: {'; '.join(lines)}."
    order = f"The queries whose {shown.metric} ({shown.protocol}) differs most come first."
    headings = {run.letter: f"{run.letter}: {run.results[name].stage} of {run.folder.name}" for run in (a, b)}
    return Section(name, queries, order, note=note, headings=headings, value=shown.metric.replace("mAP", "AP"))


if __name__ == "__main__":
    run_command(main)
