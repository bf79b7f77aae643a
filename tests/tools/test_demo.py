"""The demo: its steps without a page, and the page in a browser if Gradio and Chromium are installed."""

import base64
import importlib.util
import io
import json
import os
import re
import sys
import urllib.error
import urllib.request
import uuid
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, Layout, running_demo
from PIL import Image

from assembly import Output
from config import make_config
from model.errors import InputError
from modules.reranking import SuperGlobalReranker
from modules.search import Database
from revisitop.evaluate import evaluate
from revisitop.layouts import load_dataset
from revisitop.retrieve import rerank, retrieve
from tools import demo_steps
from tools.demo import host_names
from tools.demo_steps import (
    Galleries,
    Gallery,
    QueryImage,
    QuerySearch,
    find_queries,
    numbers_of,
    read_upload,
    search_gallery,
)

EVIL = "<script>window.evil=1"
STRANGE = [EVIL, "<img src=x onerror='window.evil=1'>", "{{value}} ${window.evil=1}"]
RERANKER = SuperGlobalReranker(m=12, k=3)


@pytest.fixture
def gallery(layout) -> Gallery:
    """24 images and 3 queries with ground truth, with random descriptors."""
    rows = torch.randn(27, 16, generator=torch.Generator().manual_seed(0)) + 0.5
    rows = torch.nn.functional.normalize(rows, dim=1)
    return Gallery(load_dataset("roxford5k", layout.data_dir), rows[:3], Database(rows[3:]))


def searched(gallery: Gallery, number: int = 0) -> QuerySearch:
    return search_gallery(gallery, gallery.query(number), gallery.queries[number : number + 1], 0.0)


# ---- the steps ----


def test_both_rankings_and_their_ap_are_those_of_the_benchmark(gallery):
    dataset, queries = gallery.dataset, gallery.queries
    before = retrieve(queries, gallery.database, 24, dataset.listed)
    rankings = before, rerank(before, RERANKER, queries, gallery.database)
    metrics = [evaluate(each, dataset.ground_truth) for each in rankings]
    for number in range(3):
        effect = searched(gallery, number).rerank(RERANKER)
        for hits, ranking in zip((effect.before, effect.after), rankings, strict=True):
            assert [hit.name for hit in hits] == [f"db_{i}" for i in ranking.ids[number, :10]]
            assert [hit.score for hit in hits] == pytest.approx(ranking.scores[number, :10].tolist(), abs=1e-6)
        for protocol, title in (("E", "Easy"), ("M", "Medium"), ("H", "Hard")):
            assert effect.aps[title] == pytest.approx([each[protocol].ap[number] for each in metrics])
        kinds = dataset.ground_truth[number].kinds
        for hit in effect.after:
            kind = next((kind for kind, numbers in kinds.items() if int(hit.name[3:]) in numbers), "wrong")
            assert hit.label == {"junk": "ignored"}.get(kind, kind)


def test_the_explanation_belongs_to_the_place_on_the_page(gallery):
    search = searched(gallery)
    effect = search.rerank(RERANKER)
    for rank, (before, after) in enumerate(zip(effect.before, effect.after, strict=True)):
        for hit, place in ((before, rank), (after, rank + after.moved)):
            why, candidates = search.explain(RERANKER, place)
            shown = candidates[why.before]
            assert (shown.name, shown.label, why.before - why.after) == (hit.name, hit.label, hit.moved)
        assert (why.after, why.score) == (rank, pytest.approx(after.score, abs=1e-6))
        assert {each.place for each in why.neighbours} | set(why.expansion) == set(candidates)
    assert search.explain(RERANKER, 12) is None


def test_without_ground_truth_there_is_no_frame_and_no_ap(gallery):
    folder = replace(gallery, dataset=replace(gallery.dataset, ground_truth=[], protocols=()))
    upload = QueryImage("mine.jpg", pixels=np.zeros((40, 40, 3), np.uint8))
    for search in (searched(folder), search_gallery(gallery, upload, gallery.queries[:1], 0.0)):
        effect = search.rerank(RERANKER)
        assert effect.aps == {}
        assert {hit.label for hit in effect.before + effect.after} == {None}


def test_queries_are_found_by_a_part_of_their_name(gallery):
    assert find_queries(gallery.dataset, "", 2) == ([0, 1], 3)
    assert find_queries(gallery.dataset, "QUERY_2", 9) == ([2], 1)
    assert find_queries(gallery.dataset, "none", 9) == ([], 0)
    with pytest.raises(InputError, match="query 3"):
        gallery.query(3)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("10, 20, 60, 50", (10, 20, 60, 50)), ("60 50 10 20", (10, 20, 60, 50)), ("-5 -5 500 500", (0, 0, 80, 60)),
        ("10 10 12 50", None), (" ", None),
    ],
)  # fmt: skip
def test_a_box_is_sorted_and_clipped_and_a_click_removes_it(text, box):
    image, numbers = QueryImage("x", (1, 1, 9, 9), pixels=np.zeros((60, 80, 3), np.uint8)), numbers_of(text)
    assert image.with_box(numbers).box == box
    fractions = numbers and [number / side for number, side in zip(numbers, 2 * (80, 60), strict=False)]
    assert image.with_box(fractions, in_pixels=False).box == (box and pytest.approx(box))
    if box:
        assert image.with_box(numbers).read_box().shape == (box[3] - box[1], box[2] - box[0], 3)


@pytest.mark.parametrize("text", ["1 2 3", "1 2 3 4 5", "a b c d", "nan 1 2 3", "inf 0 9 9"])
def test_invalid_boxes_are_rejected(text):
    with pytest.raises(InputError, match="four numbers"):
        QueryImage("x", pixels=np.zeros((60, 80, 3), np.uint8)).with_box(numbers_of(text))


def test_an_upload_is_reduced_and_a_damaged_one_is_named(tmp_path, monkeypatch):
    Image.new("RGB", (3000, 1500), (200, 30, 30)).save(tmp_path / "large.jpg")
    assert read_upload(tmp_path / "large.jpg").pixels.shape == (512, 1024, 3)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "large.jpg").read_bytes()[:900])
    (tmp_path / "text.png").write_text("no image")
    monkeypatch.setattr(demo_steps, "UPLOAD_PIXELS", 1_000_000)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "large.jpg").read_bytes()[:900])
    for name in ("cut.jpg", "text.png", "large.jpg"):
        with pytest.raises(InputError, match=f"^{name}") as raised:
            read_upload(tmp_path / name)
        assert str(tmp_path) not in str(raised.value)


@pytest.fixture
def options(layout, checkpoint_50):
    return [
        ("TEST.DATA_DIR", str(layout.data_dir)), ("TEST.DATASET_LIST", "roxford5k"), ("TEST.SCALE_LIST", 1),
        ("TEST.WEIGHTS", str(checkpoint_50)), ("DATA_LOADER.NUM_WORKERS", 0),
    ]  # fmt: skip


@pytest.mark.slow  # CVNet's network
def test_descriptors_follow_the_modules_and_the_box(options, tmp_path):
    galleries = Galleries(make_config(options), Output(tmp_path / "out"), torch.device("cpu"))
    modules = galleries.modules
    assert modules == ["GeM+", "Regional-GeM", "ReLU+"]  # with one scale, Scale-GeM is not offered
    gallery = galleries.gallery("roxford5k", modules)
    assert galleries.gallery("roxford5k", modules[::-1]) is gallery
    assert not torch.equal(galleries.gallery("roxford5k", ["GeM+"]).queries, gallery.queries)

    def descriptor(image: QueryImage) -> torch.Tensor:
        return galleries.search("roxford5k", modules, image).descriptor

    image = gallery.query(1)
    assert torch.equal(descriptor(image), gallery.queries[1:2])
    whole = descriptor(image.with_box((0, 0, 1, 1), in_pixels=False))
    torch.testing.assert_close(descriptor(image.with_box(None)), whole)
    assert not torch.allclose(whole, gallery.queries[1:2], atol=1e-3)
    upload = QueryImage("copy", image.box, pixels=image.read())
    torch.testing.assert_close(descriptor(upload), gallery.queries[1:2], atol=1e-5, rtol=0)


@pytest.mark.slow  # CVNet's network
def test_a_folder_is_extracted_without_unreadable_images(layout, options, tmp_path):
    layout.image("db_3").write_text("no image")
    galleries = Galleries(make_config(options), Output(tmp_path / "out"), torch.device("cpu"), layout.folder / "jpg")
    gallery = galleries.gallery("jpg", galleries.modules)
    assert len(gallery.database) == len(gallery.dataset.queries) == 26
    assert find_queries(gallery.dataset, "db_3.jpg", 9) == ([], 0)
    search = galleries.search("jpg", galleries.modules, gallery.query(5))
    assert sorted(search.ranking.ids[0].tolist()) == [number for number in range(26) if number != 5]
    before, _, aps, _ = search.rerank(RERANKER)
    assert [hit.place for hit in before] == list(range(10))
    assert aps == {}


def test_the_page_opens_with_the_query_that_gains_most(gallery):
    gains = []
    for number in range(3):
        before, after = searched(gallery, number).rerank(RERANKER).aps["Medium"]
        gains.append(after - before)
    assert gallery.opening_query(RERANKER).number == np.argmax(gains)
    assert replace(gallery, dataset=replace(gallery.dataset, ground_truth=[])).opening_query(RERANKER).number == 0


@pytest.mark.slow  # CVNet's network
def test_a_match_is_that_of_the_result_and_the_box_of_the_query(options, tmp_path):
    galleries = Galleries(make_config(options), Output(tmp_path / "out"), torch.device("cpu"))
    gallery = galleries.gallery("roxford5k", galleries.modules)
    search = galleries.search("roxford5k", galleries.modules, gallery.query(1))
    match = galleries.match(search, 4)
    assert match.cosine == pytest.approx(float(search.ranking.scores[0, 4]), abs=1e-5)
    with Image.open(io.BytesIO(base64.b64decode(match.images[0].split(",")[1]))) as image:
        assert image.size == search.image.read_box().shape[1::-1]
    with pytest.raises(InputError, match="place 99"):
        galleries.match(search, 98)


# ---- the command ----


@pytest.mark.parametrize(
    ("gradio", "words", "noun"),
    [
        (None, (), "pip install gradio"),
        (SimpleNamespace(__version__="5.49.1"), (), "5.49.1"),
        (SimpleNamespace(__version__="6.0"), ("TEST.RERANKER", "aqe"), "TEST.RERANKER"),
        (SimpleNamespace(__version__="6.0"), ("--database", "nowhere"), "nowhere"),
        (SimpleNamespace(__version__="6.0"), ("--database", ".", "TEST.DATASET_LIST", "toy"), "TEST.DATASET_LIST"),
        (SimpleNamespace(__version__="6.0"), ("TEST.DATASET_LIST", "none", "TEST.DATA_DIR", "."), "none"),
    ],
)
def test_what_prevents_the_page_is_reported_in_one_line(command, monkeypatch, gradio, words, noun):
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    outcome = command("tools/demo.py", *words)
    assert outcome.code == 2
    assert noun in outcome.err.splitlines()[-1]


def test_a_page_for_all_addresses_has_the_names_of_the_machine():
    assert host_names("127.0.0.1") == {"localhost", "127.0.0.1", "::1"}
    assert "*" in host_names("0.0.0.0")
    assert os.uname().nodename.lower() in host_names("0.0.0.0")


@pytest.fixture(scope="module")
def address(two_layers, tmp_path_factory):
    """The command itself, on a small dataset with some unusual file names."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed")
    folder = tmp_path_factory.mktemp("demo")
    layout = Layout(folder / "data")
    for number, name in enumerate(STRANGE):
        layout.image(f"db_{number}").rename(layout.image(name))
        layout.gnd["imlist"][number] = name
    layout.image("query_1").rename(layout.image(EVIL + "2"))
    layout.gnd["qimlist"][1] = EVIL + "2"
    layout.write()
    words = [*two_layers, "TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k"]
    with running_demo(folder, *words) as address:
        yield address
    errors = re.findall(r"^[\w.]+(?:Error|Exception)\b", (folder / "errors.txt").read_text(), re.MULTILINE)
    assert {*errors} <= {"gradio.exceptions.InvalidPathError"}  # of files that a visitor was not given


class Visitor:
    """A browser's requests, without a browser."""

    def __init__(self, address: str):
        self.address, self.session = address, uuid.uuid4().hex[:11]
        config = json.loads(self.get("/config").read())
        ids = {each["props"].get("elem_id"): each["id"] for each in config["components"]}
        self.events = {}
        for number, each in enumerate(config["dependencies"]):
            for target, name in each["targets"]:
                self.events[target, name] = number
        self.upload_event = self.events[ids["upload"], "upload"]
        self.load_event = next(number for (_, name), number in self.events.items() if name == "load")

    def get(self, path: str, **headers: str):
        return urllib.request.urlopen(urllib.request.Request(self.address + path, headers=headers), timeout=60)

    def post(self, path: str, body: bytes, kind: str):
        request = urllib.request.Request(self.address + path, body, {"Content-Type": kind})
        return json.loads(urllib.request.urlopen(request, timeout=60).read())

    def act(self, event: int, data: list) -> str:
        """Returns what the page shows after an event, as JSON."""
        body = {"data": data, "fn_index": event, "session_hash": self.session, "event_data": None, "trigger_id": None}
        self.post("/gradio_api/queue/join", json.dumps(body).encode(), "application/json")
        for line in self.get(f"/gradio_api/queue/data?session_hash={self.session}"):
            if b'"process_completed"' in line:
                return line.decode()
        raise AssertionError("no answer")

    def open(self) -> str:
        return self.act(self.load_event, [None, *SETTINGS])

    def upload(self, name: str, image: bytes) -> str:
        head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
        body = f"{head}Content-Type: image/png\r\n\r\n".encode() + image + b"\r\n--x--\r\n"
        (path,) = self.post("/gradio_api/upload", body, "multipart/form-data; boundary=x")
        return path

    def search(self, path: str) -> str:
        file = {"path": path, "orig_name": path.rpartition("/")[2], "meta": {"_type": "gradio.FileData"}}
        return self.act(self.upload_event, [file, *SETTINGS])


SETTINGS = ["roxford5k", ["GeM+", "Regional-GeM"], "", 20, 9, 0.15]


def image_of(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def status(visitor: Visitor, path: str, **headers: str) -> int:
    try:
        return visitor.get(path, **headers).status
    except urllib.error.HTTPError as error:
        return error.code


def test_only_hosts_of_this_machine_are_answered_and_no_other_page_reads_an_answer(address):
    visitor = Visitor(address)
    for code, hosts in (
        (200, ("localhost:9", "LOCALHOST", "127.0.0.1", "[::1]:7860")),
        (403, ("192.168.0.7:7860", "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "[")),
    ):
        assert {host: status(visitor, "/config", Host=host) for host in hosts} == dict.fromkeys(hosts, code)
    answer = visitor.get("/config", Origin="http://evil.example")
    assert answer.headers.get("Access-Control-Allow-Origin") is None


def test_what_the_page_was_not_given_cannot_be_read_and_a_large_upload_is_refused(address):
    visitor = Visitor(address)
    for path in ("/etc/hostname", str(ROOT / "README.md"), "../../etc/hostname", "log.txt"):
        for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/"):
            assert status(visitor, f"{route}{path}") in (403, 404)
        assert '"success":false' in visitor.search(path).replace(" ", "")
    with pytest.raises(urllib.error.HTTPError, match="413"):
        visitor.upload("a.png", bytes(21 << 20))


def test_two_visitors_never_see_each_others_images(address):
    first, second = Visitor(address), Visitor(address)
    path = first.upload("secret-of-the-first.png", image_of(1))
    assert "secret-of-the-first" in first.search(path)
    assert "secret-of-the-first" not in second.open()
    assert "secret-of-the-second" in second.search(second.upload("secret-of-the-second.png", image_of(2)))
    assert "secret-of-the-second" not in first.open()
    for each in (first, second):  # even those who know where it lies
        assert status(each, f"/gradio_api/file={path}") == 403


# ---- the page in a browser ----


@pytest.fixture(scope="module")
def context(browser):
    """A browser context for all visitors, which caches Gradio's scripts."""
    return browser.new_context()


@pytest.fixture
def opened(context, address):
    """Opens the page; at the end its console must be empty."""
    pages, said = [], []

    def note_request(request) -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            said.append(request.url)

    def open_page(width: int = 1280):
        page = context.new_page()
        pages.append(page)
        page.set_viewport_size({"width": width, "height": 900})
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", note_request)
        page.goto(address)
        page.locator("#results .hit img").nth(19).wait_for()
        return page

    yield open_page
    for page in pages:
        assert page.evaluate("window.evil") is None
        page.close()
    assert said == []


BEFORE, AFTER = 0, 1


def texts(page, ranking: int, kind: str) -> list[str]:
    """Returns the names or scores of a ranking."""
    return page.locator("#results .hits").nth(ranking).locator(f".{kind}").all_text_contents()


def wait_for_other_scores(page, ranking: int, scores: list[str]) -> None:
    page.wait_for_function(
        "([ranking, texts]) => [...document.querySelectorAll('#results .hits')[ranking].querySelectorAll('.score')]"
        ".some((score, i) => score.textContent !== texts[i])",
        arg=[ranking, scores],
        timeout=30000,
    )


def pick(page, number: int) -> None:
    """Clicks a query, and waits for its results."""
    page.locator("#queries button").nth(number).click()
    page.locator(f"#queries button[aria-pressed=true][data-choice='{number}']").wait_for()


def test_a_query_a_click_and_its_explanation(opened):
    page = opened()
    before, after = map(
        float, re.search(r"AP Medium ([\d.]+) → ([\d.]+)", page.locator("#results").text_content()).groups()
    )
    assert after >= before
    pick(page, 0)
    before = texts(page, AFTER, "name")
    labels = set(page.locator("#results .hit .label").all_text_contents())
    assert labels <= {"easy", "hard", "ignored", "wrong"}
    assert len(labels) > 1
    pick(page, 1)
    assert page.locator("#query .name").text_content() == EVIL + "2"
    assert texts(page, AFTER, "name") != before
    assert set(texts(page, BEFORE, "name") + texts(page, AFTER, "name")) & set(STRANGE)
    page.locator("#results .hits").nth(AFTER).locator("button").nth(2).click()
    page.locator("#why .reason").wait_for()
    text = page.locator("#why").text_content()
    assert f"Why {texts(page, AFTER, 'name')[2]} moved from place" in text
    s1, s2 = (float(re.search(rf"{name}. = (\d\.\d+)", text)[1]) for name in ("q · x", "e · x"))
    assert (s1 + s2) / 2 == pytest.approx(float(texts(page, AFTER, "score")[2]), abs=1.01e-4)
    for parts in (0, 1):
        assert page.locator("#why .parts").nth(parts).locator("img").count() == 10  # K neighbours and itself


def test_each_slider_acts_and_so_does_a_module(opened):
    page = opened()
    for slider in ("m", "k", "beta"):
        scores = texts(page, AFTER, "score")
        page.locator(f"#{slider} input[type=range]").focus()
        for _ in range(3):
            page.keyboard.press("ArrowLeft")
        if slider == "m":
            page.locator("#results .soft", has_text="reranked 21 in").wait_for(timeout=5000)
        else:
            wait_for_other_scores(page, AFTER, scores)
    scores = texts(page, BEFORE, "score")
    page.locator("button", has_text="Modules of the descriptor").click()
    page.locator("#modules label", has_text="Regional-GeM").click()
    wait_for_other_scores(page, BEFORE, scores)


def test_an_upload_a_box_and_a_broken_image(opened, tmp_path):
    page = opened()
    pixels = np.kron(np.random.default_rng(8).integers(0, 256, (6, 8, 3)), np.ones((40, 40, 1)))
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "mine.png")
    (tmp_path / "broken.jpg").write_text("no image")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "mine.png")
    page.locator("#query .name", has_text="mine.png").wait_for()
    assert page.locator("#results .hit .label").count() == 0  # it has no ground truth
    whole = texts(page, BEFORE, "score")
    canvas = page.locator("#query .canvas")
    canvas.scroll_into_view_if_needed()
    sides = canvas.bounding_box()
    page.mouse.move(sides["x"] + 10, sides["y"] + 10)
    page.mouse.down()
    page.mouse.move(sides["x"] + sides["width"] / 2, sides["y"] + sides["height"] / 2, steps=4)
    page.mouse.up()
    drawn = page.locator("#query .soft", has_text=re.compile(r"^Box \d"))
    drawn.wait_for()
    box = [int(n) for n in re.findall(r"\d+", drawn.text_content())]
    assert box == pytest.approx([10 * 320 / sides["width"], 10 * 240 / sides["height"], 160, 120], abs=2)
    assert texts(page, BEFORE, "score") != whole
    page.locator("button", has_text="Find a query").click()
    for text, shown, words in (
        ("1, 2, x, 4", "#message [role=alert]", "a box consists of four numbers"),
        ("", "#query .soft", "The whole image"),
    ):
        page.locator("#box input, #box textarea").first.fill(text)
        page.keyboard.press("Enter")
        page.locator(shown, has_text=words).wait_for()
    assert page.locator("#message [role=alert]").count() == 0
    page.locator("input[type=file]").first.set_input_files(tmp_path / "broken.jpg")
    page.locator("#message [role=alert]", has_text="broken.jpg: not an image").wait_for()
    assert page.locator("#query .name").text_content() == "mine.png"  # everything else is unchanged


def test_on_a_phone_nothing_is_wider_than_the_window_and_keys_reach_everything(opened):
    page = opened(390)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("document.documentElement.scrollHeight") < 2 * 844  # two screens for all
    page.locator("#queries button").nth(2).focus()
    page.keyboard.press("Enter")
    page.locator("#query .name", has_text="query_2").wait_for()
    page.locator("#results .hits").nth(AFTER).locator("button").first.focus()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    page.keyboard.press("Enter")
    page.locator("#why .reason:focus").wait_for()  # for keyboards and screen readers
    page.locator("#maps .map").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_maps_show_where_a_result_matches_and_can_be_turned_down(opened):
    page = opened()
    page.locator("#results .hits").nth(AFTER).locator("button").first.click()
    overlays = page.locator("#maps .map")
    overlays.first.wait_for()
    assert overlays.count() == 2
    opacity = "[...document.querySelectorAll('#maps .map')].map(map => getComputedStyle(map).opacity)"
    assert page.evaluate(opacity) == ["0.8", "0.8"]
    page.locator("#maps input[type=range]").focus()
    page.keyboard.press("Home")
    assert page.evaluate(opacity) == ["0", "0"]
    page.keyboard.press("End")
    page.locator("#maps input[type=checkbox]").uncheck()
    assert page.evaluate(opacity) == ["0", "0"]
    page.locator("#results .hits").nth(AFTER).locator("button").nth(1).click()
    page.locator("#maps input[type=checkbox]:not(:checked)").wait_for()  # the choice is kept
    page.locator("#maps input[type=checkbox]").check()
    assert page.evaluate(opacity) == ["1", "1"]


def test_an_open_explanation_follows_the_sliders(opened):
    page = opened()
    page.locator("#results .hits").nth(BEFORE).locator("button").nth(2).click()
    page.locator("#why .reason").wait_for()
    slider = page.locator("#k input[type=range]")
    slider.focus()
    for keys, neighbours in (("ArrowLeft", 9), ("ArrowLeft", 8)):
        page.keyboard.press(keys)
        page.wait_for_function(f"document.querySelector('#why .parts').querySelectorAll('img').length === {neighbours}")
    assert page.evaluate("document.activeElement.type") == "range"  # the focus stays on the slider
    page.locator("#m input[type=range]").focus()
    page.keyboard.press("Home")
    page.locator("#why", has_text="only the first 1 are reranked").wait_for()


def test_scores_are_bars_and_numbers_on_demand_and_a_search_without_match_says_so(opened):
    page = opened()
    assert page.locator("#results .bar").count() == 20
    assert not page.locator("#results .score").first.is_visible()
    page.get_by_label("Scores as numbers").check()
    assert page.locator("#results .score").first.is_visible()
    page.locator("button", has_text="Find a query").click()
    page.locator("#find input, #find textarea").first.fill("nothing")
    page.locator("#queries", has_text="No query has “nothing” in its name").wait_for()
