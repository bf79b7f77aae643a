"""A second run in a folder gives what a first run in a new folder gives, whatever was changed between them."""

import os

import numpy as np
import pytest
import sequences
import torch
from conftest import kept
from PIL import Image
from sequences import World, play

pytestmark = pytest.mark.slow  # hundreds of runs


@pytest.mark.parametrize("seed", range(20))
def test_a_second_run_equals_a_first_run_after_a_sequence_of_changes(seed, tmp_path):
    steps: list[str] = []
    assert play(tmp_path, seed, range(3), steps) is None, steps


def damage_rows(world: World) -> None:
    folder = sequences.descriptors_of(world.folder / "old")
    rows = np.load(folder / f"{sequences.NAME}_db.npy", mmap_mode="r+")
    rows[4:8] = rows[0]
    rows.flush()


def helper(world: World) -> None:
    sequences.network(world, "factor")


@pytest.mark.parametrize(
    ("command", "change"),
    [
        *(("test", getattr(sequences, name)) for name in ("content", "exchange", "order", "box", "code")),
        *(("test", helper), ("test", damage_rows), ("search", sequences.content)),
    ],
)
def test_a_change_of_an_image_a_list_code_or_rows_is_noticed(command, change, tmp_path):
    world = World(tmp_path, 0, "revisitop", command)
    before = world.outcome("old")
    change(world)
    world.write()
    assert sequences.compared(world) is None
    assert change is damage_rows or sequences.difference(before, world.outcome("old"))


def test_saved_descriptors_of_a_reordered_list_or_with_damaged_rows_are_refused(tmp_path):
    world = World(tmp_path, 0, "revisitop", "features")
    assert world.outcome("old")[0].code == 0
    world.database.reverse()
    world.write()
    refused, _ = world.outcome("old", makers=False)
    assert (refused.code, "a9" in refused.err) == (2, True)
    world.database.reverse()
    world.write()
    damage_rows(world)
    assert world.outcome("old", makers=False)[0].code == 2
    assert world.outcome("old")[0].code == 0


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
