"""Published facts: the paper's results, independent reproductions, and what the original datasets contain."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any


@cache
def published() -> dict[str, Any]:
    """Returns the content of published.json."""
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def find_figures(figures: Sequence[dict], depth: int, stage: str, distractors: bool, name: str) -> dict[str, float]:
    """Returns mAP in percent by protocol for a dataset; empty if it is not among the figures.

    Args:
        figures: the paper's, or those of a reproduction.
        depth: of the network.
        stage: "retrieval" or "reranking".
        distractors: whether with a million distractors.
    """
    setting = {"depth": depth, "stage": stage, "distractors": distractors}
    return next((each[name] for each in figures if setting.items() <= each.items() and name in each), {})


def nearest_reproduction(
    depth: int, stage: str, distractors: bool, name: str, maps: dict[str, float]
) -> dict[str, float]:
    """Returns, for each protocol, the independently reproduced mAP that is nearest to ours; without those of nobody.

    Args:
        depth, stage, distractors, name: as in find_figures.
        maps: our mAP in percent by protocol.
    """
    found: dict[str, float] = {}
    for each in published()["reproductions"]:
        for protocol, value in find_figures(each["figures"], depth, stage, distractors, name).items():
            if abs(value - maps[protocol]) < abs(found.get(protocol, float("inf")) - maps[protocol]):
                found[protocol] = value
    return found
