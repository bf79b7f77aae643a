import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow  # searches again and again

NAMES = [f"{folder}{name}" for folder in ("", "sub folder/", "фото/写真/") for name in ("a b.jpg", "c.PNG", "ü.webp")]
BROKEN = ["sub folder/cut.jpg", "фото/text.jpg"]


def draw(path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 5, 3))
    Image.fromarray(np.kron(blocks, np.ones((10, 10, 1))).astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Nine images in folders, two damaged ones, and files that are not images."""
    folder = tmp_path / "my images"
    for seed, name in enumerate(NAMES):
        draw(folder / name, seed)
    (folder / BROKEN[0]).write_bytes((folder / NAMES[0]).read_bytes()[:300])
    (folder / BROKEN[1]).write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image, and not meant to be")
    draw(folder / ".hidden" / "a.jpg", 50)
    return folder


@pytest.fixture
def search(command, folder, two_layers):
    def run(*arguments, database=folder, queries=folder / "sub folder" / "c.PNG"):
        return command("tools/search.py", "--database", database, "--queries", queries, *two_layers, *arguments)

    return run


def test_an_image_finds_itself_and_broken_ones_are_listed(search):
    outcome = search("--top", 3)
    assert outcome.code == 0, outcome.err
    assert re.search(r"\nc\.PNG\n   1   [\d.]+   1\.0000  sub folder/c\.PNG\n   2 .*\n   3 .*\n\Z", outcome.out)
    assert "database: 2 of 11 cannot be read and are skipped: sub folder/cut.jpg, фото/text.jpg" in outcome.out


def test_json_is_the_only_output_on_stdout_and_contains_every_query(search, folder):
    outcome = search("--json", "--top", 20, "TEST.RERANKER", "none", queries=folder)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert sorted(found["unreadable"]["database"]) == sorted(BROKEN)
    assert sorted(entry["query"] for entry in found["queries"]) == sorted(NAMES)
    for entry in found["queries"]:
        assert entry["results"][0]["file"] == entry["query"]
        assert sorted(result["file"] for result in entry["results"]) == sorted(NAMES)
        scores = [result["score"] for result in entry["results"]]
        assert scores == sorted(scores, reverse=True)
    assert "queries: 9 images extracted, 2 unreadable" in outcome.err


def test_only_new_and_changed_images_are_extracted(search, folder):
    def extracted(outcome) -> dict[str, int]:
        assert outcome.code == 0, outcome.err
        return {name: int(count) for name, count in re.findall(r"(\w+): (\d+) images extracted", outcome.out)}

    assert extracted(search()) == {"database": 9, "queries": 1}
    again = search()
    assert extracted(again) == {}
    assert "database.npy: reused" in again.out
    assert "2 of 11 cannot be read" in again.out

    draw(folder / "new.jpg", 20)  # in the middle of the list
    draw(folder / NAMES[4], 21)  # another image under the same name: also the query
    draw(folder / BROKEN[0], 22)  # repaired
    (folder / NAMES[0]).unlink()
    outcome = search("--top", 11)
    assert extracted(outcome) == {"database": 3, "queries": 1}
    assert "database: 3 images extracted, 7 unchanged, 1 unreadable" in outcome.out
    assert "1 of 11 cannot be read" in outcome.out
    assert re.search(r"   1   [\d.]+   1\.0000  sub folder/c\.PNG\n", outcome.out)
    assert NAMES[0] not in re.findall(r"[\d.]+  (.*)\n", outcome.out)
    assert "  10  " in outcome.out
    assert "  11  " not in outcome.out


def test_the_report_shows_results_without_right_or_wrong(search, folder):
    outcome = search("--report", queries=folder / "фото")
    path = re.search(r"the report is (.*)", outcome.out)[1]
    page = (folder.parent / "work" / path).read_text()
    assert "写真/c.PNG" in page
    assert "wrong" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    assert "mAP" not in page


@pytest.mark.parametrize(
    ("words", "change", "noun"),
    [
        ((), {"database": "nowhere"}, "--database nowhere"),
        ((), {"database": "FOLDER/a b.jpg"}, "a b.jpg"),
        ((), {"queries": "nowhere.jpg"}, "nowhere.jpg"),
        ((), {"queries": "FOLDER/фото/text.jpg"}, "text.jpg"),
        ((), {"database": "FOLDER/empty"}, "empty"),
        *((("--top", top), {}, "400") for top in ("0", "401", "x")),
    ],
)
def test_invalid_databases_queries_and_numbers_are_reported(search, folder, words, change, noun):
    (folder / "empty").mkdir()
    outcome = search(*words, **{key: value.replace("FOLDER", str(folder)) for key, value in change.items()})
    assert outcome.code == 2
    assert re.search(f"error: .*{noun}", outcome.err.splitlines()[-1])


def test_skipped_files_are_counted_by_reason_and_named(search, folder, monkeypatch):
    (folder / "photo.HEIC").write_bytes(b"no matter")
    (folder / "raw.cr2").write_bytes(b"no matter")
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "folder.jpg").mkdir()
    draw(folder / "folder.jpg" / "inside.png", 30)
    (folder / "a\nforged  line\x1b[2J.jpg").write_bytes((folder / NAMES[0]).read_bytes())
    monkeypatch.setattr("extraction.images.FORMATS", ("JPEG", "PNG", "WEBP"))  # like without pillow-heif
    outcome = search("--top", 400)
    assert outcome.code == 0, outcome.err
    assert re.search(r"2 skipped, unsupported image formats: photo.HEIC, raw.cr2; pip install pillow-heif", outcome.out)
    assert "3 skipped, broken links, linked folders, or not files: gone.jpg, loop.jpg, pipe.jpg\n" in outcome.out
    assert "1 skipped, hidden\n" in outcome.out
    assert "  folder.jpg/inside.png\n" in outcome.out
    assert "  a\\nforged  line\\x1b[2J.jpg\n" in outcome.out
    assert "\x1b" not in outcome.out + Path("log.txt").read_text()


def test_names_of_every_kind_are_found_reported_and_harmless(search, tmp_path):
    names = ["<script>alert(1)<b>.png", "two\nlines.png", "\x1b[31mred.png", "x" * 251 + ".png"]
    folder = os.fsencode(tmp_path / "strange")
    os.mkdir(folder)
    draw(tmp_path / "plain.png", 0)
    for number, name in enumerate([*map(os.fsencode, names), b"not \xff utf-8.png"]):
        draw(tmp_path / "plain.png", number)
        os.rename(tmp_path / "plain.png", os.path.join(folder, name))
    where = {"database": tmp_path / "strange", "queries": tmp_path / "strange"}
    outcome = search("--report", "--top", 5, **where)
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert "\x1b" not in outcome.out + outcome.err
    assert len([line for line in lines if re.match(r" +1 +[\d.]+ +1\.0000 ", line)]) == 5
    for shown in (names[0], r"two\nlines.png", r"\x1b[31mred.png", names[3]):
        assert any(line.endswith(shown) for line in lines)
    page = (tmp_path / "work" / "output" / "runs" / "latest" / "report" / "index.html").read_bytes()
    assert b"<script" not in page
    assert page.count(b"data:image/jpeg") >= 5
    found = json.loads(search("--top", 5, "--json", **where).out)["queries"]
    assert {names[0], names[1], names[2]} < {entry["query"] for entry in found}


# ---- in a vector database ----


@pytest.fixture
def pymilvus():
    return pytest.importorskip("pymilvus")


@pytest.fixture
def entities(pymilvus):
    """Returns the names in each collection of a file."""
    from milvus_lite.server_manager import server_manager_instance

    def read(file: Path) -> dict[str, list[str]]:
        client, found = pymilvus.MilvusClient(str(file)), {}
        for collection in client.list_collections():
            client.load_collection(collection)
            rows = client.query(collection, output_fields=["name"], limit=1000)
            found[collection] = sorted(row["name"] for row in rows)
        client.close()
        server_manager_instance.release_all()  # so that the next command opens the file like a new process
        return found

    return read


def found_by(outcome) -> dict:
    assert outcome.code == 0, outcome.err
    return {entry["query"]: entry["results"] for entry in json.loads(outcome.out)["queries"]}


@pytest.mark.parametrize("name", ["superglobal", "alpha-qe", "none"])
def test_milvus_finds_what_exact_search_finds(search, pymilvus, folder, tmp_path, name):
    words = ("--json", "--top", 20, "TEST.RERANKER", name)
    exact = found_by(search(*words, queries=folder))
    found = found_by(search(*words, "--index", f"milvus:{tmp_path / 'x.db'}", queries=folder))
    assert found.keys() == exact.keys()
    for query, results in exact.items():
        scores = {each["file"]: each["score"] for each in results}
        assert [each["score"] for each in found[query]] == pytest.approx([*scores.values()], abs=2e-6)
        assert {each["file"]: each["score"] for each in found[query]} == pytest.approx(scores, abs=2e-6)


def test_milvus_is_updated_in_place(search, entities, folder, tmp_path):
    def update() -> tuple[int, ...]:
        outcome = search("--index", f"milvus:{tmp_path / 'x.db'}", "--top", 20)
        assert outcome.code == 0, outcome.err
        counts = re.search(r"(\d+) images new or changed, (\d+) removed, (\d+) unchanged", outcome.out).groups()
        (names,) = entities(tmp_path / "x.db").values()
        shown = re.findall(r"^ +\d+  [\d. ]+  (.*)$", outcome.out, re.MULTILINE)
        assert sorted(shown) == names
        return tuple(map(int, counts))

    assert update() == (9, 0, 0)
    assert update() == (0, 0, 9)
    draw(folder / "new.jpg", 20)
    draw(folder / NAMES[4], 21)  # changed, the query
    (folder / NAMES[0]).rename(folder / "renamed.jpg")
    (folder / NAMES[7]).unlink()
    assert update() == (3, 2, 6)
    assert update() == (0, 0, 9)


def test_an_interrupted_insertion_is_resumed_without_duplicates(search, pymilvus, entities, tmp_path, monkeypatch):
    monkeypatch.setattr("tools.milvus._SENT_BYTES", 3 * 4 * 16)
    insert = pymilvus.MilvusClient.upsert

    def interrupted(client, collection, data):
        insert(client, collection, data[:2])
        raise KeyboardInterrupt

    words = ("--index", f"milvus:{tmp_path / 'x.db'}")
    with monkeypatch.context() as patched:
        patched.setattr(pymilvus.MilvusClient, "upsert", interrupted)
        assert search(*words).code == 130
    outcome = search(*words)
    assert "7 images new or changed, 0 removed, 2 unchanged" in outcome.out
    assert list(entities(tmp_path / "x.db").values()) == [sorted(NAMES)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--index", "milvus:http://localhost:1"), "Milvus at http://localhost:1: Fail connecting to server"),
        (("--index", "faiss:x"), "argument --index: 'faiss:x' is not milvus:FILE.db or milvus:http://HOST:PORT"),
        (("--index", "milvus:x.db", "TEST.INDEX", "Flat"), "--index and TEST.INDEX cannot be combined"),
        (("--index", "milvus:x.db", "TEST.RERANKER", "dba"), "--index and TEST.RERANKER dba cannot be combined"),
    ],
)
def test_an_unusable_vector_database_is_reported_in_one_line(search, pymilvus, words, message):
    outcome = search(*words)
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith(f"error: {message}")


def test_a_collection_of_another_database_is_refused(search, pymilvus, tmp_path):
    words = ("--index", f"milvus:{tmp_path / 'x.db'}")
    assert search(*words).code == 0
    client = pymilvus.MilvusClient(str(tmp_path / "x.db"))
    (name,) = client.list_collections()
    client.drop_collection(name)
    client.create_collection(name, dimension=8)
    client.close()
    outcome = search(*words)
    assert outcome.code == 2
    assert re.search(rf"^error: the collection {name} in .* belongs to another database .*: drop it", outcome.err, re.M)
