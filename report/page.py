"""A run as one HTML page: its metrics and curves, and what each query found before and after reranking.

The page needs nothing beside itself: style and images are inside it, and there is no script. What it
shows is plain data (Page, Section, Query, Hit), so that rankings without ground truth can be shown, too.
"""

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from PIL import Image
from tqdm import tqdm

from model.errors import InputError, short_list
from model.images import ImageError, ImageFile
from report.drawing import draw_curves, jpeg_uri, read_thumbnail
from report.results import Evaluated
from revisitop.dataset import Dataset
from revisitop.evaluate import Metrics, query_aps
from revisitop.explained import Explained
from revisitop.protocols import REVISITED_PROTOCOLS, Protocol

log = logging.getLogger(__name__)

SHOWN = 10  # results of a query
PAGE_BYTES = 15_000_000
# Side of a result's thumbnail in pixels and JPEG quality; the first with which the page is small enough is taken.
_SIZES = ((192, 75), (176, 70), (160, 65), (144, 55), (120, 50), (96, 40), (64, 30))
_QUERY_SCALE = 2  # a query's image has sides as many times longer
_MAX_IMAGES = 3500  # what surely fits at the smallest size, even noise with long names


@dataclass(frozen=True)
class Hit:
    """One place of a ranking.

    Attributes:
        name: as the page shows it.
        image: the image, or None where there is none; a file that is missing or damaged does no harm.
        score: what the ranking is ordered by; None where that is not known.
        label: easy, hard, right, ignored or wrong; None without ground truth.
        moved: places that reranking gained it (before and after reranking the same number), below 0 where it lost
            some; None where that is not known.
    """

    name: str
    image: ImageFile | None
    score: float | None
    label: str | None = None
    moved: int | None = None


@dataclass(frozen=True)
class Term:
    """A neighbour of a candidate, see modules.explanation.Neighbour."""

    hit: Hit
    weight: float
    to_query: float
    to_expanded: float


@dataclass(frozen=True)
class Why:
    """Why a result stands where it does after reranking, see modules.explanation.Explanation.

    Attributes:
        hit: the result that is explained.
        before, after: its places, from 0.
        original: whether the expanded query met the candidate's own row.
    """

    hit: Hit
    before: int
    after: int
    cosine: float
    s1: float
    s2: float
    score: float
    neighbours: list[Term]
    chosen: list[Hit]
    original: bool = False

    @property
    def images(self) -> list[ImageFile]:
        hits = (self.hit, *(term.hit for term in self.neighbours), *self.chosen)
        return [hit.image for hit in hits if hit.image is not None]


@dataclass(frozen=True)
class Query:
    """A query and its first results.

    Attributes:
        name: as the page shows it.
        image: the image; its box, if any, is drawn on it.
        rankings: the first results of each stage, best first: the search's, then those of each reranking.
        aps: average precision of each stage, between 0 and 1; empty without ground truth or positives.
        why: the explanation of one result, or None.
    """

    name: str
    image: ImageFile
    rankings: dict[str, list[Hit]]
    aps: dict[str, float] = field(default_factory=dict)
    why: Why | None = None

    @property
    def images(self) -> list[ImageFile]:
        """Those of its results, and of the explanation."""
        hits = (hit for ranking in self.rankings.values() for hit in ranking)
        return [*(hit.image for hit in hits if hit.image is not None), *(self.why.images if self.why else ())]

    @property
    def changes(self) -> dict[str, float]:
        """By how many percentage points, with one decimal, each reranking changed the AP of the search."""
        first, *later = self.aps or [""]
        return {stage: round(100 * (self.aps[stage] - self.aps[first]), 1) + 0.0 for stage in later}  # no -0.0


@dataclass(frozen=True)
class Section:
    """A part of the page: a dataset, or a folder.

    Attributes:
        name: its heading.
        queries: in the order in which they are shown.
        order: that order in words, a sentence; "" says nothing about it.
        metrics: per stage ("retrieval", "reranking") and protocol (E, M, H); empty without ground truth.
        note: a sentence below the heading.
        omitted: queries that are not shown.
        plots: pictures below the note, each with alt, light and dark, see report/drawing.py.
        caption: of the plots.
        tables: below them.
        headings: of the stages' rankings; by default they tell what orders them.
    """

    name: str
    queries: list[Query]
    order: str = ""
    metrics: dict[str, dict[str, Metrics]] = field(default_factory=dict)
    note: str = ""
    omitted: int = 0
    plots: list[dict[str, str]] = field(default_factory=list)
    caption: str = ""
    tables: "list[Table]" = field(default_factory=list)
    headings: dict[str, str] = field(default_factory=dict)

    @property
    def labels(self) -> set[str]:
        """Those of its results."""
        hits = (hit for query in self.queries for ranking in query.rankings.values() for hit in ranking)
        return {hit.label for hit in hits if hit.label is not None}

    @property
    def protocols(self) -> list[Protocol]:
        return [each.protocol for each in next(iter(self.metrics.values()), {}).values()]

    def changed(self) -> "list[Changed]":
        """What each reranking did to the queries' AP."""
        changed = []
        for stage in dict.fromkeys(stage for query in self.queries for stage in query.changes):
            compared = [query for query in self.queries if stage in query.changes]
            compared.sort(key=lambda query, stage=stage: -query.changes[stage])
            gains = [query for query in compared if query.changes[stage] > 0]
            losses = [query for query in reversed(compared) if query.changes[stage] < 0]
            changed.append(Changed(stage, gains, losses, len(compared) - len(gains) - len(losses)))
        return changed


class Table(NamedTuple):
    """Cells of text; the first row is the heading."""

    caption: str
    rows: list[list[str]]


class Changed(NamedTuple):
    """The queries whose AP a reranking raised and lowered, the largest change first, and how many it left."""

    stage: str
    gains: list[Query]
    losses: list[Query]
    left: int


@dataclass(frozen=True)
class Page:
    """All that write_report shows.

    Attributes:
        title: of the page.
        settings: what the run depended on, by name.
        sections: one per dataset.
    """

    title: str
    settings: dict[str, str]
    sections: list[Section]

    @property
    def tables(self) -> list[tuple[list[Protocol], list[Section]]]:
        """The sections with metrics, those of the same protocols together."""
        tables: list[tuple[list[Protocol], list[Section]]] = []
        for section in self.sections:
            if section.metrics:
                same = next((sections for protocols, sections in tables if protocols == section.protocols), None)
                if same is None:
                    tables.append((section.protocols, [section]))
                else:
                    same.append(section)
        return tables


def evaluated_page(
    head: dict[str, Any], results: Sequence[Evaluated], distractors: Sequence[ImageFile], options: dict[str, Any]
) -> Page:
    """Returns the page of a run: when and how it was made, every option, and a section per dataset.

    Args:
        head: of the run, see report.log.start_log, with its device.
        distractors: the images of the rows behind the database's, as far as they are known.
        options: each option's value.
    """
    settings = {name: head[name] for name in ("date", "command", "device")}
    settings["versions"] = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    for each in results:
        if "checkpoint" in each.facts:
            settings[f"checkpoint of {each.dataset.name}"] = "{path}, SHA-256 {sha256}".format(
                **each.facts["checkpoint"]
            )
        else:
            known = ", ".join(f"{key} {value}" for key, value in (each.facts["made_from"] or {}).items())
            settings[f"descriptors of {each.dataset.name}"] = f"{each.facts['features']}, {known or 'origin unknown'}"
    settings |= {key: str(value) for key, value in options.items()}
    sections = [evaluated_section(each, distractors) for each in results]
    method = "Saved descriptors" if any("features" in each.facts for each in results) else "SuperGlobal"
    return Page(f"{method} on {', '.join(each.dataset.name for each in results)}", settings, sections)


def evaluated_section(evaluated: Evaluated, distractors: Sequence[ImageFile] = ()) -> Section:
    """Returns a dataset's part of the page. AP is Medium's, or that of the query's only protocol.

    Args:
        distractors: see evaluated_page.
    """
    dataset, own = evaluated.dataset, len(evaluated.dataset.database)
    queries = []
    all_aps = {stage: query_aps(metrics) for stage, metrics in evaluated.metrics.items()}
    for i, image in enumerate(dataset.queries):
        ids = {stage: ranking.ids[i].tolist() for stage, ranking in evaluated.rankings.items()}
        scores = {stage: ranking.scores[i, :SHOWN].tolist() for stage, ranking in evaluated.rankings.items()}
        gained = moves(ids)
        rankings = {
            stage: labelled_hits(dataset, i, own_ids[:SHOWN], scores[stage], distractors, gained[stage])
            for stage, own_ids in ids.items()
        }
        aps = {stage: float(own[i]) for stage, own in all_aps.items()}
        aps = {stage: ap for stage, ap in aps.items() if not math.isnan(ap)}
        explained = evaluated.explained
        why = explained_hit(dataset, explained, distractors) if explained and explained.query == i else None
        queries.append(Query(dataset.query_name(i), image, rankings, aps, why))
    which = " (Medium)" if dataset.protocols == REVISITED_PROTOCOLS else ""
    if len(evaluated.rankings) > 1:
        queries.sort(key=lambda query: max(map(abs, query.changes.values()), default=-1), reverse=True)
        order = f"The queries whose AP{which} reranking changed most, up or down, come first."
    else:
        queries.sort(key=lambda query: query.aps.get("retrieval", math.inf))
        order = f"The queries with the lowest AP{which} come first."
    note = f"{len(dataset.queries)} queries, {own:,} database images"
    if "distractors" in evaluated.facts:
        note += f", {evaluated.facts['distractors']:,} distractors"
    if "note" in evaluated.facts:
        note += f". {evaluated.facts['note'].capitalize()}"
    plots = draw_curves(evaluated.metrics)
    caption = "Interpolated precision, the mean over the queries; ignored images have left the rankings."
    return Section(dataset.name, queries, order, evaluated.metrics, f"{note}.", plots=plots, caption=caption)


def labelled_hits(
    dataset: Dataset,
    query: int | None,
    ids: Sequence[int],
    scores: Sequence[float] | None = None,
    distractors: Sequence[ImageFile] = (),
    moved: Sequence[int | None] | None = None,
) -> list[Hit]:
    """A query's results, with what the ground truth says of them.

    Args:
        query: its number; None where there is no ground truth.
        ids: database numbers, best first, -1 for none; distractors count from the database's end.
        scores: of them; None where they are not known.
        distractors: their images, as far as they are known.
        moved: places that each gained; None where they are not known.
    """
    own, kinds = len(dataset.database), {} if query is None else dataset.ground_truth[query].kinds
    labels = {number: label_of(kind) for kind, numbers in kinds.items() for number in numbers.tolist()}
    other = None if query is None else "wrong"
    found = []
    unknown = [None] * len(ids)
    for number, score, places in zip(ids, scores or unknown, moved or unknown, strict=True):
        if number < 0:  # a saved ranking may end before
            continue
        if number < own:
            image, name = dataset.database[number], dataset.database_name(number)
        else:
            image = distractors[number - own] if number - own < len(distractors) else None
            name = f"distractor {number - own}"
        found.append(Hit(name, image, score, labels.get(number, other), places))
    return found


def explained_hit(dataset: Dataset, explained: Explained, distractors: Sequence[ImageFile] = ()) -> Why:
    """The explanation with its images, and what the ground truth says of them."""

    def hits(places: Sequence[int]) -> list[Hit]:
        return labelled_hits(dataset, explained.query, explained.ids[list(places)].tolist(), None, distractors)

    reason = explained.explanation
    near = hits([each.place for each in reason.neighbours])
    return Why(
        hit=near[0],
        **{name: getattr(reason, name) for name in ("before", "after", "cosine", "s1", "s2", "score")},
        neighbours=[Term(hit, *term[1:]) for hit, term in zip(near, reason.neighbours, strict=True)],
        chosen=hits(reason.chosen),
        original=explained.original,
    )


def moves(ids: dict[str, list[int]]) -> dict[str, list[int | None]]:
    """By how many places each of the first results of each stage moved up from the first stage, below 0 down.

    The first stage's results have the places that they will gain, if just one stage follows it. None where a result
    is not in both rankings.

    Args:
        ids: the whole rankings of the stages, database numbers.
    """
    first, *later = ids
    before = {number: place for place, number in enumerate(ids[first])}
    gained: dict[str, list[int | None]] = {first: [None] * SHOWN}
    for stage in later:
        after = {number: place for place, number in enumerate(ids[stage])}
        change = {number: before[number] - after[number] for number in before.keys() & after.keys()}
        gained[stage] = [change.get(number) for number in ids[stage][:SHOWN]]
        if len(later) == 1:
            gained[first] = [change.get(number) for number in ids[first][:SHOWN]]
    gained[first] = gained[first][: len(ids[first])]
    return gained


def label_of(kind: str) -> str:
    """The frame of an image of this kind of the ground truth."""
    if kind in ("easy", "hard"):
        return kind
    return "ignored" if kind in ("junk", "itself") else "right"


def write_report(page: Page, folder: Path) -> Path:
    """Writes folder/index.html, below PAGE_BYTES, whole or not at all, and returns its path.

    Thumbnails shrink where the page would become too large. Images that cannot be read are shown as
    empty frames with their names.

    Raises:
        InputError: where it cannot be written.
    """
    page = replace(page, sections=_first_queries(page.sections))
    template = environment().get_template("page.html")
    originals = _read_images(page.sections)
    for side, quality in _SIZES:
        thumbnails = {
            (image, scale): jpeg_uri(original, scale * side, quality) for (image, scale), original in originals.items()
        }
        uri = partial(_uri, thumbnails)
        html = template.render(page=page, uri=uri, query_scale=_QUERY_SCALE).encode("utf-8", errors="replace")
        # a name on the disk need not be UTF-8
        if len(html) < PAGE_BYTES:
            break
    path, new = folder / "index.html", folder / "index.html.new"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        new.write_bytes(html)
        os.replace(new, path)
    except OSError as error:
        raise InputError(f"the report {path} cannot be written ({error.strerror}); all else is") from None
    return path


def _uri(thumbnails: dict[tuple[ImageFile, int], str], image: ImageFile, scale: int) -> str | None:
    return thumbnails.get((image, scale))


def environment() -> jinja2.Environment:
    """Returns what renders the templates of this folder: every value is escaped."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["signed"] = lambda value: f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")
    return made


def _first_queries(sections: Sequence[Section]) -> list[Section]:
    """The sections, cut after the queries that one page can show."""
    left, cut = _MAX_IMAGES, []
    for section in sections:
        used = list(accumulate(1 + len(query.images) for query in section.queries))
        count = sum(number <= left for number in used)
        left -= used[count - 1] if count else 0
        cut.append(replace(section, queries=section.queries[:count], omitted=len(section.queries) - count))
    return cut


def _read_images(sections: Sequence[Section]) -> dict[tuple[ImageFile, int], Image.Image]:
    """The readable images by file and scale (1 of a result), each once, at the largest size of a thumbnail."""
    queries = [query for section in sections for query in section.queries]
    wanted = [(query.image, _QUERY_SCALE) for query in queries]
    wanted += [(image, 1) for query in queries for image in query.images]
    originals, missing = {}, []
    for image, scale in tqdm(dict.fromkeys(wanted), desc="images of the report", unit="img", dynamic_ncols=True):
        try:
            originals[image, scale] = read_thumbnail(image, scale * _SIZES[0][0])
        except ImageError as error:
            missing.append(error)
    if missing:
        log.warning("the report lacks %d images that cannot be read: %s", len(missing), short_list(missing, 3))
    return originals
