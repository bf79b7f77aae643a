"""The report of a run as one HTML page: its metrics and curves, and the results of each query by stage.

The page is self-contained: style and images are embedded, and there is no script. Its content is plain
data (Page, Section, Query, Hit), so that it can also show rankings without ground truth.
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

from extraction.images import ImageError, ImageFile
from model.errors import InputError, short_list
from report.drawing import draw_curves, jpeg_uri, read_thumbnail
from report.results import Evaluated
from revisitop.dataset import Dataset
from revisitop.evaluate import Metrics, query_aps
from revisitop.explained import Explained
from revisitop.protocols import REVISITED_PROTOCOLS, Protocol

log = logging.getLogger(__name__)

SHOWN = 10  # results per query
PAGE_BYTES = 15_000_000
# Side of a result's thumbnail in pixels, and JPEG quality; the first pair that makes the page small enough is used.
_SIZES = ((192, 75), (176, 70), (160, 65), (144, 55), (120, 50), (96, 40), (64, 30))
_QUERY_SCALE = 2  # the image of a query is larger by this factor
_MAX_IMAGES = 3500  # this many certainly fit at the smallest size, even noise with long names


@dataclass(frozen=True)
class Hit:
    """One result of a ranking.

    Attributes:
        name: the name shown on the page.
        image: the image, or None if there is none; the file may be missing or damaged.
        score: the score by which the ranking is sorted; None if unknown.
        label: easy, hard, right, ignored or wrong; None without ground truth.
        moved: the number of places gained by reranking, the same before and after it, negative for places lost;
            None if unknown.
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
    """The explanation of a result's place after reranking, see modules.explanation.Explanation.

    Attributes:
        hit: the result that is explained.
        before, after: its places, from 0.
        original: whether S2 compares the expanded query with the candidate's own descriptor.
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
        name: the name shown on the page.
        image: the image; its box, if any, is drawn on it.
        rankings: the first results of each stage, best first: of the search, then of each reranking.
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
        """Returns the images of its results and of the explanation."""
        hits = (hit for ranking in self.rankings.values() for hit in ranking)
        return [*(hit.image for hit in hits if hit.image is not None), *(self.why.images if self.why else ())]

    @property
    def changes(self) -> dict[str, float]:
        """Returns the change of AP by each reranking, in percentage points with one decimal."""
        first, *later = self.aps or [""]
        return {stage: round(100 * (self.aps[stage] - self.aps[first]), 1) + 0.0 for stage in later}  # avoids -0.0


@dataclass(frozen=True)
class Section:
    """A part of the page, for a dataset or a folder.

    Attributes:
        name: its heading.
        queries: the queries, in the order in which they are shown.
        order: a sentence that explains this order, or "".
        metrics: metrics by stage ("retrieval", "reranking") and protocol (E, M, H); empty without ground truth.
        note: a sentence below the heading.
        omitted: number of queries that are not shown.
        plots: plots below the note, each with alt, light and dark, see report/drawing.py.
        caption: the caption of the plots.
        tables: tables below the plots.
        headings: headings for the rankings of the stages; by default they name the score that sorts them.
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
        """Returns the labels of its results."""
        hits = (hit for query in self.queries for ranking in query.rankings.values() for hit in ranking)
        return {hit.label for hit in hits if hit.label is not None}

    @property
    def protocols(self) -> list[Protocol]:
        return [each.protocol for each in next(iter(self.metrics.values()), {}).values()]

    def changed(self) -> "list[Changed]":
        """Returns how each reranking changed the AP of the queries."""
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
    """The queries whose AP a reranking raised or lowered, largest change first, and the number of unchanged ones."""

    stage: str
    gains: list[Query]
    losses: list[Query]
    left: int


@dataclass(frozen=True)
class Page:
    """The content of a report.

    Attributes:
        title: the title of the page.
        settings: the settings of the run, by name.
        sections: one section per dataset.
    """

    title: str
    settings: dict[str, str]
    sections: list[Section]

    @property
    def tables(self) -> list[tuple[list[Protocol], list[Section]]]:
        """Returns the sections with metrics, grouped by their protocols."""
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
    """Returns the page of a run, with its date, command and options, and a section per dataset.

    Args:
        head: the head of the run, see report.log.start_log, with its device.
        distractors: the images of the distractors, which follow the database, as far as they are known.
        options: the value of each option.
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
    """Returns the section of a dataset. AP is that of Medium, or of the only protocol of the query.

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
    caption = "Mean interpolated precision of the queries; ignored images are removed from the rankings."
    return Section(dataset.name, queries, order, evaluated.metrics, f"{note}.", plots=plots, caption=caption)


def labelled_hits(
    dataset: Dataset,
    query: int | None,
    ids: Sequence[int],
    scores: Sequence[float] | None = None,
    distractors: Sequence[ImageFile] = (),
    moved: Sequence[int | None] | None = None,
) -> list[Hit]:
    """Returns the results of a query, labelled by the ground truth.

    Args:
        query: its number; None without ground truth.
        ids: database numbers, best first, -1 for none; distractors are numbered after the database.
        scores: their scores; None if unknown.
        distractors: the images of the distractors, as far as they are known.
        moved: the number of places that each gained; None if unknown.
    """
    own, kinds = len(dataset.database), {} if query is None else dataset.ground_truth[query].kinds
    labels = {number: label_of(kind) for kind, numbers in kinds.items() for number in numbers.tolist()}
    other = None if query is None else "wrong"
    found = []
    unknown = [None] * len(ids)
    for number, score, places in zip(ids, scores or unknown, moved or unknown, strict=True):
        if number < 0:  # a saved ranking may be shorter
            continue
        if number < own:
            image, name = dataset.database[number], dataset.database_name(number)
        else:
            image = distractors[number - own] if number - own < len(distractors) else None
            name = f"distractor {number - own}"
        found.append(Hit(name, image, score, labels.get(number, other), places))
    return found


def explained_hit(dataset: Dataset, explained: Explained, distractors: Sequence[ImageFile] = ()) -> Why:
    """Returns the explanation with its images, labelled by the ground truth."""

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
    """Returns by how many places the first results of each stage moved up from the first stage (negative: down).

    For the first stage, these are the places that a result gains in the second, if there are just two stages.
    None if a result is not in both rankings.

    Args:
        ids: the complete rankings of the stages, as database numbers.
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
    """Returns the label of images of this kind of the ground truth."""
    if kind in ("easy", "hard"):
        return kind
    return "ignored" if kind in ("junk", "itself") else "right"


def write_report(page: Page, folder: Path) -> Path:
    """Writes folder/index.html, smaller than PAGE_BYTES, atomically, and returns its path.

    Thumbnails are made smaller if the page would become too large. Images that cannot be read are shown
    as empty frames with their names.

    Raises:
        InputError: if it cannot be written.
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
        # a file name need not be valid UTF-8
        if len(html) < PAGE_BYTES:
            break
    path, new = folder / "index.html", folder / "index.html.new"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        new.write_bytes(html)
        os.replace(new, path)
    except OSError as error:
        raise InputError(
            f"the report {path} cannot be written ({error.strerror}); all other results are kept"
        ) from None
    return path


def _uri(thumbnails: dict[tuple[ImageFile, int], str], image: ImageFile, scale: int) -> str | None:
    return thumbnails.get((image, scale))


def environment() -> jinja2.Environment:
    """Returns the environment that renders the templates of this folder, with all values escaped."""
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
    """Returns the sections, without the queries that do not fit on one page."""
    left, cut = _MAX_IMAGES, []
    for section in sections:
        used = list(accumulate(1 + len(query.images) for query in section.queries))
        count = sum(number <= left for number in used)
        left -= used[count - 1] if count else 0
        cut.append(replace(section, queries=section.queries[:count], omitted=len(section.queries) - count))
    return cut


def _read_images(sections: Sequence[Section]) -> dict[tuple[ImageFile, int], Image.Image]:
    """Returns the readable images by file and scale (1 for a result), each once, at the largest thumbnail size."""
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
