"""The demo: its steps without a page, and the page in a browser if Gradio and Chromium are installed."""

import importlib.util
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, Layout, free_port
from PIL import Image

from assembly import Output
from config import make_config
from extraction.images import ImageFile
from model.errors import InputError
from modules.reranking import SuperGlobalReranker
from modules.search import Database
from report.page import moves
from revisitop.evaluate import evaluate
from revisitop.layouts import load_dataset
from revisitop.retrieve import rerank, retrieve
from tools import demo_steps
from tools.demo import numbers_of
from tools.demo_steps import Asked, Collection, Library, compare, explained, find, read_upload

EVIL = "<script>window.evil=1"
STRANGE = [EVIL, "<img src=x onerror='window.evil=1'>", "{{value}} ${window.evil=1}"]


def unit_rows(count: int, dim: int = 16, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) + 0.5
    return torch.nn.functional.normalize(rows, dim=1)


@pytest.fixture
def collection(layout) -> Collection:
    """24 images and 3 queries with ground truth, with random descriptors."""
    return Collection(load_dataset("roxford5k", layout.data_dir), unit_rows(3, seed=1), Database(unit_rows(24)))


def asked(collection: Collection, number: int) -> Asked:
    image = collection.dataset.queries[number]
    return Asked(collection.dataset.query_name(number), image.box, ImageFile(image.path), number=number)


def found(collection: Collection, number: int = 0) -> demo_steps.Found:
    return find(collection, asked(collection, number), collection.queries[number : number + 1])


# ---- the steps ----


def test_both_rankings_and_their_ap_are_those_of_the_benchmark(collection):
    reranker = SuperGlobalReranker(m=12, k=3)
    dataset, queries = collection.dataset, collection.queries
    searched = retrieve(queries, collection.database, 24, dataset.listed)
    reranked = rerank(searched, reranker, queries, collection.database)
    metrics = [evaluate(each, dataset.ground_truth) for each in (searched, reranked)]
    for number in range(3):
        compared = compare(found(collection, number), reranker)
        for hits, ranking in ((compared.before, searched), (compared.after, reranked)):
            assert [hit.name for hit in hits] == [f"db_{i}" for i in ranking.ids[number, :10]]
            assert [hit.score for hit in hits] == pytest.approx(ranking.scores[number, :10].tolist(), abs=1e-6)
        for protocol, title in (("E", "Easy"), ("M", "Medium"), ("H", "Hard")):
            expected = [each[protocol].ap[number] for each in metrics]
            assert compared.aps[title] == pytest.approx(expected)
        kinds = dataset.ground_truth[number].kinds
        for hit in compared.after:
            kind = next((kind for kind, own in kinds.items() if int(hit.name[3:]) in own), "wrong")
            assert hit.label == {"junk": "ignored"}.get(kind, kind)
        assert [searched.ids[number, place] for place in compared.places[1]] == reranked.ids[number, :10].tolist()


def test_places_gained_are_the_difference_of_both_rankings():
    gained = moves({"retrieval": [5, 6, 7, 8], "reranking": [7, 5, 6, 9]})
    assert gained == {"retrieval": [-1, -1, 2, None], "reranking": [2, -1, -1, None]}
    several = moves({"retrieval": [5, 6], "a": [6, 5], "b": [5, 6]})
    assert several == {"retrieval": [None, None], "a": [1, -1], "b": [0, 0]}


def test_the_explanation_belongs_to_the_place_on_the_page(collection):
    reranker = SuperGlobalReranker(m=12, k=3)
    here = found(collection)
    compared = compare(here, reranker)
    for hits, places in zip((compared.before, compared.after), compared.places, strict=True):
        for hit, place in zip(hits, places, strict=True):
            why = explained(here, reranker, place)
            assert why.hit.name == hit.name
            assert why.hit.label == hit.label
            assert why.before - why.after == hit.moved
    for rank, (hit, place) in enumerate(zip(compared.after, compared.places[1], strict=True)):
        why = explained(here, reranker, place)
        assert (why.after, why.score) == (rank, pytest.approx(hit.score, abs=1e-6))
        assert len(why.neighbours) == len(why.chosen) == 4
    with pytest.raises(InputError, match="the result at place 13 keeps its place: only the first 12 are reranked"):
        explained(here, reranker, 12)


def test_without_ground_truth_there_is_no_frame_and_no_ap(collection):
    bare = replace(collection, dataset=replace(collection.dataset, ground_truth=[], protocols=()))
    compared = compare(found(bare), SuperGlobalReranker(m=12, k=3))
    assert compared.aps == {}
    assert {hit.label for hit in compared.before + compared.after} == {None}
    upload = Asked("mine.jpg", pixels=np.zeros((40, 40, 3), np.uint8))
    compared = compare(find(collection, upload, collection.queries[:1]), SuperGlobalReranker(m=12, k=3))
    assert compared.aps == {}
    assert {hit.label for hit in compared.before} == {None}


def test_visitors_do_not_share_results(collection):
    first, second = found(collection, 0), found(collection, 1)
    before = compare(first, SuperGlobalReranker(m=12, k=3))
    compare(second, SuperGlobalReranker(m=3, k=1))
    again = compare(first, SuperGlobalReranker(m=12, k=3))
    assert (again.before, again.after, again.aps) == (before.before, before.after, before.aps)


def test_queries_are_found_by_a_part_of_their_name(collection):
    assert collection.named("", 2) == ([0, 1], 3)
    assert collection.named("QUERY_2", 9) == ([2], 1)
    assert collection.named("none", 9) == ([], 0)


@pytest.mark.parametrize(
    ("given", "box"),
    [
        ([10, 20, 60, 50], (10, 20, 60, 50)),
        ([60, 50, 10, 20], (10, 20, 60, 50)),
        ([-5, -5, 500, 500], (0, 0, 80, 60)),
        ([10, 10, 12, 50], None),
        (None, None),
    ],
)
def test_a_box_is_sorted_and_clipped_and_a_click_removes_it(given, box):
    image = Asked("x", (1, 1, 9, 9), pixels=np.zeros((60, 80, 3), np.uint8))
    assert image.boxed(given).box == box
    if box:
        assert image.boxed(given).in_box().shape == (box[3] - box[1], box[2] - box[0], 3)


@pytest.mark.parametrize("text", ["1 2 3", "1 2 3 4 5", "a b c d", "nan 1 2 3", "inf 0 9 9"])
def test_invalid_boxes_are_rejected(text):
    with pytest.raises(InputError, match="a box consists of four numbers"):
        Asked("x", pixels=np.zeros((60, 80, 3), np.uint8)).boxed(numbers_of(text))


def test_an_upload_is_reduced_and_a_damaged_one_is_named(tmp_path, monkeypatch):
    Image.new("RGB", (3000, 1500), (200, 30, 30)).save(tmp_path / "large.jpg")
    upload = read_upload(tmp_path / "large.jpg", "large.jpg")
    assert upload.pixels.shape == (512, 1024, 3)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "large.jpg").read_bytes()[:900])
    (tmp_path / "text.png").write_text("no image")
    for name in ("cut.jpg", "text.png"):
        with pytest.raises(InputError, match=f"^{name}: ") as told:
            read_upload(tmp_path / name, name)
        assert str(tmp_path) not in str(told.value)
    monkeypatch.setattr(demo_steps, "UPLOAD_PIXELS", 1_000_000)
    with pytest.raises(InputError, match=r"large\.jpg has more than 1 million pixels"):
        read_upload(tmp_path / "large.jpg", "large.jpg")


def test_an_image_is_decoded_once_for_its_thumbnail(layout, monkeypatch):
    read, original = [], demo_steps.read_thumbnail
    monkeypatch.setattr(demo_steps, "read_thumbnail", lambda *given: read.append(given) or original(*given))
    image = ImageFile(layout.image("db_0"))
    assert demo_steps.thumbnail_uri(image) == demo_steps.thumbnail_uri(image)
    assert len(read) == 1
    assert demo_steps.thumbnail_uri(ImageFile(layout.folder / "none.jpg")) is None


@pytest.fixture
def options(layout, checkpoint_50):
    return [
        ("TEST.DATA_DIR", str(layout.data_dir)), ("TEST.DATASET_LIST", "roxford5k"), ("TEST.SCALE_LIST", 1),
        ("TEST.WEIGHTS", str(checkpoint_50)), ("DATA_LOADER.NUM_WORKERS", 0),
    ]  # fmt: skip


def test_descriptors_follow_the_modules_and_the_box(options, tmp_path):
    library = Library(make_config(options), Output(tmp_path / "out"), torch.device("cpu"))
    assert library.modules == ["GeM+", "Regional-GeM", "ReLU+"]  # with one scale, Scale-GeM is not offered
    on = library.modules
    first = library.collection("roxford5k", on)
    assert library.collection("roxford5k", on[::-1]) is first
    own = library.ask(first, 1)
    assert torch.equal(library.find("roxford5k", on, own).query, first.queries[1:2])
    height, width = own.whole().shape[:2]
    drawn = own.boxed((0, 0, width, height))
    extracted = library.find("roxford5k", on, drawn).query
    torch.testing.assert_close(library.find("roxford5k", on, own.boxed(None)).query, extracted)
    assert not torch.allclose(extracted, first.queries[1:2], atol=1e-3)
    upload = Asked("copy", own.box, pixels=own.whole())
    torch.testing.assert_close(library.find("roxford5k", on, upload).query, first.queries[1:2], atol=1e-5, rtol=0)
    other = library.collection("roxford5k", ["GeM+"])
    assert not torch.equal(other.queries, first.queries)
    with pytest.raises(InputError, match="there is no query 3"):
        library.ask(first, 3)


def test_a_folder_is_extracted_without_unreadable_images(layout, options, tmp_path):
    folder = layout.folder / "jpg"
    layout.image("db_3").write_text("no image")
    library = Library(make_config(options), Output(tmp_path / "out"), torch.device("cpu"), folder)
    collection = library.collection(library.names[0], library.modules)
    assert collection.unreadable == ["db_3.jpg"]
    assert len(collection.database) == len(collection.dataset.queries) == 26
    compared = compare(library.find("jpg", library.modules, library.ask(collection, 5)), SuperGlobalReranker(m=20))
    assert compared.before[0].name == collection.dataset.query_name(5)
    assert compared.aps == {}


# ---- the command ----


def test_missing_or_old_gradio_is_reported_in_one_line(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    outcome = command("tools/demo.py")
    assert outcome.code == 2
    assert outcome.err == "error: the page needs Gradio: pip install gradio\n"
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(__version__="5.49.1"))
    outcome = command("tools/demo.py")
    assert outcome.code == 2
    assert outcome.err == "error: the page needs Gradio 6, this is 5.49.1: pip install --upgrade gradio\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("TEST.RERANKER", "aqe"),
            "is not an option of python -m tools.demo; the page shows SuperGlobal",
        ),
        (("--database", "nowhere"), "--database nowhere: there is no such folder"),
        (("--database", ".", "TEST.DATASET_LIST", "toy"), "give only one"),
        (("TEST.DATASET_LIST", "none"), "no dataset none"),
    ],
)
def test_invalid_arguments_of_the_demo_are_reported(command, monkeypatch, words, message):
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(__version__="6.0"))
    outcome = command("tools/demo.py", *words)
    assert outcome.code == 2
    assert message in outcome.err.splitlines()[-1]


# ---- the page in a browser ----


@pytest.fixture(scope="module")
def address(browser, checkpoint_50, tmp_path_factory):
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
    port = free_port()
    words = ["--port", port, "--weights", checkpoint_50, "TEST.SCALE_LIST", 1]
    words += ["TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k", "DATA_LOADER.NUM_WORKERS", 0]
    with (folder / "screen.txt").open("w") as screen:
        command = subprocess.Popen(
            [sys.executable, "-m", "tools.demo", *map(str, words)], cwd=folder, stdout=screen, stderr=screen,
            env={**os.environ, "PYTHONPATH": str(ROOT), "GRADIO_TEMP_DIR": str(folder / "uploads")},
        )  # fmt: skip
    try:
        end = time.monotonic() + 120
        while "the page is" not in (folder / "screen.txt").read_text():
            assert command.poll() is None, (folder / "screen.txt").read_text()
            assert time.monotonic() < end, (folder / "screen.txt").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
        assert "Traceback" not in (folder / "screen.txt").read_text()
    finally:
        command.terminate()
        command.wait(20)


@pytest.fixture(scope="module")
def context(browser):
    """A browser context for all visitors, which caches Gradio's scripts."""
    return browser.new_context()


@pytest.fixture
def opened(context, address):
    """Opens the page; at the end its console must be empty."""
    pages, said = [], []

    def open_page(width: int = 1280):
        page = context.new_page()
        pages.append(page)
        page.set_viewport_size({"width": width, "height": 900})
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if outside(request.url, address) else None)
        page.goto(address)
        page.locator("#results .hit img").nth(19).wait_for()
        return page

    yield open_page
    for page in pages:
        assert page.evaluate("window.evil") is None
        page.close()
    assert said == []


def outside(url: str, address: str) -> bool:
    return not url.startswith((address, "data:", "blob:"))


def names(page, ranking: int = 1) -> list[str]:
    return page.locator("#results .hits").nth(ranking).locator(".name").all_text_contents()


def test_a_query_a_click_and_its_explanation(opened):
    page = opened()
    assert page.locator("#query .name").text_content() == "query_0"
    before = names(page)
    labels = set(page.locator("#results .hit .label").all_text_contents())
    assert labels <= {"easy", "hard", "ignored", "wrong"}
    assert len(labels) > 1
    assert re.search(r"AP Medium [\d.]+ → [\d.]+", page.locator("#results .facts").text_content())
    page.locator("#queries button").nth(1).click()
    page.locator("#query .name", has_text=EVIL).wait_for()
    assert names(page) != before
    shown = set(names(page, 0) + names(page, 1))
    assert shown & set(STRANGE)
    page.locator("#results .hits").nth(1).locator("button").nth(2).click()
    page.locator("#why .reason").wait_for()
    text = page.locator("#why").text_content()
    assert f"Why {names(page)[2]} moved from place" in text
    score = float(page.locator("#results .hits").nth(1).locator(".score").nth(2).text_content())
    s1, s2 = (float(re.search(rf"{name}. = (\d\.\d+)", text)[1]) for name in ("q · x", "e · x"))
    assert (s1 + s2) / 2 == pytest.approx(score, abs=1.01e-4)
    assert page.locator("#why .parts").nth(0).locator("img").count() == 10  # K neighbours and itself
    assert page.locator("#why .parts").nth(1).locator("img").count() == 10


def test_each_slider_acts_and_so_does_a_module(opened):
    page = opened()
    scores = page.locator("#results .hits").nth(1).locator(".score")
    for slider in ("m", "k", "beta"):
        before, facts = scores.all_text_contents(), page.locator("#results .facts").text_content()
        page.locator(f"#{slider} input[type=range]").focus()
        for _ in range(3):
            page.keyboard.press("ArrowLeft")
        page.wait_for_function(
            "text => document.querySelector('#results .facts').textContent !== text", arg=facts, timeout=5000
        )
        if slider != "m":
            page.wait_for_function(
                "texts => [...document.querySelectorAll('#results .hits')[1].querySelectorAll('.score')]"
                ".some((score, i) => score.textContent !== texts[i])",
                arg=before,
                timeout=5000,
            )
        else:
            page.locator("#results .facts", has_text="reranked 21 in").wait_for(timeout=5000)
    before = page.locator("#results .hits").nth(0).locator(".score").all_text_contents()
    page.locator("#modules label", has_text="Regional-GeM").click()
    page.wait_for_function(
        "texts => [...document.querySelectorAll('#results .hits')[0].querySelectorAll('.score')]"
        ".some((score, i) => score.textContent !== texts[i])",
        arg=before,
        timeout=30000,
    )


def test_an_upload_a_box_and_a_broken_image(opened, tmp_path):
    page = opened()
    pixels = np.kron(np.random.default_rng(8).integers(0, 256, (6, 8, 3)), np.ones((40, 40, 1)))
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "mine.png")
    (tmp_path / "broken.jpg").write_text("no image")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "mine.png")
    page.locator("#query .name", has_text="mine.png").wait_for()
    assert page.locator("#results .hit .label").count() == 0  # it has no ground truth
    whole = page.locator("#results .hits").nth(0).locator(".score").all_text_contents()
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
    assert page.locator("#results .hits").nth(0).locator(".score").all_text_contents() != whole
    page.locator("#box input, #box textarea").first.fill("1, 2, x, 4")
    page.keyboard.press("Enter")
    page.locator("#message [role=alert]", has_text="a box consists of four numbers").wait_for()
    page.locator("#box input, #box textarea").first.fill("")
    page.keyboard.press("Enter")
    page.locator("#query .soft", has_text="The whole image").wait_for()
    assert page.locator("#message [role=alert]").count() == 0
    page.locator("input[type=file]").first.set_input_files(tmp_path / "broken.jpg")
    page.locator("#message [role=alert]", has_text="broken.jpg: not an image").wait_for()
    assert page.locator("#query .name").text_content() == "mine.png"  # everything else is unchanged


def test_on_a_phone_nothing_is_wider_than_the_window_and_keys_reach_everything(opened):
    page = opened(375)
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    page.locator("#queries button").nth(2).focus()
    page.keyboard.press("Enter")
    page.locator("#query .name", has_text="query_2").wait_for()
    result = page.locator("#results .hits").nth(1).locator("button").first
    result.focus()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    page.keyboard.press("Enter")
    page.locator("#why .reason:focus").wait_for()  # for keyboards and screen readers
    assert page.evaluate("document.documentElement.scrollWidth") == 375


def test_two_visitors_see_their_own_results(opened):
    first, second = opened(), opened()
    second.locator("#queries button").nth(2).click()
    second.locator("#query .name", has_text="query_2").wait_for()
    own = names(first, 0)
    first.locator("#k input[type=range]").focus()
    first.keyboard.press("ArrowRight")
    first.locator("#results .hits").nth(1).locator("button").first.click()
    first.locator("#why .reason").wait_for()
    assert names(first, 0) == own != names(second, 0)
    assert first.locator("#query .name").text_content() == "query_0"
    assert second.locator("#why .reason").count() == 0


def test_files_are_not_accessible_and_a_large_upload_is_refused(address):
    for path in (ROOT / "README.md", "/etc/hostname", "log.txt"):
        with pytest.raises(urllib.error.HTTPError) as told:
            urllib.request.urlopen(f"{address}/gradio_api/file={path}")
        assert told.value.code in (403, 404)
    line = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'
    body = line + bytes(21 << 20) + b"\r\n--x--\r\n"
    request = urllib.request.Request(
        f"{address}/gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"}
    )
    with pytest.raises(urllib.error.HTTPError) as told:
        urllib.request.urlopen(request)
    assert told.value.code == 413
