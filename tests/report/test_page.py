"""The page of TEST.REPORT: its content, and its display in a browser."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import ROOT, Layout, latest
from forked import Forked
from PIL import Image

from extraction.images import ImageFile
from model.errors import InputError
from modules.explanation import explain
from modules.reranking import SuperGlobalReranker
from report import page as page_module
from report.drawing import read_thumbnail
from report.page import Hit, Page, Query, Section, first_hits, write_report
from revisitop.layouts import load_dataset
from revisitop.retrieve import Ranking

pytestmark = pytest.mark.slow  # runs test.py and opens a browser

VOID = {"meta", "link", "img", "source"}


class Parsed(HTMLParser):
    """Parses a page into its tags with attributes, texts by class, and whether every tag is closed."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append((tag, dict(attributes).get("class", "")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((*self.open[-1], data.strip()))

    def attributes(self, wanted: str) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == wanted]

    def text(self, tag: str, classes: str | None = None) -> list[str]:
        return [text for t, c, text in self.texts if t == tag and classes in (None, c)]

    @property
    def order(self) -> list[int]:
        """The numbers of the queries, in the order of the page."""
        return [int(text.removeprefix("query_")) for text in self.text("h3")[1:]]

    @property
    def missing(self) -> set[str]:
        return {a["aria-label"] for a in self.attributes("span") if a.get("class") == "missing"}


class Run:
    """The output folder of a run on roxford5k, and its page."""

    def __init__(self, folder):
        self.folder = folder
        self.page = Parsed(folder / "report" / "index.html")
        self.html = (folder / "report" / "index.html").read_text()
        self.results = json.loads((folder / "results.json").read_text())["datasets"]["roxford5k"]
        self.stages = [name for name, value in self.results.items() if isinstance(value, dict) and "seconds" in value]
        self.ranks = [np.load(folder / f"roxford5k_{name.replace(' ', '_')}_ranks.npy") for name in self.stages]
        self.aps = [np.array([*self.results[stage]["M"]["AP"].values()]) for stage in self.stages]

    @property
    def signs(self) -> set[str]:
        """The changes of AP on the page."""
        signed = self.page.text("span", "gain") + self.page.text("span", "loss")
        return {text.replace("−", "-") for text in signed}


ROWS = torch.nn.functional.normalize(torch.randn(27, 16, generator=torch.Generator().manual_seed(3)), dim=1)
QUERIES, DATABASE = ROWS[:3], ROWS[3:]


def saved(layout, folder) -> list:
    """Saves random descriptors; returns the options of a run that shows them."""
    np.savez(folder / "features.npz", Q=QUERIES.numpy(), X=DATABASE.numpy())
    words = ["TEST.FEATURES", folder / "features.npz", "TEST.DATA_DIR", layout.data_dir]
    return [*words, "TEST.DATASET_LIST", "roxford5k", "TEST.REPORT", True]


@pytest.fixture
def evaluated(command, layout, tmp_path):
    """Runs the command on saved random descriptors."""

    def run(*options) -> Run:
        outcome = command("test.py", *saved(layout, tmp_path), *options)
        assert outcome.code == 0, outcome.err
        return Run(latest(tmp_path / "work" / "output").resolve())

    return run


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> Run:
    """One run with its page, for all tests that only read it."""
    folder = tmp_path_factory.mktemp("report")
    layout = Layout(folder / "data")
    process = Forked(ROOT / "test.py", [*saved(layout, folder), "SupG.rerank_k", 3], folder)
    assert process.wait() == 0, process.err
    run = Run(latest(folder / "output").resolve())
    run.layout = layout
    return run


def test_settings_are_shown_and_those_without_effect_are_not(usual):
    assert usual.page.text("h1") == ["Saved descriptors on roxford5k"]
    assert "SupG.rerank_beta" in usual.page.text("dt")
    assert "MODEL.DEPTH" not in usual.page.text("dt")


def test_the_provenance_of_saved_descriptors_is_shown(evaluated, tmp_path):
    (tmp_path / "features.npz.json").write_text('{"depth": 101, "gemp": null}')
    page = evaluated("TEST.RERANKER", "alpha-qe").page
    assert f"{tmp_path / 'features.npz'}, depth 101, gemp None" in page.text("dd")
    assert page.text("summary") == ["Settings of this run"]  # without SuperGlobal nothing is explained


def test_results_are_in_order_with_labels_scores_and_the_places_they_gained(usual):
    names, labels, moves = [], [], []
    for query in usual.page.order:
        kinds = {"easy": "easy", "hard": "hard", "junk": "ignored"}
        truth = usual.layout.gnd["gnd"][query]
        label = {number: label for key, label in kinds.items() for number in truth[key]}
        before, after = (np.argsort(ranks[query]) for ranks in usual.ranks)
        for number in np.concatenate([ranks[query, :10] for ranks in usual.ranks]):
            names.append(f"db_{number}")
            labels.append(label.get(number, "wrong"))
            gain = before[number] - after[number]
            moves.append(f"▲ {gain}" if gain > 0 else f"▼ {-gain}" if gain else "=")
    page = usual.page
    assert page.text("p", "name") == names
    assert page.text("p", "label") == labels
    assert set(labels) == {"easy", "hard", "ignored", "wrong"}
    assert [text for tag, kind, text in page.texts if tag == "p" and kind.startswith("moved")] == moves
    assert len(set(moves)) > 4
    frames = [attributes["class"].split()[1] for attributes in page.attributes("li") if "hit" in str(attributes)]
    assert frames == labels
    scores = np.array([float(text) for text in page.text("p", "score")]).reshape(6, 10)
    query = QUERIES[page.order[:1]]
    cosines, found = (query @ DATABASE.T).sort(descending=True)
    after = SuperGlobalReranker(k=3)(query, DATABASE[found])
    np.testing.assert_allclose(scores[:2], torch.cat([cosines[:, :10], after.scores[:, :10]]), atol=6e-5)


def test_gains_are_those_from_the_search_to_each_of_several_stages(layout):
    dataset = load_dataset("roxford5k", layout.data_dir)

    def gains(**stages) -> dict:
        rankings = {name: Ranking(torch.tensor([ids]), torch.zeros(1, 2), [], 0) for name, ids in stages.items()}
        return {stage: [hit.moved for hit in hits] for stage, hits in first_hits(dataset, None, rankings, 0).items()}

    assert gains(retrieval=[5, 6], reranking=[6, 9]) == {"retrieval": [None, 1], "reranking": [1, None]}
    assert gains(retrieval=[5, 6], a=[6, 5], b=[5, 6]) == {"retrieval": [None, None], "a": [1, -1], "b": [0, 0]}


def test_one_result_of_the_first_query_is_explained(usual):
    query = usual.page.order[0]
    before, after = (ranks[query] for ranks in usual.ranks)
    gained = [before.tolist().index(number) - place for place, number in enumerate(after[:10])]
    number = after[int(np.argmax(gained))]
    assert [text for text in usual.page.text("summary") if "Why" in text] == [f"Why db_{number} moved"]
    place = before.tolist().index(number)
    why = explain(QUERIES[query], DATABASE[before], place, SuperGlobalReranker(k=3))
    sums = " ".join(usual.page.text("dd"))
    for formula, value in (("q · x′", why.s1), ("e · x′", why.s2), ("(S1 + S2) / 2", why.score)):
        assert f"{formula} = {value:.4f}" in sums
    weights = [text for text in usual.page.text("span") if re.fullmatch(r"w \d\.\d{3}", text)]
    assert weights == [f"w {each.weight:.3f}" for each in why.neighbours]
    places = [each.place for each in why.neighbours] + list(why.expansion)
    assert usual.page.text("span", "name") == [f"db_{before[each]}" for each in (place, *places)]


def test_the_largest_change_of_ap_comes_first(usual):
    change = usual.aps[1] - usual.aps[0]
    assert usual.page.order == np.argsort(-np.abs(change)).tolist()
    assert usual.signs == {f"{value:+.1f}" for value in change}
    assert usual.page.text("td")[::2] == [
        f"{usual.results[stage][p]['mAP']:.2f}" for stage in usual.stages for p in "EMH"
    ]


def test_the_page_is_self_contained_and_has_no_script(usual):
    for tag, attributes in usual.page.tags:
        for name in attributes.keys() & {"src", "srcset", "href", "poster", "data", "action"}:
            assert attributes[name].startswith(("data:", "#")), (tag, attributes[name][:80])
        assert not [name for name in attributes if name.startswith("on")]
    ids = [attributes["id"] for _, attributes in usual.page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {a["href"][1:] for a in usual.page.attributes("a")} <= set(ids)
    assert not re.search(r"<script|url\(|@import", usual.html)


def test_without_reranking_there_is_one_ranking_and_the_lowest_ap_comes_first(evaluated):
    run = evaluated("SupG.rerank", False)
    assert run.page.order == np.argsort(run.aps[0]).tolist()
    assert len(run.page.text("p", "label")) == 30
    assert len(run.page.text("h4")) == 3
    assert not run.signs


def test_each_of_several_stages_has_its_ranking_and_caption(evaluated):
    run = evaluated("TEST.RERANKER", "superglobal,alpha-qe", "SupG.rerank_k", 3)
    assert run.stages == ["retrieval", "reranking by superglobal", "reranking by alpha-qe"]
    assert all(stage in caption for stage, caption in zip(3 * run.stages, run.page.text("h4"), strict=True))
    expected = [f"db_{number}" for query in run.page.order for ranks in run.ranks for number in ranks[query, :10]]
    assert run.page.text("p", "name") == expected
    changes = np.abs(np.stack(run.aps[1:]) - run.aps[0]).max(axis=0)
    assert sorted(run.page.order, key=lambda query: -changes[query]) == run.page.order
    signed = {f"{value:+.1f}" for aps in run.aps[1:] for value in aps - run.aps[0]}
    assert run.signs == signed - {"+0.0", "-0.0"}


def test_missing_and_damaged_images_are_shown_as_frames_with_names(evaluated, layout):
    layout.image("db_3").write_text("not an image")
    layout.image("query_1").unlink()
    page = evaluated().page
    assert "Query query_1, its box drawn: no image" in page.missing
    assert {label.split(": ")[1] for label in page.missing if label.startswith("Result")} == {"db_3"}
    assert len(page.attributes("img")) > 3


def test_distractors_are_wrong_and_shown_where_their_images_are(evaluated, layout, tmp_path):
    torch.save(QUERIES.clone(), tmp_path / "distractors.pth")  # first of each ranking
    options = ("SupG.onemeval", True, "TEST.DISTRACTORS", tmp_path / "distractors.pth")
    page = evaluated(*options).page
    assert {f"Result 1: distractor {i}: no image" for i in range(3)} <= page.missing
    assert page.text("p", "label")[page.text("p", "name").index("distractor 0")] == "wrong"

    folder = layout.data_dir / "revisitop1m"
    folder.mkdir()
    (folder / "revisitop1m.txt").write_text("a.jpg\nb.jpg\nc.jpg\n")
    for name in "abc":
        shutil.copy(layout.image("db_1"), folder / f"{name}.jpg")
    page = evaluated(*options).page
    assert {f"Result 1: distractor {i}" for i in range(3)} <= {a["alt"] for a in page.attributes("img")}


def test_a_report_that_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / "report").write_text("in the way")
    with pytest.raises(InputError, match=r"report/index.html"):
        write_report(Page("nothing", {}, []), tmp_path / "report")


def unlabelled(folder, queries: int, results: int = 20, side: int = 192) -> Page:
    """Returns a page like that of a search in a folder, without ground truth; its images are noise."""
    images = [ImageFile(folder / f"{i}.jpg") for i in range(results)]
    for i, image in enumerate(images):
        pixels = np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(image.path, quality=95)
    hits = [Hit(image.path.name, image, 1 - i / 99) for i, image in enumerate(images)]
    found = [Query(f"query {i}", images[i % len(images)], {"retrieval": hits}) for i in range(queries)]
    return Page("Search", {"folder": "/tmp"}, [Section("images", found)])


def test_names_are_escaped_and_need_not_be_utf_8(tmp_path):
    name = "<script>alert('x')</script> & \"\udcff"
    query = Query(name, ImageFile(tmp_path / "none.jpg", (1, 2, 3, 4)), {"retrieval": [Hit(name, None, 0.5, "wrong")]})
    parsed = Parsed(write_report(Page(name, {name: name}, [Section(name, [query], note=name)]), tmp_path / "report"))
    assert not parsed.attributes("script")
    assert "<script>alert('x')</script> & \"?" in parsed.text("h1")


def test_a_page_without_ground_truth_has_no_metrics_and_keeps_the_order(tmp_path):
    page = unlabelled(tmp_path, 4, 3, side=20)
    page = replace(page, sections=[replace(page.sections[0], warning="random weights")])
    parsed = Parsed(write_report(page, tmp_path))
    assert parsed.text("p", "warning") == ["random weights"]
    assert parsed.text("h3") == ["Queries", *(f"query {i}" for i in range(4))]
    assert not parsed.attributes("table") + parsed.text("p", "label")
    assert len(parsed.attributes("img")) == 4 + 4 * 3
    assert all(a["loading"] == "lazy" and a["alt"] for a in parsed.attributes("img"))


def test_even_noise_stays_below_the_limit_and_omitted_queries_are_counted(tmp_path, monkeypatch):
    """With a tenth of the limits, of bytes and of images."""
    for name in ("PAGE_BYTES", "_MAX_IMAGES"):
        monkeypatch.setattr(page_module, name, getattr(page_module, name) // 10)
    path = write_report(unlabelled(tmp_path, 40), tmp_path / "report")
    assert 500_000 < path.stat().st_size < page_module.PAGE_BYTES == 1_500_000
    parsed = Parsed(path)
    assert len(parsed.attributes("img")) == 16 * 21
    assert [text for text in parsed.text("p") if "24 more" in text]
    assert {f"query {number}" for number in range(40)} <= set(parsed.text("span"))


def test_the_box_is_drawn_even_where_it_leaves_the_image(tmp_path):
    path = tmp_path / "grey.png"
    Image.new("RGB", (400, 200), (128, 128, 128)).save(path)
    pixels = np.asarray(read_thumbnail(ImageFile(path, (-90, 50, 300, 900)), 200)).astype(int)
    assert pixels.shape == (100, 200, 3)
    drawn = (pixels != 128).any(axis=2)
    assert np.flatnonzero(drawn[60]).tolist() == [*range(5), *range(146, 151)]  # at the edge, and at 300 / 2
    assert np.flatnonzero(drawn[:, 60]).tolist() == [*range(25, 30), *range(95, 100)]
    for box in ((900, 900, 950, 950), (30, 20, 10, 5), (7, 7, 7, 7)):
        read_thumbnail(ImageFile(path, box), 200)


def test_network_settings_and_match_are_shown(command, layout, two_layers, tmp_path):
    words = (*two_layers, "TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k")
    outcome = command("test.py", *words, "SupG.rerank_k", 3, "TEST.REPORT")
    assert outcome.code == 0, outcome.err
    page = Run(latest(tmp_path / "work" / "output")).page
    assert page.text("h1") == ["mine.py:build on roxford5k"]
    (subtitle,) = [text for text in page.text("p", "soft text") if "scales 1" in text]
    assert "SuperGlobalReranker(m=400, k=3, beta=0.15)" in subtitle
    assert len([each for each in page.attributes("img") if each.get("class") == "map"]) == 2


def test_a_query_of_the_database_is_left_out_of_its_own_results(tmp_path):
    for number in range(6):
        (tmp_path / "set" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "set" / "ab"[number % 2] / f"{number}.jpg")
    dataset = load_dataset("set", tmp_path)
    ranking = Ranking(torch.tensor([[2, 0, 5, 1, 3, 4]]), torch.arange(6, 0, -1.0)[None], [], 0)
    hits = first_hits(dataset, 0, {"retrieval": ranking}, 0)["retrieval"]
    assert [hit.name for hit in hits] == [dataset.database_name(number) for number in (2, 5, 1, 3, 4)]
    assert [(hit.place, hit.score) for hit in hits] == [(0, 6), (2, 4), (3, 3), (4, 2), (5, 1)]


# ---- in a browser ----


@pytest.fixture
def opened(browser, usual):
    """Opens the page of the command in a new context; returns the page and the messages of its console."""
    contexts = []

    def open_page(width: int = 1280, **settings):
        context = browser.new_context(viewport={"width": width, "height": 800}, **settings)
        contexts.append(context)
        page, said = context.new_page(), []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("requestfailed", lambda request: said.append(request.url[:80]))
        page.goto((usual.folder / "report" / "index.html").as_uri())
        return page, said

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_images_load_nothing_is_wider_than_the_window_and_colours_follow_the_reader(opened, width, scheme):
    page, said = opened(width, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    page.evaluate("[...document.images].forEach(image => image.loading = 'eager')")
    page.wait_for_function("[...document.images].every(image => image.complete)")
    sizes = page.evaluate(
        "[...document.images].map(image => [image.naturalWidth, image.getBoundingClientRect().width])"
    )
    assert len(sizes) == 3 + 3 + 60 + (1 + 4 + 4)  # the last of the explanation: K is 3
    assert all(natural > 0 and shown > 0 for natural, shown in sizes)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    wider = "[...document.querySelectorAll('.row')].filter(row => row.scrollWidth > row.clientWidth).length"
    assert page.evaluate(wider) == (6 if width == 390 else 0)
    ground, ink = (
        sum(map(int, re.findall(r"\d+", page.evaluate(f"getComputedStyle(document.body).{name}"))[:3])) / 3
        for name in ("backgroundColor", "color")
    )
    assert (ground > 230 > 60 > ink) if scheme == "light" else (ground < 40 < 200 < ink)
    assert said == []


def test_sections_are_reached_with_the_keyboard(opened):
    page, _ = opened(390)
    focus = "(e => `${e.tagName} ${e.ariaLabel || e.textContent.trim()}`)(document.activeElement)"
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            break
        reached.append(page.evaluate(focus))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", reached[-1]
    assert reached[0] == "A Skip to the results"
    assert "A roxford5k" in reached
    assert "SUMMARY Settings of this run" in reached
    assert [name for name in reached if re.fullmatch(r"A query_\d\s+[+−]\d+\.\d", name)]
    assert len([name for name in reached if "first 10 results" in name]) == 6

    page.reload()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("dt", has_text="SupG.rerank_beta").is_visible()
    row = page.locator(".row").first
    row.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('.row').scrollLeft > 0")
