"""The page of TEST.REPORT: its content, and its display in a browser."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import latest
from PIL import Image

from extraction.images import ImageFile
from model.errors import InputError
from modules.explanation import explain
from modules.reranking import SuperGlobalReranker
from report.drawing import read_thumbnail
from report.page import PAGE_BYTES, Hit, Page, Query, Section, write_report

VOID = {"meta", "link", "img", "source"}
LABELS = {"easy", "hard", "ignored", "wrong"}


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


@pytest.fixture
def evaluated(command, layout, tmp_path):
    """Runs the command on saved random descriptors; returns the page and the output folder."""
    rows = np.random.default_rng(3).standard_normal((27, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.savez(tmp_path / "features.npz", Q=rows[:3], X=rows[3:])

    def run(*options):
        outcome = command(
            "test.py", "TEST.FEATURES", tmp_path / "features.npz", "TEST.DATA_DIR", layout.data_dir,
            "TEST.DATASET_LIST", "roxford5k", "SupG.rerank_k", 3, "TEST.REPORT", True, *options,
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        out_dir = latest(tmp_path / "work" / "output").resolve()
        assert re.search(
            r"the report is output/runs/\S+-roxford5k-features\S*/report/index.html \(\d+\.\d MB\)", outcome.out
        )
        return Parsed(out_dir / "report" / "index.html"), out_dir

    return run


def test_saved_descriptors_are_shown_with_their_provenance(evaluated, tmp_path):
    page, _ = evaluated()
    assert page.text("h1") == ["Saved descriptors on roxford5k"]
    assert "MODEL.DEPTH" not in page.text("dt")
    assert f"{tmp_path / 'features.npz'}, origin unknown" in page.text("dd")
    (tmp_path / "features.npz.json").write_text('{"depth": 101, "gemp": null}')
    page, _ = evaluated()
    assert f"{tmp_path / 'features.npz'}, depth 101, gemp None" in page.text("dd")


def test_results_are_in_order_with_labels_and_scores(evaluated, layout):
    page, out_dir = evaluated()
    order = [text.removeprefix("query_") for text in page.text("h3")[1:]]
    shown = page.text("p", "name")
    expected_names, expected_labels = [], []
    ranks = [np.load(out_dir / f"roxford5k_{stage}_ranks.npy") for stage in ("retrieval", "reranking")]
    for query in map(int, order):
        kinds = {"easy": "easy", "hard": "hard", "junk": "ignored"}
        labels = {number: label for key, label in kinds.items() for number in layout.gnd["gnd"][query][key]}
        for ranking in ranks:
            expected_names += [f"db_{number}" for number in ranking[query, :10]]
            expected_labels += [labels.get(number, "wrong") for number in ranking[query, :10]]
    assert shown == expected_names
    assert page.text("p", "label") == expected_labels
    assert set(expected_labels) == LABELS
    frames = [attributes["class"].split()[1] for attributes in page.attributes("li") if "hit" in str(attributes)]
    assert frames == expected_labels
    scores = np.array([float(text) for text in page.text("p", "score")]).reshape(6, 10)
    assert (np.diff(scores) <= 0).all()
    with np.load(layout.data_dir.parent / "features.npz") as saved:
        queries, rows = torch.from_numpy(saved["Q"]), torch.from_numpy(saved["X"])
    first = [int(order[0])]
    before, found = (queries[first] @ rows.T).sort(descending=True)
    after = SuperGlobalReranker(k=3)(queries[first], rows[found])
    np.testing.assert_allclose(scores[:2], torch.cat([before[:, :10], after.scores[:, :10]]), atol=6e-5)


def test_places_gained_and_lost_are_shown_with_each_result(evaluated):
    page, out_dir = evaluated()
    order = [int(text.removeprefix("query_")) for text in page.text("h3")[1:]]
    before, after = (np.load(out_dir / f"roxford5k_{stage}_ranks.npy") for stage in ("retrieval", "reranking"))
    expected = []
    for query in order:
        places = [{number: place for place, number in enumerate(ranks[query])} for ranks in (before, after)]
        for ranks in (before, after):
            gained = [places[0][number] - places[1][number] for number in ranks[query, :10]]
            expected += [f"▲ {n}" if n > 0 else f"▼ {-n}" if n else "=" for n in gained]
    assert [text for tag, classes, text in page.texts if tag == "p" and classes.startswith("moved")] == expected
    assert len(set(expected)) > 4


def test_one_result_of_the_first_query_is_explained(evaluated, tmp_path):
    page, out_dir = evaluated()
    (summary,) = [text for text in page.text("summary") if text.startswith("Why ")]
    query = int(page.text("h3")[1].removeprefix("query_"))
    before, after = (np.load(out_dir / f"roxford5k_{stage}_ranks.npy")[query] for stage in ("retrieval", "reranking"))
    gained = [before.tolist().index(number) - place for place, number in enumerate(after[:10])]
    chosen = after[int(np.argmax(gained))]
    assert summary == f"Why db_{chosen} moved"
    with np.load(tmp_path / "features.npz") as saved:
        q, x = torch.from_numpy(saved["Q"][query]), torch.from_numpy(saved["X"][before])
    why = explain(q, x, before.tolist().index(chosen), SuperGlobalReranker(k=3))
    sums = " ".join(page.text("dd"))
    assert f"q · x′ = {why.s1:.4f}, the query" in sums
    assert f"e · x′ = {why.s2:.4f}, the expanded query" in sums
    assert f"(S1 + S2) / 2 = {why.score:.4f}" in sums
    weights = [text for text in page.text("span") if re.fullmatch(r"w \d\.\d{3}", text)]
    assert weights == [f"w {each.weight:.3f}" for each in why.neighbours]


def test_without_superglobal_nothing_is_explained(evaluated):
    page, _ = evaluated("TEST.RERANKER", "alpha-qe", "SupG.rerank_k", 9)
    assert page.text("summary") == ["Settings of this run"]


def aps(entry: dict, stage: str) -> list[float]:
    """Returns the AP (Medium) of each query, in order."""
    by_name = entry[stage]["M"]["AP"]
    assert [*by_name] == [f"query_{number}" for number in range(len(by_name))]
    return [*by_name.values()]


def test_the_largest_change_of_ap_comes_first(evaluated):
    page, out_dir = evaluated()
    entry = json.loads((out_dir / "results.json").read_text())["datasets"]["roxford5k"]
    change = np.subtract(aps(entry, "reranking"), aps(entry, "retrieval"))
    order = np.argsort(-np.abs(change))
    assert page.text("h3") == ["Queries", *(f"query_{i}" for i in order)]
    signed = [text.replace("−", "-") for text in page.text("span", "gain") + page.text("span", "loss")]
    assert set(signed) == {f"{value:+.1f}" for value in change}
    assert page.text("td") == [f"{entry[stage][p]['mAP']:.2f}" for stage in ("retrieval", "reranking") for p in "EMH"]
    assert [a["alt"] for a in page.attributes("img")][2].startswith("Precision over recall, Hard: retrieval mAP")
    assert "SupG.rerank_beta" in page.text("dt")


def test_the_page_is_self_contained_and_has_no_script(evaluated):
    page, out_dir = evaluated()
    for tag, attributes in page.tags:
        for name in attributes.keys() & {"src", "srcset", "href", "poster", "data", "action"}:
            assert attributes[name].startswith(("data:", "#")), (tag, attributes[name][:80])
        assert not [name for name in attributes if name.startswith("on")]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {a["href"][1:] for a in page.attributes("a")} <= set(ids)
    html = (out_dir / "report" / "index.html").read_text()
    assert not re.search(r"<script|url\(|@import", html)


def test_without_reranking_there_is_one_ranking_and_the_lowest_ap_comes_first(evaluated):
    page, out_dir = evaluated("SupG.rerank", False, "SupG.rerank_k", 9)
    entry = json.loads((out_dir / "results.json").read_text())["datasets"]["roxford5k"]
    order = np.argsort(aps(entry, "retrieval"))
    assert page.text("h3") == ["Queries", *(f"query_{i}" for i in order)]
    assert len(page.text("p", "label")) == 30
    assert page.text("h4") == 3 * ["retrieval, by cosine similarity"]
    assert not page.text("span", "gain") + page.text("span", "loss")


def test_every_number_of_candidates_has_its_ranking_and_caption(command, layout, checkpoint_50, tmp_path):
    outcome = command(
        "test.py", "TEST.WEIGHTS", checkpoint_50, "TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k",
        "TEST.SCALE_LIST", 1, "DATA_LOADER.NUM_WORKERS", 0, "TEST.RERANKER", "cvnet", "TEST.TOPK_LIST", "[4, 20]",
        "TEST.REPORT",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    out_dir = latest(tmp_path / "work" / "output")
    page = Parsed(out_dir / "report" / "index.html")
    captions = ["retrieval, by cosine similarity", *(f"after reranking of {m}, by its own score" for m in (4, 20))]
    assert page.text("h4") == 3 * captions
    stages = ("retrieval", "reranking_of_4", "reranking_of_20")
    ranks = [np.load(out_dir / f"roxford5k_{stage}_ranks.npy") for stage in stages]
    order = [int(text.removeprefix("query_")) for text in page.text("h3")[1:]]
    expected = [f"db_{number}" for query in order for ranking in ranks for number in ranking[query, :10]]
    assert page.text("p", "name") == expected
    entry = json.loads((out_dir / "results.json").read_text())["datasets"]["roxford5k"]
    before = np.array(aps(entry, "retrieval"))
    changes = [np.array(aps(entry, f"reranking of {m}")) - before for m in (4, 20)]
    assert sorted(order, key=lambda query: -max(abs(change[query]) for change in changes)) == order
    signed = [text.replace("−", "-") for text in page.text("span", "gain") + page.text("span", "loss")]
    assert {f"{change[query]:+.1f}" for change in changes for query in order} - {"+0.0", "-0.0"} == set(signed)
    assert len([text for text in page.text("p", "text changes") if re.match("Reranking of (4|20) raised", text)]) == 2


def test_missing_and_damaged_images_are_shown_as_frames_with_names(evaluated, layout):
    layout.image("db_3").write_text("not an image")
    layout.image("query_1").unlink()
    page, _ = evaluated()
    lacking = {a["aria-label"] for a in page.attributes("span") if a.get("class") == "missing"}
    assert "Query query_1, its box drawn: no image" in lacking
    assert any(re.fullmatch(r"Result \d+: db_3: no image", label) for label in lacking)
    assert len({label.split(": ")[1] for label in lacking if label.startswith("Result")}) == 1
    shutil.rmtree(layout.folder / "jpg")
    page, _ = evaluated()
    assert len(page.attributes("img")) == 3  # the curves


def test_distractors_are_wrong_and_shown_where_their_images_are(evaluated, layout, tmp_path):
    with np.load(tmp_path / "features.npz") as saved:
        rows = torch.from_numpy(saved["Q"])  # the queries themselves: first of each ranking
    torch.save(rows, tmp_path / "distractors.pth")
    options = ("SupG.onemeval", True, "TEST.DISTRACTORS", tmp_path / "distractors.pth")
    page, _ = evaluated(*options)
    spans = [a["aria-label"] for a in page.attributes("span") if a.get("class") == "missing"]
    assert {f"Result 1: distractor {i}: no image" for i in range(3)} <= set(spans)
    assert page.text("p", "label")[page.text("p", "name").index("distractor 0")] == "wrong"

    folder = layout.data_dir / "revisitop1m"
    folder.mkdir()
    (folder / "revisitop1m.txt").write_text("a.jpg\nb.jpg\nc.jpg\n")
    for name in "abc":
        shutil.copy(layout.image("db_1"), folder / f"{name}.jpg")
    page, _ = evaluated(*options)
    assert {f"Result 1: distractor {i}" for i in range(3)} <= {a["alt"] for a in page.attributes("img")}


def test_a_report_that_cannot_be_written_is_reported_in_one_line(tmp_path):
    (tmp_path / "report").write_text("in the way")
    with pytest.raises(InputError, match=r"the report .*report/index.html cannot be written"):
        write_report(Page("nothing", {}, []), tmp_path / "report")


def noise(folder, count: int, side: int = 192) -> list[ImageFile]:
    """Images of noise, which JPEG cannot compress."""
    images = [ImageFile(folder / f"{i}.jpg") for i in range(count)]
    for i, image in enumerate(images):
        pixels = np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(image.path, quality=95)
    return images


def unlabelled(images: list[ImageFile], queries: int, results: int = 20) -> Page:
    """Returns a page like that of a search in a folder, without ground truth."""
    hits = [Hit(image.path.name, image, 1 - i / 99) for i, image in enumerate(images[:results])]
    found = [Query(f"query {i}", images[i % len(images)], {"retrieval": hits}) for i in range(queries)]
    return Page("Search", {"folder": "/tmp"}, [Section("images", found)])


def test_names_are_escaped_and_need_not_be_utf_8(tmp_path):
    name = "<script>alert('x')</script> & \"\udcff"
    image = ImageFile(tmp_path / "none.jpg", (1, 2, 3, 4))
    page = Page(
        name,
        {name: name},
        [Section(name, [Query(name, image, {"retrieval": [Hit(name, None, 0.5, "wrong")]})], note=name)],
    )
    parsed = Parsed(write_report(page, tmp_path / "report"))
    assert not parsed.attributes("script")
    assert "<script>alert('x')</script> & \"?" in parsed.text("h1")


def test_a_page_without_ground_truth_has_no_metrics_and_keeps_the_order(tmp_path):
    parsed = Parsed(write_report(unlabelled(noise(tmp_path, 5, side=20), 4, 3), tmp_path))
    assert parsed.text("h3") == ["Queries", *(f"query {i}" for i in range(4))]
    assert not parsed.attributes("table")
    assert not parsed.text("p", "label")
    assert len(parsed.attributes("img")) == 4 + 4 * 3
    assert all(a["loading"] == "lazy" and a["alt"] for a in parsed.attributes("img"))


def test_seventy_queries_of_noise_stay_below_the_limit(tmp_path):
    path = write_report(unlabelled(noise(tmp_path, 20), 70), tmp_path / "report")
    parsed = Parsed(path)
    assert PAGE_BYTES / 3 < path.stat().st_size < PAGE_BYTES == 15e6
    assert len(parsed.attributes("img")) == 70 * 21


def test_queries_beyond_what_a_page_can_show_are_counted(tmp_path):
    path = write_report(unlabelled(noise(tmp_path, 20), 400), tmp_path / "report")
    assert path.stat().st_size < PAGE_BYTES
    said = "Shown are the first 166 queries; 234 more would make this page too large."
    assert said in Parsed(path).text("p")


def test_the_box_is_drawn_even_where_it_leaves_the_image(tmp_path):
    path = tmp_path / "grey.png"
    Image.new("RGB", (400, 200), (128, 128, 128)).save(path)
    pixels = np.asarray(read_thumbnail(ImageFile(path, (-90, 50, 300, 900)), 200)).astype(int)
    assert pixels.shape == (100, 200, 3)
    drawn = (pixels != 128).any(axis=2)
    assert np.flatnonzero(drawn[60]).tolist() == [
        *range(5),
        *range(146, 151),
    ]  # at the edge, and at 300 / 2
    assert np.flatnonzero(drawn[:, 60]).tolist() == [*range(25, 30), *range(95, 100)]
    for box in ((900, 900, 950, 950), (30, 20, 10, 5), (7, 7, 7, 7)):
        read_thumbnail(ImageFile(path, box), 200)


# ---- in a browser ----


@pytest.fixture
def opened(browser, evaluated):
    """Opens the page of the command in a new context; returns the page and the messages of its console."""
    _, out_dir = evaluated()
    contexts = []

    def open_page(width: int = 1280, **settings):
        context = browser.new_context(viewport={"width": width, "height": 800}, **settings)
        contexts.append(context)
        page, said = context.new_page(), []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("requestfailed", lambda request: said.append(request.url[:80]))
        page.goto((out_dir / "report" / "index.html").as_uri())
        return page, said

    yield open_page
    for context in contexts:
        context.close()


def load_all_images(page):
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    for image in page.locator("img").all():
        image.scroll_into_view_if_needed()
    page.wait_for_function("[...document.images].every(image => image.complete)")


@pytest.mark.parametrize("width", [1280, 390])
def test_images_load_and_nothing_is_wider_than_the_window(opened, width):
    page, said = opened(width)
    load_all_images(page)
    sizes = page.evaluate(
        "[...document.images].map(image => [image.naturalWidth, image.getBoundingClientRect().width])"
    )
    assert len(sizes) == 3 + 3 + 60 + (1 + 4 + 4)  # the last of the explanation: K is 3
    assert all(natural > 0 and shown > 0 for natural, shown in sizes)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    wider = "[...document.querySelectorAll('.row')].filter(row => row.scrollWidth > row.clientWidth).length"
    assert page.evaluate(wider) == (6 if width == 390 else 0)
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


def test_the_page_needs_no_script(opened):
    page, _ = opened(java_script_enabled=False)
    assert page.locator("article").count() == 3
    assert page.locator("article .hit img").first.is_visible()
    assert page.locator("td").first.is_visible()


def test_light_and_dark_follow_the_reader(opened):
    brightness = {}
    for scheme in ("light", "dark"):
        page, _ = opened(color_scheme=scheme)
        ground, ink = (
            sum(map(int, re.findall(r"\d+", page.evaluate(f"getComputedStyle(document.body).{name}"))[:3])) / 3
            for name in ("backgroundColor", "color")
        )
        curve = page.evaluate("document.querySelector('.curves img').currentSrc")
        brightness[scheme] = (ground, ink, curve)
    assert brightness["light"][0] > 230 > 60 > brightness["light"][1]
    assert brightness["dark"][0] < 40 < 200 < brightness["dark"][1]
    assert brightness["light"][2] != brightness["dark"][2]
