"""A run as one HTML page: its figures and curves, and what each query found before and after reranking.

The page needs nothing beside itself: style and pictures are inside it, and there is no script. What it
shows is plain data (Page, Section, Query, Hit), so that rankings without ground truth can be shown, too.
"""

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path

import jinja2
from PIL import Image
from tqdm import tqdm

from model.errors import InputError, short_list
from model.images import ImageError, ImageFile
from revisitop.dataset import Dataset
from revisitop.drawing import PROTOCOL_NAMES, draw_curves, jpeg_uri, read_thumbnail
from revisitop.evaluate import Result
from revisitop.run import Ranking

log = logging.getLogger(__name__)

SHOWN = 10  # results of a query
PAGE_BYTES = 15_000_000
# Side of a result's thumbnail in pixels and JPEG quality; the first with which the page is small enough is taken.
_SIZES = ((192, 75), (176, 70), (160, 65), (144, 55), (120, 50), (96, 40), (64, 30))
_QUERY_SCALE = 2  # a query's picture has sides as many times longer
_MAX_PICTURES = 3500  # what surely fits at the smallest size, even noise with long names


@dataclass(frozen=True)
class Hit:
    """One place of a ranking.

    Attributes:
        name: as the page shows it.
        image: the picture, or None where there is none; a file that is missing or damaged does no harm.
        score: what the ranking is ordered by.
        label: easy, hard, ignored or wrong; None without ground truth.
    """

    name: str
    image: ImageFile | None
    score: float
    label: str | None = None


@dataclass(frozen=True)
class Query:
    """A query and its first results.

    Attributes:
        name: as the page shows it.
        image: the picture; its box, if any, is drawn on it.
        before: the first results of the search, best first.
        after: those after reranking; None without reranking.
        ap_before, ap_after: average precision between 0 and 1; None without ground truth.
    """

    name: str
    image: ImageFile
    before: list[Hit]
    after: list[Hit] | None = None
    ap_before: float | None = None
    ap_after: float | None = None

    @property
    def change(self) -> float | None:
        """By how many percentage points, with one decimal, reranking changed the AP; None where it has none."""
        if self.ap_before is None or self.ap_after is None:
            return None
        return round(100 * (self.ap_after - self.ap_before), 1) + 0.0  # no -0.0


@dataclass(frozen=True)
class Section:
    """A part of the page: a dataset, or a folder.

    Attributes:
        name: its heading.
        queries: in the order in which they are shown.
        order: that order in words, a sentence; "" says nothing about it.
        figures: per stage ("retrieval", "reranking") and protocol (E, M, H); empty without ground truth.
        note: a sentence below the heading.
        omitted: queries that are not shown.
    """

    name: str
    queries: list[Query]
    order: str = ""
    figures: dict[str, dict[str, Result]] = field(default_factory=dict)
    note: str = ""
    omitted: int = 0

    @property
    def changed(self) -> list[Query]:
        """The queries whose AP can be compared, from the largest gain to the largest loss."""
        return sorted((query for query in self.queries if query.change is not None), key=lambda query: -query.change)


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


def evaluated_section(
    dataset: Dataset, stages: dict[str, Ranking], distractors: Sequence[ImageFile] = (), note: str = ""
) -> Section:
    """A dataset's part of the page, from what revisitop.run.retrieve returns. AP is Medium's.

    Args:
        stages: "retrieval" and, with reranking, "reranking".
        distractors: the pictures of the rows behind the database's, as far as they are known.
    """
    own = len(dataset.database)

    def hits(ranking: Ranking, query: int) -> list[Hit]:
        truth = dataset.ground_truth[query]
        kinds = {"easy": truth.easy, "hard": truth.hard, "ignored": truth.junk}
        labels = {number: label for label, numbers in kinds.items() for number in numbers.tolist()}
        found = []
        for number, score in zip(ranking.ids[query, :SHOWN].tolist(), ranking.scores[query].tolist(), strict=False):
            if number < own:
                image, name = dataset.database[number], dataset.database[number].path.stem
            else:
                image = distractors[number - own] if number - own < len(distractors) else None
                name = f"distractor {number - own}"
            found.append(Hit(name, image, score, labels.get(number, "wrong")))
        return found

    def average_precision(ranking: Ranking, query: int) -> float | None:
        ap = float(ranking.figures["M"].ap[query])
        return None if math.isnan(ap) else ap

    queries = []
    for i, image in enumerate(dataset.queries):
        lists = [hits(ranking, i) for ranking in stages.values()]
        aps = [average_precision(ranking, i) for ranking in stages.values()]
        after, ap_after = (lists[1], aps[1]) if len(stages) > 1 else (None, None)
        queries.append(Query(image.path.stem, image, lists[0], after, aps[0], ap_after))
    if "reranking" in stages:
        queries.sort(key=lambda query: -1 if query.change is None else abs(query.change), reverse=True)
        order = "The queries whose AP (Medium) reranking changed most, up or down, come first."
    else:
        queries.sort(key=lambda query: math.inf if query.ap_before is None else query.ap_before)
        order = "The queries with the lowest AP (Medium) come first."
    return Section(dataset.name, queries, order, {name: ranking.figures for name, ranking in stages.items()}, note)


def write_report(page: Page, folder: Path) -> Path:
    """Writes folder/index.html, below PAGE_BYTES, whole or not at all, and returns its path.

    Thumbnails shrink where the page would become too large. Pictures that cannot be read are shown as
    empty frames with their names.

    Raises:
        InputError: where it cannot be written.
    """
    page = replace(page, sections=_first_queries(page.sections))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["signed"] = lambda value: f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")
    template = environment.get_template("report.html")
    curves = [draw_curves(section.figures) for section in page.sections]
    pictures = _read_pictures(page.sections)
    for side, quality in _SIZES:
        thumbnails = {
            (image, scale): jpeg_uri(picture, scale * side, quality) for (image, scale), picture in pictures.items()
        }
        html = template.render(
            page=page, protocols=PROTOCOL_NAMES, curves=curves, thumbnails=thumbnails, query_scale=_QUERY_SCALE
        ).encode("utf-8", errors="replace")  # a name on the disk need not be UTF-8
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


def _first_queries(sections: Sequence[Section]) -> list[Section]:
    """The sections, cut after the queries that one page can show."""
    left, cut = _MAX_PICTURES, []
    for section in sections:
        used = list(accumulate(1 + len(query.before) + len(query.after or ()) for query in section.queries))
        count = sum(number <= left for number in used)
        left -= used[count - 1] if count else 0
        cut.append(replace(section, queries=section.queries[:count], omitted=len(section.queries) - count))
    return cut


def _read_pictures(sections: Sequence[Section]) -> dict[tuple[ImageFile, int], Image.Image]:
    """The readable pictures by file and scale (1 of a result), each once, at the largest size of a thumbnail."""
    queries = [query for section in sections for query in section.queries]
    hits = [hit for query in queries for hit in (*query.before, *(query.after or ()))]
    wanted = [(query.image, _QUERY_SCALE) for query in queries] + [(hit.image, 1) for hit in hits if hit.image]
    pictures, missing = {}, []
    for image, scale in tqdm(dict.fromkeys(wanted), desc="pictures of the report", unit="img", dynamic_ncols=True):
        try:
            pictures[image, scale] = read_thumbnail(image, scale * _SIZES[0][0])
        except ImageError as error:
            missing.append(error)
    if missing:
        log.warning("the report lacks %d pictures that cannot be read: %s", len(missing), short_list(missing, 3))
    return pictures
