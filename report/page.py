"""The report of a run as one HTML page: its metrics and curves, and the results of each query by stage.

The page is self-contained: style and images are embedded, and there is no script. Its content is plain
data (Page, Section, Query, Hit), so that it can also show rankings without ground truth.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image
from tqdm import tqdm

from extraction.files import write_atomically
from extraction.images import ImageError, ImageFile
from model.errors import InputError, short_list
from modules.explanation import Explanation, explain
from modules.reranking import SuperGlobalReranker
from report.drawing import MatchDrawing, draw_curves, jpeg_uri, read_thumbnail
from report.results import Evaluated, at_k_in_words
from revisitop.dataset import Dataset
from revisitop.evaluate import Metrics, query_values
from revisitop.protocols import REVISITED_PROTOCOLS, Protocol
from revisitop.retrieve import Ranking
from revisitop.stages import Reranked, Searched, Stage

log = logging.getLogger(__name__)

SHOWN = 10  # results per query
PAGE_BYTES = 15_000_000
# Side of a result's thumbnail in pixels, and JPEG quality; the first pair that makes the page small enough is used.
_SIZES = ((192, 75), (176, 70), (160, 65), (144, 55), (120, 50), (96, 40), (64, 30))
_QUERY_SCALE = 2  # the image of a query is larger by this factor
_MAX_IMAGES = 3500  # this many certainly fit at the smallest size, even noise with long names
# The labels of the kinds of the ground truth; all other kinds are "right".
_LABELS = {"easy": "easy", "hard": "hard", "junk": "ignored", "itself": "ignored"}


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
        place: its place, from 0, in the search; None if unknown.
    """

    name: str
    image: ImageFile | None
    score: float | None = None
    label: str | None = None
    moved: int | None = None
    place: int | None = None


@dataclass(frozen=True)
class Query:
    """A query and its first results.

    Attributes:
        name: the name shown on the page.
        image: the image; its box, if any, is drawn on it.
        rankings: the first results of each stage, best first: of the search, then of each reranking.
        aps: average precision of each stage, between 0 and 1; empty without ground truth or positives.
        explanation: the explanation of one result, or None.
        candidates: the results that the explanation mentions, by their places in the search.
        match: where the explained result matches the query, or None.
    """

    name: str
    image: ImageFile
    rankings: dict[str, list[Hit]]
    aps: dict[str, float] = field(default_factory=dict)
    explanation: Explanation | None = None
    candidates: Mapping[int, Hit] = field(default_factory=dict)
    match: MatchDrawing | None = None

    @property
    def images(self) -> list[ImageFile]:
        """Returns the images of its results and of the explanation."""
        hits = [*(hit for ranking in self.rankings.values() for hit in ranking), *self.candidates.values()]
        return [hit.image for hit in hits if hit.image is not None]

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
        warning: why the metrics say nothing about accuracy; "" if they do.
        omitted: queries that are only listed, because their images would make the page too large.
        plots: plots below the note, each with alt, light and dark, see report/drawing.py.
        caption: the caption of the plots.
        tables: tables below the plots, by caption: rows of cells, the first of which is the heading.
        headings: headings for the rankings of the stages; by default they name the score that sorts them.
        value: the name of the values of the queries.
    """

    name: str
    queries: list[Query]
    order: str = ""
    metrics: dict[str, dict[str, Metrics]] = field(default_factory=dict)
    note: str = ""
    warning: str = ""
    omitted: Sequence[Query] = ()
    plots: list[dict[str, str]] = field(default_factory=list)
    caption: str = ""
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    headings: dict[str, str] = field(default_factory=dict)
    value: str = "AP"

    @property
    def labels(self) -> set[str]:
        """Returns the labels of its results."""
        hits = (hit for query in self.queries for ranking in query.rankings.values() for hit in ranking)
        return {hit.label for hit in hits if hit.label is not None}

    @property
    def protocols(self) -> tuple[Protocol, ...]:
        return tuple(each.protocol for each in next(iter(self.metrics.values()), {}).values())

    def ap_changes(self) -> Iterator[tuple[str, list[Query], list[Query], int]]:
        """Yields, for each reranking, the queries whose AP it raised, those whose AP it lowered, and how many it kept.

        The largest changes come first.
        """
        for stage in dict.fromkeys(stage for query in self.queries for stage in query.changes):
            changed = [(query.changes[stage], query) for query in self.queries if query.changes.get(stage)]
            changed.sort(key=lambda pair: -abs(pair[0]))
            gains, losses = ([query for change, query in changed if change * sign > 0] for sign in (1, -1))
            count = sum(stage in query.changes for query in self.queries)
            yield stage, gains, losses, count - len(changed)


@dataclass(frozen=True)
class Page:
    """The content of a report.

    Attributes:
        title: the title of the page.
        subtitle: the key settings of the run.
        settings: the settings of the run, by name.
        sections: one section per dataset.
    """

    title: str
    settings: dict[str, str]
    sections: list[Section]
    subtitle: str = ""

    @property
    def tables(self) -> dict[tuple[Protocol, ...], list[Section]]:
        """Returns the sections with metrics, grouped by their protocols."""
        tables: dict[tuple[Protocol, ...], list[Section]] = {}
        for section in self.sections:
            if section.metrics:
                tables.setdefault(section.protocols, []).append(section)
        return tables


def evaluated_page(head: dict[str, Any], results: Sequence[Evaluated], options: dict[str, Any]) -> Page:
    """Returns the page of a run, with its date, command and options, and a section per dataset.

    Args:
        head: the head of the run, see report.log.start_log, with its device.
        options: the value of each option.
    """
    settings = {name: head[name] for name in ("date", "command", "device")}
    settings["versions"] = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    for each in results:
        settings[f"descriptors of {each.dataset.name}"] = origin_in_words(each.facts)
    settings |= {key: str(value) for key, value in options.items()}
    sections = [evaluated_section(each) for each in results]
    parts = [part for each in results for part in each.facts.get("fusion", [each.facts])]
    networks = dict.fromkeys(tuple(part["network"].values()) for part in parts if "network" in part)
    title = ", ".join(network for network, _ in networks) or "Saved descriptors"
    title = f"{title} on {', '.join(each.dataset.name for each in results)}"
    stages = dict.fromkeys(stage for each in results for stage in each.facts.get("stages", ()))
    subtitle = [*(modules for _, modules in networks), *stages]
    return Page(title, settings, sections, "; ".join(subtitle))


def origin_in_words(facts: Mapping[str, Any]) -> str:
    """Returns where the descriptors of a dataset come from: a checkpoint, a file, or several of them with weights."""
    if "fusion" in facts:
        return "; ".join(f"{part['weight']:.3g} of {origin_in_words(part)}" for part in facts["fusion"])
    if "checkpoint" in facts:
        return "{path}, SHA-256 {sha256}".format(**facts["checkpoint"])
    known = ", ".join(f"{key} {value}" for key, value in (facts["made_from"] or {}).items())
    return f"{facts['features']}, {known or 'origin unknown'}"


def evaluated_section(evaluated: Evaluated) -> Section:
    """Returns the section of a dataset. Its values are those of Medium, or of the only protocol of the query."""
    dataset, facts = evaluated.dataset, evaluated.facts
    stage_aps = {stage: query_values(metrics) for stage, metrics in evaluated.metrics.items()}
    queries = []
    for i, image in enumerate(dataset.queries):
        name, rankings = dataset.query_name(i), first_hits(dataset, i, evaluated.rankings, i, evaluated.distractors)
        aps = {stage: float(aps[i]) for stage, aps in stage_aps.items() if not math.isnan(aps[i])}
        explanation = evaluated.explanations.get(i)
        ids = evaluated.rankings["retrieval"].ids[i].tolist()
        candidates = candidates_of(explanation, dataset, i, ids, evaluated.distractors) if explanation else {}
        queries.append(Query(name, image, rankings, aps, explanation, candidates, evaluated.matches.get(i)))
    measure = dataset.protocols[0].measure
    value = measure.main_title if measure.main_is_at_k else "AP"
    which = " (Medium)" if dataset.protocols == REVISITED_PROTOCOLS else ""
    first, *_, last = 2 * [metrics.get("M", next(iter(metrics.values()))).ap for metrics in evaluated.metrics.values()]
    ties = np.nan_to_num(first if len(evaluated.metrics) == 1 else -np.abs(last - first), nan=math.inf)
    queries = [queries[i] for i in np.argsort(ties, kind="stable")]  # AP orders those of equal recall@1
    if len(evaluated.rankings) > 1:
        queries.sort(key=lambda query: max(map(abs, query.changes.values()), default=-1), reverse=True)
        order = f"The queries whose {value}{which} reranking changed most, up or down, come first."
    else:
        queries.sort(key=lambda query: query.aps.get("retrieval", math.inf))
        order = f"The queries with the lowest {value}{which} come first."
    note = f"{len(dataset.queries)} queries, {len(dataset.database):,} database images"
    if "distractors" in facts:
        note += f", {facts['distractors']:,} distractors"
    plots = draw_curves(evaluated.metrics)
    caption = "Mean interpolated precision of the queries; ignored images are removed from the rankings."
    if dataset.in_database is not None:
        note += "; each query is one of them, and left out of its own results"
    return Section(
        dataset.name, queries, order, evaluated.metrics, f"{note}.", facts.get("note", ""),
        plots=plots, caption=caption, value=value,
    )  # fmt: skip


def explain_largest(
    rankings: Mapping[str, Ranking],
    metrics: Mapping[str, dict[str, Metrics]],
    stages: Mapping[str, Stage],
    searched: Searched | None,
) -> dict[int, Explanation]:
    """Returns the explanation of one result, by the number of its query; nothing if SuperGlobal did not rerank.

    The query is the one whose AP changed most; the result is the one of its first ten that gained most places.

    Args:
        rankings, metrics: those of each stage by title, those of the search first.
        stages: the stages after the search, by title.
        searched: the search; None if there are no stages.
    """
    rerankers = {title: stage.reranker for title, stage in stages.items() if isinstance(stage, Reranked)}
    title = next((title for title, each in rerankers.items() if isinstance(each, SuperGlobalReranker)), None)
    if title is None:
        return {}
    changes = np.abs(query_values(metrics[title]) - query_values(metrics["retrieval"]))
    query = int(np.argmax(np.nan_to_num(changes, nan=-1)))
    ids = rankings["retrieval"].ids[query, : rerankers[title].m]
    ids = ids[ids >= 0]  # an index may find fewer
    first = rankings[title].ids[query, : min(SHOWN, len(ids))]
    places = (first[:, None] == ids).int().argmax(dim=1).numpy()
    place = int(places[np.argmax(places - np.arange(len(places)))])
    rows = searched.database.rows(ids).cpu()
    return {query: explain(searched.queries[query].cpu(), rows, place, rerankers[title])}


def candidates_of(
    explanation: Explanation,
    dataset: Dataset,
    query: int | None,
    ids: Sequence[int],
    distractors: Sequence[ImageFile] = (),
) -> dict[int, Hit]:
    """Returns the results that an explanation mentions, by their places in the search; see labelled_hits."""
    places = sorted({*(neighbour.place for neighbour in explanation.neighbours), *explanation.expansion})
    hits = labelled_hits(dataset, query, [ids[place] for place in places], distractors)
    return {place: hits[ids[place]] for place in places}


def first_hits(
    dataset: Dataset,
    query: int | None,
    rankings: Mapping[str, Ranking],
    row: int,
    distractors: Sequence[ImageFile] = (),
) -> dict[str, list[Hit]]:
    """Returns the first results of each stage, for one row of the rankings, without the query itself.

    A result gains places from the first stage to its own; in the first of two stages, to the second.

    Args:
        query: the number of the query; None if it is not one of the dataset.
    """
    itself = None if query is None or dataset.in_database is None else int(dataset.in_database[query])
    ids = {stage: ranking.ids[row].tolist() for stage, ranking in rankings.items()}
    places = {stage: {number: place for place, number in enumerate(numbers)} for stage, numbers in ids.items()}
    first, *later = ids

    def gain(number: int, stage: str | None) -> int | None:
        before, after = places[first].get(number), places.get(stage, {}).get(number)
        return None if before is None or after is None else before - after

    hits = {}
    for stage, ranking in rankings.items():
        scored = zip(ids[stage][: SHOWN + 1], ranking.scores[row].tolist(), strict=False)
        scores = dict([pair for pair in scored if pair[0] != itself][:SHOWN])
        other = stage if stage in later else later[0] if len(later) == 1 else None
        found = labelled_hits(dataset, query, list(scores), distractors)
        hits[stage] = [
            replace(hit, score=scores[number], moved=gain(number, other), place=places[first].get(number))
            for number, hit in found.items()
        ]
    return hits


def labelled_hits(
    dataset: Dataset, query: int | None, ids: Sequence[int], distractors: Sequence[ImageFile] = ()
) -> dict[int, Hit]:
    """Returns the results of a query by their numbers, labelled by the ground truth, if the query has one.

    Args:
        query: its number; None if it is not one of the dataset.
        ids: database numbers, best first, -1 for none; distractors are numbered after the database.
        distractors: the images of the distractors, as far as they are known.
    """
    size, truth = len(dataset.database), dataset.ground_truth if query is not None else []
    kinds = truth[query].kinds.items() if truth else ()
    labels = {number: _LABELS.get(kind, "right") for kind, numbers in kinds for number in numbers.tolist()}
    unlisted = "wrong" if truth else None
    hits = {}
    for number in ids:
        if number < 0:  # a saved ranking may be shorter
            continue
        if number < size:
            image, name = dataset.database[number], dataset.database_name(number)
        else:
            image = distractors[number - size] if number - size < len(distractors) else None
            name = f"distractor {number - size}"
        hits[number] = Hit(name, image, label=labels.get(number, unlisted))
    return hits


def write_report(page: Page, folder: Path) -> Path:
    """Writes folder/index.html, smaller than PAGE_BYTES, atomically, and returns its path.

    Thumbnails are made smaller if the page would become too large. Images that cannot be read are shown
    as empty frames with their names.

    Raises:
        InputError: if it cannot be written.
    """
    page = replace(page, sections=_first_queries(page.sections))
    originals = _read_images(page.sections)
    template = environment().get_template("page.html")
    for side, quality in _SIZES:
        uris = {key: jpeg_uri(original, key[1] * side, quality) for key, original in originals.items()}
        text = template.render(page=page, uri=lambda *key, uris=uris: uris.get(key), query_scale=_QUERY_SCALE)
        html = text.encode("utf-8", errors="replace")  # a file name need not be valid UTF-8
        if len(html) < PAGE_BYTES:
            break
    path = folder / "index.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(html))
    except (InputError, OSError) as error:
        raise InputError(f"the report {path} is missing, all other results are kept ({error})") from None
    return path


def environment() -> jinja2.Environment:
    """Returns the environment that renders the templates of this folder, with all values escaped."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["at_k"] = at_k_in_words
    templates.filters["signed"] = lambda value: f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")
    return templates


def _first_queries(sections: Sequence[Section]) -> list[Section]:
    """Returns the sections, without the queries that do not fit on one page."""
    left, shown = _MAX_IMAGES, []
    for section in sections:
        images = list(accumulate(1 + len(query.images) for query in section.queries))
        count = sum(number <= left for number in images)
        left -= images[count - 1] if count else 0
        shown.append(replace(section, queries=section.queries[:count], omitted=section.queries[count:]))
    return shown


def _read_images(sections: Sequence[Section]) -> dict[tuple[ImageFile, int], Image.Image]:
    """Returns the readable images by file and scale (1 for a result), each once, at the largest thumbnail size."""
    queries = [query for section in sections for query in section.queries]
    sizes = [(query.image, _QUERY_SCALE) for query in queries]
    sizes += [(image, 1) for query in queries for image in query.images]
    originals, missing = {}, []
    for image, scale in tqdm(dict.fromkeys(sizes), desc="images of the report", unit="img", dynamic_ncols=True):
        try:
            originals[image, scale] = read_thumbnail(image, scale * _SIZES[0][0])
        except ImageError as error:
            missing.append(error)
    if missing:
        log.warning("the report lacks %d images that cannot be read: %s", len(missing), short_list(missing, 3))
    return originals
