"""The results of a run: lines of the log, results.json, the rankings on disk, the summary."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from model.store import write_json
from revisitop.dataset import Dataset
from revisitop.evaluate import KAPPAS, PROTOCOLS, Metrics
from revisitop.retrieve import SAVED_RANKS, Ranking


@dataclass(frozen=True)
class Evaluated:
    """The rankings of a dataset and their metrics, by stage: "retrieval", then one for each reranker.

    Attributes:
        facts: what else is told of the dataset's run, for results.json.
    """

    dataset: Dataset
    rankings: dict[str, Ranking]
    metrics: dict[str, dict[str, Metrics]]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.dataset.name}{' + distractors' if 'distractors' in self.facts else ''}"

    def as_dict(self) -> dict[str, Any]:
        """For results.json, with the AP of each query by its name, in percent."""
        names = unique_names(self.dataset)
        sizes = {"queries": len(self.dataset.queries), "database": len(self.dataset.database)}
        stages = {
            stage: {
                "seconds": ranking.seconds,
                **{
                    name: {
                        "mAP": 100 * metrics.map,
                        **{f"mP@{k}": 100 * value for k, value in zip(KAPPAS, metrics.mp_at_k, strict=True)},
                        "AP": dict(zip(names, (100 * metrics.ap).tolist(), strict=True)),
                    }
                    for name, metrics in self.metrics[stage].items()
                },
            }
            for stage, ranking in self.rankings.items()
        }
        return {**sizes, **self.facts, **stages}

    def lines(self) -> Iterator[str]:
        """The log's lines: mAP, mP@k and the time of each stage."""
        for stage, ranking in self.rankings.items():
            for line in in_words(self.metrics[stage]):
                yield f"{stage.capitalize()} results: {line}"
            yield f"{stage} took {ranking.seconds:.2f} s for {len(self.dataset.queries)} queries"


def unique_names(dataset: Dataset) -> list[str]:
    """Returns the queries' names; one that stands there before gets the number of its place in the list."""
    seen: set[str] = set()
    names = []
    for number, image in enumerate(dataset.queries):
        name = image.path.stem
        names.append(f"{name} ({number})" if name in seen else name)
        seen.add(name)
    return names


def in_words(metrics: Mapping[str, Metrics]) -> list[str]:
    """The metrics of each protocol in percent: mAP, then mP@k."""
    maps = ", ".join(f"{name}: {100 * each.map:.2f}" for name, each in metrics.items())
    precisions = [
        f"{name}: " + " ".join(f"{100 * value:.2f}" for value in each.mp_at_k) for name, each in metrics.items()
    ]
    return [f"mAP {maps}", f"mP@{','.join(map(str, KAPPAS))} {', '.join(precisions)}"]


def save_results(folder: Path, head: dict[str, Any], results: list[Evaluated]) -> None:
    """Writes results.json, and the first ranks of the last dataset's rankings as <dataset>_<stage>_ranks.npy."""
    latest = results[-1]
    for stage, ranking in latest.rankings.items():
        path = folder / f"{latest.dataset.name}_{stage.replace(' ', '_')}_ranks.npy"
        np.save(path, ranking.ids[:, :SAVED_RANKS].numpy())
    datasets = {each.dataset.name: each.as_dict() for each in results}
    write_json(folder / "results.json", {**head, "datasets": datasets})


def summary(results: list[Evaluated]) -> Iterator[str]:
    """A line of mAP for each dataset and stage, below a heading."""
    yield f"{'mAP in percent':<36}{'Easy':>8}{'Medium':>8}{'Hard':>8}"
    for each in results:
        for stage, metrics in each.metrics.items():
            values = "".join(f"{100 * metrics[protocol].map:8.2f}" for protocol in PROTOCOLS)
            yield f"{f'{each.title}, {stage}':<36}{values}"
