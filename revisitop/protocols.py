"""Evaluation protocols: which lists of the ground truth are positive, and what is measured."""

from collections.abc import Sequence
from dataclasses import dataclass

from revisitop.measures import CHALLENGE, INSTANCES, PLACES, RECALL, REVISITED, Measure


@dataclass(frozen=True)
class Protocol:
    """A protocol to evaluate rankings. Listed images that are not positive are removed from the ranking.

    Attributes:
        name: the short name in the log, such as E.
        title: the name in tables, such as Easy.
        positive: the kinds of the ground truth that are positive.
        measure: what is measured.
        usage: restricts the protocol to the queries of this usage; None for all.
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
PLACE_PROTOCOLS = (Protocol("all", "All", ("near",), PLACES),)
INSTANCE_PROTOCOLS = (Protocol("all", "All", ("same object",), INSTANCES),)


def challenge_protocols(usages: Sequence[str]) -> tuple[Protocol, ...]:
    """Returns protocols with GLDv2's metric for each usage; "all" if the solution has no usages."""
    if not usages:
        return (Protocol("all", "All", ("relevant",), CHALLENGE),)
    return tuple(Protocol(usage, usage, ("relevant",), CHALLENGE, usage) for usage in usages)
