"""Datasets in each layout: how they are read, which are rejected, and that metrics equal the textbook formulas."""

import csv
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import latest
from oracles import all_protocols, challenge_map, mean_average_precision, recall_at
from PIL import Image

from model.errors import InputError
from revisitop.dataset import GroundTruth
from revisitop.descriptors import load_ranking
from revisitop.evaluate import evaluate, evaluate_positions, evaluate_ranks
from revisitop.index import positions_of
from revisitop.layout_csv import write_predictions
from revisitop.layouts import load_dataset
from revisitop.measures import NOT_FOUND
from revisitop.protocols import CLASS_PROTOCOLS, challenge_protocols


def draw(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 5, 3))
    Image.fromarray(np.kron(blocks, np.ones((10, 10, 1))).astype(np.uint8)).save(path)
    return path


def write_csv(path: Path, header: str, *rows: list[str], encoding: str = "utf-8", end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, lineterminator=end)
        writer.writerows([header.split(","), *rows])


INDEX = [f"{number:016x}" for number in range(12)]


@pytest.fixture
def own(tmp_path) -> Path:
    """A dataset in GLDv2's layout: twelve images, three queries of which one is ignored."""
    folder = tmp_path / "data" / "own"
    write_csv(folder / "index.csv", "id", *([each] for each in INDEX))
    write_csv(
        folder / "queries.csv",
        "id,x0,y0,x1,y1",
        ["q0", "", "", "", ""],
        ["q1", "2", "2", "40", "30"],
        ["q2"] + [""] * 4,
    )
    rows = ["q0", " ".join(INDEX[:3]), "Public"], ["q1", INDEX[5], "Private"], ["q2", "None", "Ignored"]
    write_csv(folder / "solution.csv", "id,images,Usage", *rows)
    for number, name in enumerate(INDEX):
        draw(folder / "index" / f"{name}.jpg", number)
    for number in range(2):
        draw(folder / "queries" / f"q{number}.png", [0, 5][number])
    return folder


def load(folder: Path):
    return load_dataset(folder.name, folder.parent)


def test_csv_lists_are_read(own):
    dataset = load(own)
    dataset.check_files()
    assert [*dataset.query_names] == ["q0", "q1"]
    assert [image.box for image in dataset.queries] == [None, (2, 2, 40, 30)]
    assert [truth.kinds["relevant"].tolist() for truth in dataset.ground_truth] == [[0, 1, 2], [5]]
    assert [protocol.name for protocol in dataset.protocols] == ["Public", "Private"]


@pytest.mark.parametrize(("encoding", "end"), [("latin-1", "\n"), ("utf-8-sig", "\r\n"), ("utf-8", "\r\n")])
def test_any_usual_encoding_and_names_with_commas_work(own, encoding, end):
    names = ["café,1", "b", "c"]
    write_csv(own / "index.csv", "id", *([name] for name in names), encoding=encoding, end=end)
    write_csv(own / "queries.csv", "id", ["q é"], encoding=encoding, end=end)
    write_csv(own / "solution.csv", "id,images", ["q é", "café,1 c"], encoding=encoding, end=end)
    for name in names:
        draw(own / "index" / f"{name}.webp", 1)
    draw(own / "queries" / "q é.png", 1)
    dataset = load(own)
    dataset.check_files()
    assert dataset.ground_truth[0].kinds["relevant"].tolist() == [0, 2]
    assert [protocol.name for protocol in dataset.protocols] == ["all"]


def test_gldv2s_own_names_and_nested_folders_work(own):
    (own / "metadata").mkdir()
    (own / "index.csv").rename(own / "metadata" / "index.csv")
    (own / "queries.csv").unlink()
    write_csv(own / "metadata" / "test.csv", "id", *([f"q{number}"] for number in range(9)))
    (own / "ground_truth").mkdir()
    (own / "solution.csv").rename(own / "ground_truth" / "retrieval_solution_v2.1.csv")
    for name in INDEX:
        nested = own / "index" / name[0] / name[1] / name[2] / f"{name}.jpg"
        nested.parent.mkdir(parents=True, exist_ok=True)
        (own / "index" / f"{name}.jpg").rename(nested)
    (own / "queries").rename(own / "test")
    dataset = load(own)
    dataset.check_files()
    assert (len(dataset.queries), len(dataset.database)) == (2, 12)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("solution.csv", "id,images\nq0,x y\nq1,00\nq2,None\n", "3 images"),
        ("solution.csv", "id,images\nq0,\nq1,\nq2,None\nq7,\n", "q7"),
        ("solution.csv", "id,images\nq0,\n", "q1, q2"),
        ("solution.csv", "q0,x\n", "header"),
        ("solution.csv", "id,images\nq0,\nq0,\n", "q0"),
        ("solution.csv", "id,images\nq0,None\nq1,None\nq2,None\n", "ignored"),
        ("solution.csv", "id,images\nq0\n", "line 2"),
        ("index.csv", "id\na\nb\na\n", "twice"),
        ("index.csv", "id\n../a\n", "../a"),
        ("index.csv", "id\na b\n", "space"),
        ("index.csv", "id\n", "index.csv"),
        ("queries.csv", "id\nq0\nq0\n", "twice"),
        ("queries.csv", "id,x0,y0,x1,y1\nq0,9,2,9,30\n", "box"),
        ("queries.csv", "id,x0,y0,x1,y1\nq0,a,2,9,30\n", "box"),
    ],
)
def test_contradictory_files_are_rejected(own, name, text, message):
    (own / name).write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        load(own)


@pytest.mark.parametrize("name", ["index.csv", "queries.csv", "solution.csv"])
def test_a_missing_list_is_reported(own, name):
    (own / name).unlink()
    with pytest.raises(InputError, match=f"no {name}"):
        load(own)


@pytest.fixture
def classes(tmp_path) -> Path:
    """Three classes of four, two and one images."""
    folder = tmp_path / "data" / "pets"
    for name, count in {"cat": 4, "dog": 2, "owl": 1}.items():
        for number in range(count):
            draw(folder / name / f"{number}.png", 10 * len(name) + number)
    return folder


def test_class_folders_are_queries_against_all_others(classes):
    dataset = load(classes)
    assert [*dataset.names] == [f"cat/{n}.png" for n in range(4)] + ["dog/0.png", "dog/1.png", "owl/0.png"]
    assert dataset.in_database.tolist() == [0, 1, 2, 3, 4, 5]
    assert dataset.ground_truth[1].kinds["same class"].tolist() == [0, 2, 3]
    assert dataset.ground_truth[1].kinds["itself"].tolist() == [1]


def test_empty_classes_images_of_two_classes_and_only_single_images_are_rejected(classes, tmp_path):
    (classes / "empty").mkdir()
    with pytest.raises(InputError, match="empty contains no image"):
        load(classes)
    (classes / "empty" / "a.png").symlink_to(classes / "cat" / "0.png")
    with pytest.raises(InputError, match="an image belongs to one class"):
        load(classes)
    for name in "ab":
        draw(tmp_path / "data" / "lonely" / name / "0.png", 0)
    with pytest.raises(InputError, match="no class has two images"):
        load_dataset("lonely", tmp_path / "data")


@pytest.mark.parametrize(
    "names", [("train", "val"), ("Gallery", "query"), ("cat", "images"), ("wrapper",), ("w", "__MACOSX")]
)
def test_folders_that_are_no_classes_are_refused(classes, names):
    target = classes.with_name("other")
    for name in names:
        shutil.copytree(classes, target / name)
    with pytest.raises(InputError, match=f"none of the layouts.*{names[0]}/"):
        load(target)


def test_a_folder_with_no_layout_or_with_two_is_refused(own, classes, tmp_path):
    (tmp_path / "data" / "nothing").mkdir()
    with pytest.raises(InputError, match=r"docs/datasets\.md"):
        load_dataset("nothing", tmp_path / "data")
    for folder in (own, classes):
        (folder / f"gnd_{folder.name}.pkl").write_bytes(pickle.dumps({}))
        with pytest.raises(InputError, match="two layouts"):
            load(folder)


def test_map_at_100_is_the_textbooks():
    rng = np.random.default_rng(0)
    for _ in range(400):
        n, q = int(rng.integers(1, 260)), int(rng.integers(1, 5))
        positives = [rng.choice(n, int(rng.integers(1, n + 1)), replace=False) for _ in range(q)]
        # Some images are unknown, some are repeated; fewer or more than 100, or none.
        named = [rng.integers(0, n + 9, int(rng.integers(0, 140))).tolist() for _ in range(q)]
        known = []
        for row in named:
            seen: set[int] = set()
            known.append(np.array([-1 if each >= n or each in seen or seen.add(each) else each for each in row]))
        usages = rng.choice(["Public", "Private"], q).tolist()
        truth = [GroundTruth({"relevant": own}, usage) for own, usage in zip(positives, usages, strict=True)]
        rows = [torch.from_numpy(np.append(row, -1).astype(np.int64)) for row in known]
        positions = [positions_of(torch.from_numpy(each.listed), row) for each, row in zip(truth, rows, strict=True)]
        found = evaluate_positions(positions, truth, challenge_protocols(sorted(set(usages))))
        for usage in set(usages):
            mine = [query for query in range(q) if usages[query] == usage]
            predictions = {str(query): [str(each) for each in named[query]] for query in mine}
            solution = {str(query): {str(each) for each in positives[query]} for query in mine}
            assert 100 * found[usage].map == pytest.approx(challenge_map(predictions, solution), abs=1e-9)


def test_recall_and_map_of_classes_equal_the_textbook_formulas():
    rng = np.random.default_rng(0)
    for _ in range(200):
        n, q = int(rng.integers(2, 40)), int(rng.integers(1, 6))
        rankings = np.stack([rng.permutation(n) for _ in range(q)])
        positives = [rng.choice(n, int(rng.integers(1, n)), replace=False).tolist() for _ in range(q)]
        itself = [[next(i for i in range(n) if i not in own)] for own in positives]
        truth = [
            GroundTruth({"same class": np.array(own), "itself": np.array(out)})
            for own, out in zip(positives, itself, strict=True)
        ]
        metrics = evaluate_ranks(rankings.T, truth, CLASS_PROTOCOLS)["all"]
        sets = [[set(each) for each in lists] for lists in (positives, itself)]
        expected = [recall_at(rankings, *sets, k) for k in (1, 5, 10)]
        np.testing.assert_allclose(100 * metrics.at_k, expected)
        lists = [{"good": own, "out": out} for own, out in zip(positives, itself, strict=True)]
        assert 100 * metrics.map == pytest.approx(mean_average_precision(rankings, lists, ("good",), ("out",)))


def test_predictions_of_the_challenge_are_evaluated(own, layout, command, tmp_path):
    words = ("TEST.DATASET_LIST", "own", "TEST.DATA_DIR", own.parent, "TEST.FEATURES", tmp_path / "p.csv")
    predictions = [INDEX[0], INDEX[0], "unknown", INDEX[2], INDEX[7]]
    write_csv(tmp_path / "p.csv", "id,images", ["q0", " ".join(predictions)], ["q2", INDEX[0]])
    outcome = command("test.py", *words, "TEST.REPORT")
    assert outcome.code == 0, outcome.err
    assert "Retrieval results: mAP@100 Public: 50.00, Private: 0.00" in outcome.out  # (1 + 2/4) / 3
    assert "1 of 2 queries have no predictions" in outcome.out
    write_csv(tmp_path / "p.csv", "id,images", ["q9", INDEX[0]])
    with pytest.raises(InputError, match="q9"):
        load_ranking(tmp_path / "p.csv", load(own))
    with pytest.raises(InputError, match="q9"):
        load_ranking(tmp_path / "p.csv", load(layout.folder))


def test_predictions_that_are_written_have_the_metrics_of_their_ranking(own, tmp_path):
    dataset = load(own)
    ids = np.array([[4, -1, 0, 1, -1], [-1, -1, -1, -1, -1]])
    write_predictions(tmp_path / "p.csv", dataset.query_names, dataset.names, ids)
    found = load_ranking(tmp_path / "p.csv", dataset)
    assert found.ids.tolist() == [[4, -1, 0, 1], [-1, -1, -1, -1]]
    assert [where.tolist() for where in found.positions] == [[2, 3, NOT_FOUND], [NOT_FOUND]]


def test_each_layout_goes_from_folder_to_metrics_and_report(own, classes, command, two_layers, tmp_path):
    words = ("TEST.DATA_DIR", own.parent, "TEST.DATASET_LIST", "['own', 'pets']", *two_layers)
    outcome = command("test.py", *words, "TEST.REPORT")
    assert outcome.code == 0, outcome.err
    found = re.search(r"Retrieval results: mAP@100 Public: ([\d.]+), Private: ([\d.]+)\n", outcome.out)
    run = latest(tmp_path / "work" / "output")
    # q0 and q1 are their first positive image, or a part of it.
    dataset = load(own)
    ranking = load_ranking(run / "own_retrieval_predictions.csv", dataset)
    metrics = evaluate(ranking, dataset.ground_truth, dataset.protocols)
    assert found.groups() == tuple(f"{100 * metrics[usage].map:.2f}" for usage in ("Public", "Private"))
    assert ranking.ids[0, 0] == 0
    assert re.search(r"Retrieval results: recall@1,5 all: [\d.]+ 100.00", outcome.out)
    page = (run / "report" / "index.html").read_text()
    assert "mAP@100 in percent" in page
    assert '<b class="label right">right</b>' in page
    table = command("tools/tables.py", "main", *words).out
    assert "| network | dataset | setting | mAP@100 Public | mAP@100 Private | Public P@" in table
    assert re.search(r"\| [^|]+ \| pets \| retrieval \| [\d.]+ \| [\d.]+ 100.00[ -]* \|  \|", table)
    outcome = command("tools/check.py", "own", "TEST.DATA_DIR", own.parent, "--decode")
    assert outcome.code == 0, outcome.err
    assert "relevant: 4 in all, 1 to 3 per query, median 2; 0 queries without" in outcome.out
    outcome = command("tools/check.py", "own", "TEST.DATA_DIR", own.parent, "--list")
    dataset = load_dataset("own", own.parent)
    images = [("query", dataset.queries), ("database", dataset.database)]
    listed = [f"{part} {number} {image.path}" for part, each in images for number, image in enumerate(each)]
    assert [line for line in outcome.out.splitlines() if re.match(r"(query|database) \d", line)] == listed


def test_toy_in_the_layout_of_gldv2_has_the_ground_truth_of_toy(toy_data, command):
    assert command("tools/check.py", "toy_gldv2", "TEST.DATA_DIR", toy_data).code == 0
    dataset = load_dataset("toy_gldv2", toy_data)
    truth = load_dataset("toy", toy_data).ground_truth
    for own, original in zip(dataset.ground_truth, truth, strict=True):
        assert own.kinds["relevant"].tolist() == [*original.kinds["easy"], *original.kinds["hard"]]
    assert [entry.usage for entry in dataset.ground_truth[:3]] == ["Public", "Private", "Public"]


@pytest.mark.parametrize("kind", ["tensor", "array", "pickled tensor"])
def test_a_saved_ranking_of_another_system_is_evaluated(command, layout, tmp_path, kind):
    rng = np.random.default_rng(0)
    rankings = np.stack([rng.permutation(24) for _ in range(3)])
    saved = np.stack([np.sort(rng.random((3, 24)))[:, ::-1], rankings]).astype(np.float32)
    path, tensor = tmp_path / "nn_roxford5k.pkl", torch.from_numpy(saved)
    torch.save(tensor, path) if kind == "tensor" else path.write_bytes(
        pickle.dumps(saved if kind == "array" else tensor)
    )
    words = ("TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k", "TEST.FEATURES", path)
    outcome = command("test.py", *words)
    assert outcome.code == 0, outcome.err
    expected = all_protocols(rankings, layout.gnd["gnd"])
    line = f"Retrieval results: mAP E: {expected['E']:.2f}, M: {expected['M']:.2f}, H: {expected['H']:.2f}"
    assert line in outcome.out


def test_a_saved_ranking_that_does_not_fit_is_refused(layout, tmp_path):
    dataset, path = load(layout.folder), tmp_path / "nn_roxford5k.pkl"
    rankings = np.stack([np.random.default_rng(query).permutation(24) for query in range(3)]).astype(np.float32)
    saved = np.stack([np.zeros((3, 24), np.float32), rankings])
    for place, value in {
        (1, 2, 0): 24,
        (1, 2, 1): 0.5,
        (1, 2, 2): np.nan,
        (1, 1, 3): rankings[1, 4],
        (1, 0, 0): -2,
    }.items():
        changed = saved.copy()
        changed[place] = value
        path.write_bytes(pickle.dumps(changed))
        with pytest.raises(InputError):
            load_ranking(path, dataset)
    for other in (saved[:, :2], saved[:1], saved[1, :2], "text", [saved]):
        path.write_bytes(pickle.dumps(other))
        with pytest.raises(InputError):
            load_ranking(path, dataset)
    path.write_bytes(pickle.dumps(saved[:, :, :5]))
    assert load_ranking(path, dataset).ids.shape == (3, 5)
