"""Likely causes of a difference from published results, by the measured patterns of classic mistakes."""

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import revisitop

SIGNATURES = Path(revisitop.__file__).with_name("signatures.json")
TOLERANCE = 0.1  # of mAP in percent: figures are published with one decimal

Pattern = Mapping[str, float]  # differences in mAP, in percent, by stage and protocol: {"retrieval M": -0.4, ...}


class Mistake(NamedTuple):
    """A classic mistake: in words, the option that makes it, and whether it can be in the data of a single dataset."""

    words: str
    option: str = ""
    in_data: bool = False


MISTAKES = {
    "antialias": Mistake("images are resized with antialiasing, the default of torchvision since 0.17"),
    "RGB": Mistake("the network is given R, G, B instead of B, G, R"),
    "no crop": Mistake("queries are not cropped to their boxes", in_data=True),
    "one scale": Mistake("one scale instead of three", "TEST.SCALE_LIST"),
    "EXIF": Mistake("images are rotated, or their EXIF orientation is ignored", in_data=True),
    "plain ReLU": Mistake("ReLU instead of ReLU+", "SupG.relup"),
    "S2": Mistake("reranking by the paper's text (S2 of the original rows), not its released code", "SupG.rerank_s2"),
    "half": Mistake("the network is computed in half precision (bf16, fp16)", "TEST.PRECISION"),
    "resized": Mistake("the images are resized copies", in_data=True),
    "junk": Mistake("junk images are not ignored", in_data=True),
}


@cache
def signatures() -> dict[str, dict[str, Pattern]]:
    """Returns the measured pattern of each mistake that changes a set, by set and mistake."""
    return json.loads(SIGNATURES.read_text(encoding="utf-8"))


def differs(pattern: Pattern) -> bool:
    """Returns whether a difference is above the tolerance, at the precision of published figures."""
    return any(round(abs(value), 1) > TOLERANCE for value in pattern.values())


def causes(
    results: Sequence[tuple[str, Pattern]], measured: Mapping[str, Mapping[str, Pattern]] | None = None
) -> list[str]:
    """Returns the mistakes by how well their measured patterns fit, best first.

    A mistake in the data is compared with the results on the datasets that differ, any other one with all results.

    Args:
        results: the name of a dataset and the differences on it, for each network.
        measured: the signatures; by default all.
    """
    sets = signatures() if measured is None else measured
    names = {name for name, pattern in results if differs(pattern)}

    def misfit(mistake: str) -> float:
        rows = [rows[mistake] for rows in sets.values() if mistake in rows]
        patterns = [pattern for name, pattern in results if name in names or not MISTAKES[mistake].in_data]
        fits = [min((distance(pattern, each) for each in rows), default=math.inf) for pattern in patterns]
        return sum(fits) / max(1, len(fits))

    fits = {mistake: misfit(mistake) for mistake in MISTAKES}
    return sorted((mistake for mistake, fit in fits.items() if fit < math.inf), key=fits.__getitem__)


def distance(a: Pattern, b: Pattern) -> float:
    """Returns how far two patterns are apart in signs and orders of magnitude, over the metrics that both have."""
    squares = [(math.asinh(10 * a[key]) - math.asinh(10 * b[key])) ** 2 for key in a.keys() & b.keys()]
    return math.sqrt(sum(squares) / len(squares)) if squares else math.inf
