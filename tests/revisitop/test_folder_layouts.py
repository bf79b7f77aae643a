"""Datasets that are folders of images: galleries, places, instances; and the measures that are published for them."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import latest
from PIL import Image

from model.errors import InputError
from modules.expansion import QueryExpansion
from modules.reranking import SuperGlobalReranker
from modules.search import Database
from revisitop.dataset import GroundTruth
from revisitop.evaluate import evaluate_ranks
from revisitop.index import FaissDatabase, new_index
from revisitop.layout_places import positives_within
from revisitop.layouts import load_dataset
from revisitop.measures import NOT_FOUND
from revisitop.protocols import CLASS_PROTOCOLS, INSTANCE_PROTOCOLS, PLACE_PROTOCOLS
from revisitop.retrieve import retrieve
from revisitop.stages import Reranked, SearchedAgain, search_for


def image(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return path


def load(folder: Path, **settings):
    return load_dataset(folder.name, folder.parent, **settings)


@pytest.fixture
def shop(tmp_path) -> Path:
    folder = tmp_path / "shop"
    for name in ("query/bag/1.jpg", "query/hat/1.png", "query/sock/1.jpg"):
        image(folder / name)
    for name in ("gallery/bag/2.jpg", "gallery/bag/old/3.JPG", "gallery/hat/2.jpeg", "gallery/coat/1.jpg"):
        image(folder / name)
    return folder


@pytest.fixture
def town(tmp_path) -> Path:
    folder = tmp_path / "town"
    for place, number in enumerate((0, 3, 25, 26, 400)):
        image(folder / "database" / str(place) / f"@{500000 + number}@4000000.5@17@T@.jpg")
    for number, north in enumerate(("4000000.5", "4000100")):
        image(folder / "queries" / f"@500000@{north}@17@T@{number}@.jpg")
    return folder


@pytest.fixture
def objects(tmp_path) -> Path:
    folder = tmp_path / "objects"
    for name in (
        "cup/query/q.jpg",
        "cup/pos/1.jpg",
        "cup/pos/2.jpg",
        "jug/query/a.jpg",
        "jug/query/b.jpg",
        "jug/pos/1.png",
    ):
        image(folder / name)
    return folder


def positives(dataset, kind: str) -> list[list[int]]:
    return [truth.kinds[kind].tolist() for truth in dataset.ground_truth]


def test_queries_and_database_in_class_folders(shop):
    dataset = load(shop)
    assert list(dataset.query_names) == ["bag/1.jpg", "hat/1.png", "sock/1.jpg"]
    assert list(dataset.names) == ["bag/2.jpg", "bag/old/3.JPG", "coat/1.jpg", "hat/2.jpeg"]
    assert positives(dataset, "same class") == [[0, 1], [3], []]
    assert (dataset.protocols, dataset.in_database) == (CLASS_PROTOCOLS, None)
    dataset.check_files()


@pytest.mark.parametrize("place", ["", "images/test"])
def test_places_are_positive_within_their_distance(town, tmp_path, place):
    folder = tmp_path / "moved" / "town"
    (folder / place).mkdir(parents=True)
    for part in ("database", "queries"):
        (town / part).rename(folder / place / part)
    dataset = load(folder)
    assert positives(dataset, "near") == [[0, 1, 2], []]
    assert positives(load(folder, radius=26), "near") == [[0, 1, 2, 3], []]
    assert dataset.protocols == PLACE_PROTOCOLS
    dataset.check_files()


def test_objects_with_queries_and_positive_images(objects):
    dataset = load(objects)
    assert list(dataset.query_names) == ["cup/query/q.jpg", "jug/query/a.jpg", "jug/query/b.jpg"]
    assert positives(dataset, "same object") == [[0, 1], [2], [2]]
    assert dataset.protocols == INSTANCE_PROTOCOLS
    assert [query.box for query in dataset.queries] == [None] * 3


def test_queries_of_objects_are_cropped_to_the_union_of_their_boxes(objects):
    (objects / "cup/query/q_bbox.txt").write_text("10 5 20 10\n15,8,25,4\n\n")
    for name in "ab":
        (objects / f"jug/query/{name}_bbox.txt").write_text("1 2 3 4")
    assert [query.box for query in load(objects, crop_queries=True).queries] == [(10, 5, 40, 15)] + [(1, 2, 4, 6)] * 2
    assert load(objects).left_out == {}
    for text in ("", "1 2 3", "1 2 3 0", "a b c d", "1 2 nan 4"):
        (objects / "jug/query/a_bbox.txt").write_text(text)
        with pytest.raises(InputError, match="x y w h"):
            load(objects, crop_queries=True)


def test_hidden_files_and_those_of_macos_are_left_out_with_their_number(shop, town, objects, tmp_path):
    classes = tmp_path / "classes"
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg"):
        image(classes / name)
    image(classes / "stray.jpg")
    for folder, inside in ((shop, "query"), (town, "queries"), (objects, "cup/pos"), (classes, "a")):
        before = load(folder)
        (folder / inside / ".DS_Store").write_bytes(b"")
        image(folder / inside / "._1.jpg")
        image(folder / inside / "__MACOSX" / "1.jpg")
        after = load(folder)
        assert (len(after.queries), len(after.database)) == (len(before.queries), len(before.database))
        assert len(after.left_out["hidden"]) == 3
        assert "3 left out (hidden)" in repr(after)
    assert load(classes).left_out["in no class folder"] == [classes / "stray.jpg"]


def test_each_folder_is_read_as_one_layout_only(shop, town, objects):
    (shop / "gallery").rename(shop / "index")
    for path in [*town.rglob("*.jpg")]:  # an equal folder in queries/ and database/ is not a class
        path.rename(path.parents[len(path.relative_to(town).parts) - 2] / path.name)
    for folder in (shop, town, objects):
        assert load(folder).layout


@pytest.mark.parametrize(
    ("fixture", "change", "noun"),
    [
        ("shop", lambda folder: image(folder / "database/bag/1.jpg"), "gallery"),
        ("shop", lambda folder: (folder / "query/empty").mkdir(), "empty"),
        ("shop", lambda folder: (folder / "gallery").rename(folder / "stock"), "stock"),
        ("town", lambda folder: image(folder / "database/a.jpg"), "UTM"),
        (
            "town",
            lambda folder: (
                image(folder / "images/test/queries/@1@2@.jpg") and (folder / "images/test/database").mkdir()
            ),
            "remove one",
        ),
        ("objects", lambda folder: image(folder / "pot/query/1.jpg"), "pos"),
        ("objects", lambda folder: image(folder / "pot/1.jpg"), "query"),
    ],
)
def test_folders_that_could_mean_something_else_are_refused(request, fixture, change, noun):
    folder = request.getfixturevalue(fixture)
    change(folder)
    with pytest.raises(InputError, match=noun):
        load(folder)


@pytest.mark.parametrize(
    ("files", "noun"),
    [
        (("1.jpg", "2.jpg"), "names of classes"),
        (("query/1.jpg", "gallery/2.jpg"), "class folders of the same names"),
        (("database/@1@2@.jpg",), "database/: .*@EAST@NORTH@"),
        (("cup/query/1.jpg", "pot/query/1.jpg"), "pos/"),
        (("train/a/1.jpg", "train/b/1.jpg"), "take train as"),
        (("Query/a/1.jpg", "gallery/a/2.jpg"), "rename Query/ to query/"),
        (("a/1.jpg", "b/2.jpg", "test/3.jpg"), "rename test/"),
    ],
)
def test_the_files_of_a_folder_without_a_layout_and_those_of_each_layout_are_named(tmp_path, files, noun):
    for name in files:
        image(tmp_path / "mine" / name)
    with pytest.raises(InputError, match=noun):
        load(tmp_path / "mine")


# ---- revisitop's pickles ----


def test_lists_may_name_files_of_any_format_and_leave_boxes_and_junk_out(tmp_path):
    names = ["a.JPG", "b.png", "c.jpeg", "d", "e.v2"]
    for name in (*names, "q"):
        image(tmp_path / "mine" / "jpg" / (name if name[-3:].lower() in ("jpg", "png", "peg") else f"{name}.jpg"))

    def read(truth: dict):
        content = {"imlist": names, "qimlist": ["q"], "gnd": [truth]}
        (tmp_path / "mine" / "gnd_mine.pkl").write_bytes(pickle.dumps(content))
        return load(tmp_path / "mine")

    dataset = read({"easy": [0], "hard": [1, 2]})
    dataset.check_files()
    assert dataset.queries[0].box is None
    assert {kind: each.tolist() for kind, each in dataset.ground_truth[0].kinds.items()} == {
        "easy": [0], "hard": [1, 2], "junk": [],
    }  # fmt: skip
    for truth in ({"ok": [0], "good": [3]}, {"good": [0, 3]}, {"ok": [0, 3]}):
        assert {kind: each.tolist() for kind, each in read(truth).ground_truth[0].kinds.items()} == {
            "ok": [0, 3], "junk": [],
        }  # fmt: skip
    assert [protocol.name for protocol in dataset.protocols] == ["E", "M", "H"]
    assert [protocol.name for protocol in read(truth).protocols] == ["all"]
    for truth, noun in (({"easy": [0], "hard": [1], "good": [3]}, "good"), ({"junk": [1]}, "easy")):
        with pytest.raises(InputError, match=noun):
            read(truth)


# ---- measures, as their authors compute them ----


def random_problems(count: int):
    """Yields rankings (Q, N), and the positives of each query, of which some have none."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        n, q = int(rng.integers(1, 60)), int(rng.integers(1, 6))
        rankings = np.stack([rng.permutation(n) for _ in range(q)])
        yield rng, rankings, [rng.choice(n, int(rng.integers(0, n + 1)), replace=False) for _ in range(q)]


def test_recall_of_places_counts_queries_without_positives_as_vpr_methods_evaluation_does():
    for _, rankings, near in random_problems(300):
        if not any(map(len, near)):
            continue
        found = evaluate_ranks(rankings.T, [GroundTruth({"near": each}) for each in near], PLACE_PROTOCOLS)["all"]
        for k, value in zip((1, 5, 10, 20), found.at_k, strict=True):
            hits = sum(bool(np.isin(row[:k], each).any()) for row, each in zip(rankings, near, strict=True))
            assert value == pytest.approx(hits / len(rankings), abs=1e-12)


def test_positives_are_all_places_within_the_distance():
    rng = np.random.default_rng(0)
    for _ in range(200):
        queries, database = (rng.integers(0, 60, (int(rng.integers(1, 30)), 2)).astype(float) for _ in range(2))
        for query, found in zip(queries, positives_within(25.0, queries, database), strict=True):
            assert found.tolist() == [
                number for number, (x, y) in enumerate(database) if (x - query[0]) ** 2 + (y - query[1]) ** 2 <= 625
            ]


def test_map_at_1000_is_that_of_ilias():
    rng = np.random.default_rng(0)
    for n in (5, 900, 1500, 4000):
        rankings = np.stack([rng.permutation(n) for _ in range(4)])
        same = [rng.choice(n, int(count), replace=False) for count in rng.integers(1, min(n, 1400), 4)]
        values = []
        for row, positive in zip(rankings, same, strict=True):
            relevant = np.isin(row[:1000], positive)
            precisions = [relevant[: place + 1].mean() for place in range(len(relevant)) if relevant[place]]
            # ILIAS: scikit-learn's average precision of the first 1000, times their share of min(1000, positives)
            values.append(np.mean(precisions) * relevant.sum() / min(1000, len(positive)) if precisions else 0.0)
        found = evaluate_ranks(rankings.T, [GroundTruth({"same object": each}) for each in same], INSTANCE_PROTOCOLS)
        assert found["all"].map == pytest.approx(np.mean(values), abs=1e-12)


# ---- a query that is a database image is no result of its own ----


def unit(count: int, dim: int = 8, seed: int = 0) -> torch.Tensor:
    rows = torch.from_numpy(np.random.default_rng(seed).standard_normal((count, dim))).float()
    return torch.nn.functional.normalize(rows, dim=1)


def test_an_excluded_row_is_neither_a_result_nor_a_candidate():
    rows, own = unit(30), torch.tensor([3, 17, 0])
    others = [torch.tensor([number for number in range(30) if number != each]) for each in own.tolist()]
    listed = [torch.tensor([5, each, 9]) for each in own.tolist()]
    stages = [Reranked(SuperGlobalReranker(8, 3)), SearchedAgain(QueryExpansion(3, 0.0, 8))]
    searched = search_for(stages, rows[own], Database(rows), listed, excluded=own)
    rankings = [searched.ranking, *(stage(searched) for stage in stages)]
    for query, kept in enumerate(others):  # a database without the row
        alone = search_for(stages, rows[own][[query]], Database(rows[kept]))
        for ranking, expected in zip(rankings, [alone.ranking, *(stage(alone) for stage in stages)], strict=True):
            assert ranking.ids[query].tolist() == kept[expected.ids[0]].tolist()
            places = {number: place for place, number in enumerate(ranking.ids[query].tolist())}
            assert ranking.positions[query].tolist() == [places[5], NOT_FOUND, places[9]]


def test_an_excluded_row_that_an_index_does_not_find_costs_no_result():
    pytest.importorskip("faiss")
    rows = unit(40)
    index = new_index("Flat", 8)
    index.add(rows[1:].numpy())  # numbers are one less
    database = FaissDatabase(Database(rows[1:]), index)
    exact = retrieve(rows[:2], Database(rows[1:]), 5, excluded=torch.tensor([38, 0]))
    found = retrieve(rows[:2], database, 5, [torch.tensor([20])] * 2, excluded=torch.tensor([38, 0]))
    assert found.ids.tolist() == exact.ids.tolist()


@pytest.mark.slow
def test_folders_go_to_metrics_report_table_and_tuning(shop, town, objects, command, tmp_path):
    words = ("TEST.DATA_DIR", tmp_path, "MODEL.NAME", "torchvision:resnet18", "TEST.WEIGHTS", "untrained")
    words = (*words, "TEST.SCALE_LIST", 1, "DATA_LOADER.NUM_WORKERS", 0)
    listed = ("TEST.DATASET_LIST", "shop,town,objects")
    outcome = command("test.py", *words, *listed, "TEST.REPORT")
    assert outcome.code == 0, outcome.err
    for line in ("mAP all", "our mAP all", "mAP@1000 all", "recall@1,5 all"):
        assert f"Retrieval results: {line}" in outcome.out
    assert outcome.out.count("town: the median number of positive images is 3") == 1
    assert "tools.tune --folds 2 --test shop" in outcome.out  # town has a single query with positive images
    assert re.search(r"recall@1 in percent +All\ntown, retrieval +50\.00\n", outcome.out)
    run = latest(tmp_path / "work" / "output").resolve()
    compared = command("tools/compare.py", f"{run}:retrieval", run, "TEST.DATA_DIR", tmp_path)
    assert compared.code == 0, compared.err
    for row in ("shop | all | mAP", "town | all | recall@1", "objects | all | mAP@1000"):
        assert f"| {row} | " in compared.out
    assert "not on the page" not in compared.out
    table = command("tools/tables.py", "rerankers", *words, *listed, "TEST.RERANKER", "aqe")
    assert table.code == 0, table.err
    assert "| recall@1 All |" in table.out
    tuned = command("tools/tune.py", "--on", "objects", "--test", "shop", *words, "--try", "SupG.rerank_k", "1,2")
    assert tuned.code == 0, tuned.err
    assert "to use it: python test.py TEST.DATASET_LIST shop MODEL.NAME torchvision:resnet18" in tuned.out
    tuned = command("tools/tune.py", "--on", "shop", "--test", "town", *words, "--try", "SupG.rerank_k", "1,2")
    assert "| town | all | recall@1 |" in tuned.out
    content = json.loads((latest(tmp_path / "work" / "output") / "results.json").read_text())["datasets"]["town"]
    assert {*content["retrieval"]["all"]["recall@1 of each query"].values()} == {100.0, 0.0}
    tuned = command("tools/tune.py", "--folds", 2, "--test", "shop", *words)
    assert "30 settings" in tuned.out  # of K and beta: every M takes in the whole database
