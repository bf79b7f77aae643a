"""The ways to judge a ranking: which lists of the ground truth are positive, and what is measured."""

from collections.abc import Sequence
from dataclasses import dataclass

from revisitop.measures import CHALLENGE, RECALL, REVISITED, Measure


@dataclass(frozen=True)
class Protocol:
    """A way to judge the rankings of a dataset. Listed images that are not positive leave the ranking.

    Attributes:
        name: short, as in the log: E.
        title: as in tables: Easy.
        positive: the kinds of the ground truth that are positive.
        measure: what is measured.
        usage: the queries of this usage alone; None for all.
    """

    name: str
    title: str
    positive: tuple[str, ...]
    measure: Measure = REVISITED
    usage: str | None = None


REVISITED_PROTOCOLS = (
    Protocol("E", "Easy", ("easy",)),
    Protocol("M", "Medium", ("easy", "hard")),
    Protocol("H", "Hard", ("hard",)),
)
OK_PROTOCOLS = (Protocol("all", "All", ("ok",), RECALL),)
CLASS_PROTOCOLS = (Protocol("all", "All", ("same class",), RECALL),)


def challenge_protocols(usages: Sequence[str]) -> tuple[Protocol, ...]:
    """GLDv2's metric, apart for each usage; "all" where the solution tells none."""
    if not usages:
        return (Protocol("all", "All", ("relevant",), CHALLENGE),)
    return tuple(Protocol(usage, usage, ("relevant",), CHALLENGE, usage) for usage in usages)
