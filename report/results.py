"""The results of a run: its lines in the log, results.json, saved rankings, and the summary."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from extraction.images import ImageFile
from extraction.store import write_json
from modules.explanation import Explanation
from report.drawing import MatchDrawing
from revisitop.bootstrap import CONFIDENCE, Difference, paired_difference
from revisitop.dataset import Dataset
from revisitop.evaluate import Metrics
from revisitop.layout_csv import write_predictions
from revisitop.measures import CHALLENGE, LAST
from revisitop.retrieve import SAVED_RANKS, Ranking

OF_EACH_QUERY = " of each query"  # the end of the name of a main metric that is not AP, in results.json
_LISTED = 5  # number of queries with the largest gains and losses


@dataclass(frozen=True)
class PairedValues:
    """The values of the same queries in two rankings A and B, by one protocol.

    Attributes:
        dataset, protocol, metric: their names; the metric is the mean of the values.
        names: the names of the queries.
        a, b: (Q,), between 0 and 1; NaN for a query without a value in this protocol.
    """

    dataset: str
    protocol: str
    metric: str
    names: list[str]
    a: np.ndarray
    b: np.ndarray

    @cached_property
    def difference(self) -> Difference:
        return paired_difference(self.a, self.b)

    def cells(self) -> list[str]:
        """Returns a row of a table, in percent; see paired_table."""
        changes = self.b - self.a
        counts = [(changes > 0).sum(), (changes < 0).sum(), (changes == 0).sum()]
        means = [f"{100 * np.nanmean(each):.2f}" if self.difference.queries else "" for each in (self.a, self.b)]
        mean, low, high = (f"{100 * each:+.2f}" for each in self.difference[:3])
        words = "may be chance" if self.difference.is_within_chance and counts[0] + counts[1] else ""
        return [
            *(self.dataset, self.protocol, self.metric, *means, mean, f"{low} to {high}"),
            *(*map(str, counts), words),
        ]

    def largest(self) -> Iterator[str]:
        """Yields a line with the largest gains, and one with the largest losses."""
        changes = np.nan_to_num(self.b - self.a)
        order = np.argsort(-changes, kind="stable")
        for word, numbers in (("better", order[changes[order] > 0]), ("worse", order[::-1][changes[order[::-1]] < 0])):
            if listed := ", ".join(f"{self.names[i]} {100 * changes[i]:+.1f}" for i in numbers[:_LISTED]):
                yield f"{self.dataset}, {self.protocol}, {word} most: {listed}"


def paired_table(pairs: Iterable[PairedValues], a: str = "A", b: str = "B") -> list[list[str]]:
    """Returns the cells of a table of paired values, its heading first."""
    heading = ["dataset", "protocol", "metric", a, b, f"{b} - {a}", f"{CONFIDENCE:.0%} interval"]
    return [[*heading, "better", "worse", "same", ""], *(each.cells() for each in pairs)]


@dataclass(frozen=True)
class Evaluated:
    """The rankings of a dataset and their metrics by stage: "retrieval", then one stage per reranker.

    Attributes:
        facts: further facts about the run on this dataset, for results.json.
        explanations: explanations of results for the page, by the number of their query.
        matches: drawings of where these results match the query, by its number, as far as they are known.
        distractors: the images of the distractors, which follow the database, as far as they are known.
    """

    dataset: Dataset
    rankings: dict[str, Ranking]
    metrics: dict[str, dict[str, Metrics]]
    facts: dict[str, Any] = field(default_factory=dict)
    explanations: Mapping[int, Explanation] = field(default_factory=dict)
    matches: Mapping[int, MatchDrawing] = field(default_factory=dict)
    distractors: Sequence[ImageFile] = ()

    def pair(self, a: str, b: str, protocol: str) -> PairedValues:
        """Returns the values of the queries in two stages, by a protocol."""
        first, second = self.metrics[a][protocol], self.metrics[b][protocol]
        metric, names = first.protocol.measure.main_title, unique_names(self.dataset)
        return PairedValues(self.dataset.name, protocol, metric, names, first.values, second.values)

    def as_dict(self) -> dict[str, Any]:
        """Returns the results for results.json, with the AP of each query in percent by its name."""
        names = unique_names(self.dataset)
        sizes = {"queries": len(self.dataset.queries), "database": len(self.dataset.database)}
        stages = {
            stage: {
                "seconds": ranking.seconds,
                **{
                    name: {
                        metrics.protocol.measure.title: 100 * metrics.map,
                        **at_k(metrics),
                        **{f"{which} rank of the first positive": rank for which, rank in metrics.first.items()},
                        "AP": dict(zip(names, (100 * metrics.ap).tolist(), strict=True)),
                        **self._main_values(metrics, names),
                    }
                    for name, metrics in self.metrics[stage].items()
                },
            }
            for stage, ranking in self.rankings.items()
        }
        return {**sizes, **self.facts, **stages}

    def _main_values(self, metrics: Metrics, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Returns the main metric of each query in percent by its name, if it is not AP."""
        if metrics.values is metrics.ap:
            return {}
        title = f"{metrics.protocol.measure.main_title}{OF_EACH_QUERY}"
        return {title: dict(zip(names, (100 * metrics.values).tolist(), strict=True))}

    def lines(self) -> Iterator[str]:
        """Yields the lines for the log: mAP, values at k, and the time of each stage."""
        for stage, ranking in self.rankings.items():
            for line in metric_lines(self.metrics[stage]):
                yield f"{stage.capitalize()} results: {line}"
            yield f"{stage} took {ranking.seconds:.2f} s for {len(self.dataset.queries)} queries"


def unique_names(dataset: Dataset) -> list[str]:
    """Returns the names of the queries; repeated names are followed by the number of the query."""
    seen: set[str] = set()
    names = []
    for number in range(len(dataset.queries)):
        name = dataset.query_name(number)
        names.append(f"{name} ({number})" if name in seen else name)
        seen.add(name)
    return names


def at_k(metrics: Metrics) -> dict[str, float]:
    """Returns the values at k in percent, by their names, such as mP@1."""
    measure = metrics.protocol.measure
    kappas = measure.kappas[: len(metrics.at_k)]
    return {f"{measure.at}@{k}": 100 * value for k, value in zip(kappas, metrics.at_k.tolist(), strict=True)}


def at_k_in_words(metrics: Metrics) -> str:
    """Returns the values at k in percent as text, such as "90.00 85.50 81.20"; "" if they are NaN."""
    return " ".join(f"{100 * value:.2f}" for value in metrics.at_k if not math.isnan(value))


def metric_lines(metrics: Mapping[str, Metrics]) -> list[str]:
    """Returns the metrics of all protocols in percent as lines: mAP, values at k, ranks of the first positive."""
    first = next(iter(metrics.values()))
    measure = first.protocol.measure
    maps = ", ".join(f"{name}: {100 * each.map:.2f}" for name, each in metrics.items())
    precisions = [f"{name}: " + " ".join(f"{100 * value:.2f}" for value in each.at_k) for name, each in metrics.items()]
    lines = [f"{measure.title} {maps}", f"{first.at_k_title} {', '.join(precisions)}"]
    if measure is CHALLENGE:
        firsts = [
            f"{name}: {each.first['mean']:.2f}, {each.first['median']:g}"
            for name, each in metrics.items()
            if each.first
        ]
        lines.append(f"rank of the first positive, mean and median: {'; '.join(firsts)}")
    return lines


def save_results(folder: Path, head: dict[str, Any], results: list[Evaluated]) -> None:
    """Writes results.json, and the first results of the latest dataset as <dataset>_<stage>_ranks.npy."""
    latest = results[-1]
    for stage, ranking in latest.rankings.items():
        path = folder / f"{latest.dataset.name}_{stage.replace(' ', '_')}_ranks.npy"
        np.save(path, ranking.ids[:, :SAVED_RANKS].numpy())
        if latest.dataset.protocols[0].measure is CHALLENGE and "distractors" not in latest.facts:
            predictions = path.with_name(path.name.replace("_ranks.npy", "_predictions.csv"))
            write_predictions(
                predictions, latest.dataset.query_names, latest.dataset.names, ranking.ids[:, :LAST].numpy()
            )
    datasets = {each.dataset.name: each.as_dict() for each in results}
    write_json(folder / "results.json", {**head, "datasets": datasets})


def summary(results: list[Evaluated]) -> Iterator[str]:
    """Yields the main metric of each dataset and stage, with a heading for each group of equal protocols."""
    before = None
    for each in results:
        if each.dataset.protocols != before:
            before = each.dataset.protocols
            titles = "".join(f"{protocol.title:>8}" for protocol in before)
            yield f"{f'{before[0].measure.main_title} in percent':<36}{titles}"
        title = f"{each.dataset.name}{' + distractors' if 'distractors' in each.facts else ''}"
        for stage, metrics in each.metrics.items():
            values = "".join(f"{100 * metrics[protocol.name].main:8.2f}" for protocol in before)
            yield f"{f'{title}, {stage}':<36}{values}"


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table in Markdown, given its cells, the heading first."""
    heading, *others = rows
    lines = [[cell.replace("|", "\\|") for cell in cells] for cells in (heading, ["---"] * len(heading), *others)]
    return [f"| {' | '.join(cells)} |" for cells in lines]
