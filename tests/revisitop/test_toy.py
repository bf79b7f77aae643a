import re
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from modules.search import Database
from revisitop import toy
from revisitop.evaluate import evaluate, ignored_images, positive_and_ignored
from revisitop.layouts import load_dataset
from revisitop.protocols import REVISITED_PROTOCOLS
from revisitop.retrieve import retrieve

pytestmark = pytest.mark.slow  # toy's first run


@pytest.fixture
def data_dir(toy_data):
    return toy_data


def test_toy_has_the_layout_of_roxford(data_dir):
    dataset = load_dataset("toy", data_dir)
    dataset.check_files()
    assert len(dataset.queries) >= 12
    assert 140 <= len(dataset.queries) + len(dataset.database) <= 160
    for image in dataset.queries + dataset.database:
        with Image.open(image.path) as view:
            assert all(140 <= side <= 200 for side in view.size)
    for query, truth in zip(dataset.queries, dataset.ground_truth, strict=True):
        assert query.read().size
        assert min(len(truth.kinds["easy"]), len(truth.kinds["hard"]), len(truth.kinds["junk"])) > 0
        assert len(set(truth.listed)) == len(truth.listed)


def test_toy_is_drawn_the_same_each_time(data_dir, tmp_path):
    toy.ensure_dataset(tmp_path, lambda images: islice(images, 20))
    for name in ("toy_000.jpg", "toy_017.jpg", "toy_query_03.jpg"):
        assert (tmp_path / "toy" / "jpg" / name).read_bytes() == (data_dir / "toy" / "jpg" / name).read_bytes()


def test_toy_weights_are_the_same_file_each_time_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(toy.os, "getpid", lambda: 1)
    path = toy.ensure_weights(tmp_path, 50)
    content, drawn = path.read_bytes(), path.stat().st_mtime_ns
    assert toy.ensure_weights(tmp_path, 50).stat().st_mtime_ns == drawn
    path.unlink()
    monkeypatch.setattr(toy.os, "getpid", lambda: 2)
    assert toy.ensure_weights(tmp_path, 50).read_bytes() == content


def test_an_older_drawing_is_drawn_again_and_a_present_one_is_kept(tmp_path, monkeypatch):
    data_dir = tmp_path
    monkeypatch.setattr(toy, "_LANDMARKS", 1)
    toy.ensure_dataset(data_dir)
    kept = data_dir / "toy" / "kept"
    kept.touch()
    toy.ensure_dataset(data_dir)
    assert kept.exists()
    monkeypatch.setattr(toy, "_VERSION", toy._VERSION + 1)
    toy.ensure_dataset(data_dir)
    assert not kept.exists()


def test_toy_runs_without_any_data_and_separates_easy_from_hard(toy_run, data_dir):
    folder, screen = toy_run
    easy, medium, hard = map(
        float, re.search(r"Retrieval results: mAP E: ([\d.]+), M: ([\d.]+), H: ([\d.]+)", screen).groups()
    )
    assert 40 < medium < 90
    assert easy > hard
    assert toy.DISCLAIMER in screen

    dataset = load_dataset("toy", data_dir)
    queries, rows = (torch.from_numpy(np.load(folder / f"toy_{kind}.npy")) for kind in ("query", "db"))
    mixed = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    control = evaluate(retrieve(queries, Database(mixed), listed=dataset.listed), dataset.ground_truth)
    assert 100 * control["M"].map < medium / 3


def test_toy_metrics_are_the_same_on_every_machine(toy_run):
    _, screen = toy_run
    found = re.findall(r"(\w+) results: mAP E: ([\d.]+), M: ([\d.]+), H: ([\d.]+)", screen)
    assert found == [("Retrieval", "57.70", "58.73", "45.16"), ("Reranking", "57.28", "58.58", "44.16")]


def test_positives_and_negatives_of_a_query_never_nearly_tie(toy_run, data_dir):
    """On another CPU, a cosine may differ by 1e-7 or 2e-7."""
    folder, _ = toy_run
    queries, rows = (torch.from_numpy(np.load(folder / f"toy_{kind}.npy")) for kind in ("query", "db"))
    truths = load_dataset("toy", data_dir).ground_truth
    for cosines, truth in zip((queries.double() @ rows.double().T).numpy(), truths, strict=True):
        for protocol in REVISITED_PROTOCOLS:
            positive = truth.listed[positive_and_ignored(truth, protocol)[0]]
            negative = np.setdiff1d(np.arange(len(rows)), [*positive, *ignored_images(truth, protocol)])
            assert np.abs(cosines[positive][:, None] - cosines[negative]).min() >= 1e-6
