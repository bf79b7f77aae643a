"""The results of a run: its lines in the log, results.json, saved rankings, and the summary."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from extraction.images import ImageFile
from extraction.store import write_json
from modules.explanation import Explanation
from modules.matching import Match
from revisitop.dataset import Dataset
from revisitop.evaluate import Metrics
from revisitop.layout_csv import write_predictions
from revisitop.measures import CHALLENGE, LAST
from revisitop.retrieve import SAVED_RANKS, Ranking


@dataclass(frozen=True)
class Evaluated:
    """The rankings of a dataset and their metrics by stage: "retrieval", then one stage per reranker.

    Attributes:
        facts: further facts about the run on this dataset, for results.json.
        explanations: explanations of results for the page, by the number of their query.
        matches: where these results match the query, by its number, as far as it is known.
        distractors: the images of the distractors, which follow the database, as far as they are known.
    """

    dataset: Dataset
    rankings: dict[str, Ranking]
    metrics: dict[str, dict[str, Metrics]]
    facts: dict[str, Any] = field(default_factory=dict)
    explanations: Mapping[int, Explanation] = field(default_factory=dict)
    matches: Mapping[int, Match] = field(default_factory=dict)
    distractors: Sequence[ImageFile] = ()

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
                    }
                    for name, metrics in self.metrics[stage].items()
                },
            }
            for stage, ranking in self.rankings.items()
        }
        return {**sizes, **self.facts, **stages}

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
    """Returns the values at k in percent as text, such as "90.00 85.50 81.20"; nothing for values that are NaN."""
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
    """Yields a line of mAP per dataset and stage, with a heading for each group of datasets with equal protocols."""
    before = None
    for each in results:
        if each.dataset.protocols != before:
            before = each.dataset.protocols
            titles = "".join(f"{protocol.title:>8}" for protocol in before)
            yield f"{f'{before[0].measure.title} in percent':<36}{titles}"
        title = f"{each.dataset.name}{' + distractors' if 'distractors' in each.facts else ''}"
        for stage, metrics in each.metrics.items():
            values = "".join(f"{100 * metrics[protocol.name].map:8.2f}" for protocol in before)
            yield f"{f'{title}, {stage}':<36}{values}"


def markdown(cells: Sequence[str]) -> str:
    """Returns a row of a table in Markdown."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
