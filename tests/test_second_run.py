"""A second run in a folder gives what a first run in a new folder gives, whatever was changed between them."""

import io
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import kept, latest
from PIL import Image

NETWORK = """
import torch
import {helper}

def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 16, 5, 4), {helper}.Rectifier()).eval()
"""
HELPER = """
import torch

class Rectifier(torch.nn.Module):
    def forward(self, x):
        return x.relu() ** {power}
"""


@pytest.fixture
def run(command, layout, tmp_path, monkeypatch):
    """Runs test.py with a two-layer network, and returns mAP and the descriptors; `fresh` in a new output folder."""
    helper = f"helper_of_{tmp_path.name}"
    (tmp_path / f"{helper}.py").write_text(HELPER.format(power=1))
    (tmp_path / "mine.py").write_text(NETWORK.format(helper=helper))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("extraction.identity._STEP_NS", -1)  # the images are as old as those of a user

    def run(*words, fresh: bool = False, name: str = "roxford5k") -> tuple[dict, np.ndarray]:
        sys.modules.pop(helper, None)
        output = tmp_path / ("fresh" if fresh else "output")
        if fresh:
            shutil.rmtree(output, ignore_errors=True)
        outcome = command(
            "test.py", "MODEL.NAME", f"{tmp_path / 'mine.py'}:build", "TEST.SCALE_LIST", 1, "SupG.rgem", False,
            "DATA_LOADER.NUM_WORKERS", 0, "TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", name,
            "TEST.OUT_DIR", output, *words,
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        entry = json.loads((latest(output) / "results.json").read_text())["datasets"][name]
        metrics = {protocol: entry["reranking"][protocol]["mAP"] for protocol in "EMH"}
        return metrics, np.load(kept(output, name) / f"{name}_db.npy")

    run.helper = tmp_path / f"{helper}.py"
    return run


def replace_image(layout) -> None:
    """Replaces an image by another one of equal size and time; decoders ignore what follows the end of a JPEG."""
    path, other = layout.image("db_3"), layout.image("query_0")
    stat = path.stat()
    content = io.BytesIO()
    Image.open(other).save(content, "JPEG", quality=50)
    path.write_bytes(content.getvalue().ljust(stat.st_size, b"\0"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size


def exchange_images(layout) -> None:
    a, b = layout.image("db_0"), layout.image("db_1")
    a.rename(a.with_suffix(".old"))
    b.rename(a)
    a.with_suffix(".old").rename(b)


def reverse_list(layout) -> None:
    layout.gnd["imlist"].reverse()
    for entry in layout.gnd["gnd"]:
        for kind in ("easy", "hard", "junk"):
            entry[kind] = [23 - number for number in entry[kind]]
    layout.write()


def move_box(layout) -> None:
    layout.gnd["gnd"][1]["bbx"] = [10, 10, 50, 40]
    layout.write()


def damage_rows(layout) -> None:
    (path,) = layout.data_dir.parent.glob("output/descriptors/*/roxford5k_db.npy")
    rows = np.load(path, mmap_mode="r+")
    rows[4:8] = rows[0]
    rows.flush()


@pytest.mark.parametrize("change", [replace_image, exchange_images, reverse_list, move_box, damage_rows])
def test_changed_images_lists_boxes_and_rows_are_noticed(run, layout, change):
    before = run()
    change(layout)
    metrics, rows = run()
    expected = run(fresh=True)
    assert metrics == expected[0]
    np.testing.assert_allclose(rows, expected[1], atol=1e-6)
    assert change is damage_rows or metrics != before[0] or not np.array_equal(rows, before[1])


def test_a_changed_helper_module_of_a_network_is_noticed(run):
    before = run()
    run.helper.write_text(HELPER.format(power=2))
    os.utime(run.helper, ns=(1, 1))  # Python's cache of compiled modules goes by the time
    _, rows = run()
    assert not np.allclose(rows, before[1])
    np.testing.assert_allclose(rows, run(fresh=True)[1], atol=1e-6)


def test_a_changed_pooling_of_our_own_is_noticed(run, monkeypatch):
    before = run()
    monkeypatch.setattr("modules.pooling.generalized_mean", lambda x, p, eps: x.amax(dim=(-2, -1)))
    _, rows = run()
    assert not np.allclose(rows, before[1])
    np.testing.assert_allclose(rows, run(fresh=True)[1], atol=1e-6)


def test_equal_names_in_two_class_folders_never_meet_in_local_features(command, checkpoint_50, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("c0", "c1"):
        (tmp_path / "data" / "mine" / name).mkdir(parents=True)
        for number in range(2):
            pixels = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((16, 16, 1))).astype(np.uint8)
            path = tmp_path / "data" / "mine" / name / f"{number}.bmp"
            Image.fromarray(pixels).save(path)
            os.utime(path, ns=(1, 1))  # as unpacked from an archive

    def scores(folder: str) -> np.ndarray:
        outcome = command(
            "test.py", "TEST.WEIGHTS", checkpoint_50, "TEST.DATA_DIR", tmp_path / "data", "TEST.DATASET_LIST", "mine",
            "TEST.OUT_DIR", tmp_path / folder, "TEST.SCALE_LIST", 1, "TEST.RERANKER", "cvnet", "TEST.MAPS_GB", 1,
            "DATA_LOADER.NUM_WORKERS", 0,
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        return np.load(kept(tmp_path / folder, "mine") / "mine_cvnet.npy")

    first = scores("output")
    exchanged = [tmp_path / "data" / "mine" / name / "0.bmp" for name in ("c0", "c1")]
    exchange = exchanged[0].read_bytes(), exchanged[1].read_bytes()
    for path, content in zip(exchanged, reversed(exchange), strict=True):
        path.write_bytes(content)
        os.utime(path, ns=(1, 1))
    second = scores("output")
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(second, scores("fresh"))


def test_a_search_never_answers_with_the_descriptor_of_an_earlier_query(command, checkpoint_50, tmp_path):
    rng = np.random.default_rng(0)
    for folder in ("base", "qa", "qb"):
        (tmp_path / folder).mkdir()
    for name, query in (("tower", "qa"), ("bridge", "qb")):
        image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        for path in (tmp_path / "base" / f"{name}.bmp", tmp_path / query / "query.bmp"):
            image.save(path)
            os.utime(path, ns=(1, 1))
    for query, name in (("qa", "tower"), ("qb", "bridge")):
        outcome = command(
            "tools/search.py", "--database", tmp_path / "base", "--queries", tmp_path / query, "--json", "--weights",
            checkpoint_50, "TEST.SCALE_LIST", 1, "DATA_LOADER.NUM_WORKERS", 0,
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        assert json.loads(outcome.out)["queries"][0]["results"][0]["file"] == f"{name}.bmp"


def test_saved_descriptors_of_a_reordered_list_are_refused(run, command, layout, tmp_path):
    run()
    saved = kept(tmp_path / "output", "roxford5k")
    reverse_list(layout)
    outcome = command(
        "test.py", "TEST.FEATURES", saved, "TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k"
    )
    assert outcome.code == 2
    assert "db_0" in outcome.err


def test_an_index_of_replaced_rows_is_built_again(command, tmp_path):
    pytest.importorskip("faiss")
    rows = torch.nn.functional.normalize(torch.randn(2, 300, 16, generator=torch.Generator().manual_seed(0)), dim=2)
    np.save(tmp_path / "q.npy", rows[0, :5].numpy())

    def ranks() -> np.ndarray:
        outcome = command(
            "tools/rerank.py", "--queries", tmp_path / "q.npy", "--database", tmp_path / "d.npy", "--out",
            tmp_path / "ranks.npy", "--reranker", "none", "TEST.INDEX", "Flat",
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        return np.load(tmp_path / "ranks.npy")

    found = []
    for database in rows.numpy():
        np.save(tmp_path / "d.npy", database)
        os.utime(tmp_path / "d.npy", ns=(1, 1))  # as cp -p and rsync -t do
        found.append(ranks())
    best = (rows[0, :5] @ rows[1].T).argmax(dim=1)
    assert found[0][:, 0].tolist() == [0, 1, 2, 3, 4]
    assert found[1][:, 0].tolist() == best.tolist()
