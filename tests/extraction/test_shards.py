import json
import shutil

import numpy as np
import pytest
from PIL import Image

from extraction.shards import check_shards, find_shards, shard_path, shard_rows
from model.errors import InputError


@pytest.fixture
def shards(tmp_path):
    """Three shards of 10 rows with their provenance."""

    def write(number: int, count: int = 3, rows: list | None = None, **changes):
        path = shard_path(tmp_path / "feats.npy", number, count)
        rows = rows or [*shard_rows(10, number, count), 10]
        np.save(path, np.eye(4, dtype=np.float32)[: rows[1] - rows[0]])
        provenance = {"checkpoint_sha256": "a", "list_sha256": "b", "rows": rows, **changes}
        path.with_name(f"{path.name}.json").write_text(json.dumps(provenance))
        return path

    return [write(number) for number in range(3)], write


def test_shards_are_found_by_their_common_name_or_one_of_them(shards, tmp_path):
    paths, _ = shards
    assert paths[1].name == "feats.00001-of-00003.npy"
    assert find_shards(tmp_path / "feats.npy") == paths
    assert find_shards(paths[2]) == paths
    assert find_shards(tmp_path / "others.npy") == []
    check_shards(paths)


def test_every_row_is_in_exactly_one_shard():
    for total in (1, 7, 1000):
        for count in range(1, 12):
            rows = [row for number in range(count) for row in range(*shard_rows(total, number, count))]
            assert rows == list(range(total))


@pytest.mark.parametrize(
    ("number", "how", "message"),
    [
        (1, {"rows": [3, 7, 10]}, "has the rows 6 to 10 and overlaps"),
        (1, {"rows": [2, 6, 10]}, "has the rows 2 to 6 and overlaps"),
        (1, {"rows": [4, 7, 10]}, "leaves a gap before it: 3 should be next"),
        (2, {"rows": [6, 9, 10]}, "ends at row 9 of 10"),
        (1, {"checkpoint_sha256": "other"}, "other settings (checkpoint_sha256: other here, a in feats.00000-of-00003"),
    ],
)
def test_shards_that_do_not_belong_together_are_rejected(shards, number, how, message):
    paths, write = shards
    write(number, **how)
    with pytest.raises(InputError) as error:
        check_shards(paths)
    assert message in str(error.value)


def test_missing_shards_and_different_totals_are_rejected(shards, tmp_path):
    paths, write = shards
    write(0, count=5)
    with pytest.raises(InputError, match="shards with totals of 3 and 5"):
        find_shards(tmp_path / "feats.npy")
    assert find_shards(paths[0]) == paths
    paths[1].unlink()
    with pytest.raises(InputError, match=r"1 of 3 shards are missing from .*: feats\.00001-of-00003\.npy"):
        find_shards(paths[0])


def test_a_shard_without_provenance_is_rejected(shards):
    paths, _ = shards
    paths[1].with_name(f"{paths[1].name}.json").unlink()
    with pytest.raises(InputError, match="extract the shard again"):
        check_shards(paths)


def test_shards_made_alone_are_evaluated_as_one_file(command, layout, checkpoint_50, tmp_path):
    folder = tmp_path / "revisitop1m"
    folder.mkdir()
    rng, names = np.random.default_rng(0), [f"{number}.jpg" for number in range(7)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(folder / name)
    (folder / "revisitop1m.txt").write_text("\n".join(names))
    quick = ("TEST.SCALE_LIST", 1, "DATA_LOADER.NUM_WORKERS", 0, "TEST.BATCH_SIZE", 1)
    make = ("--weight", checkpoint_50, "--depth", 50, "--data-dir", folder, "--out", "feats.npy", *quick)
    for words in ((), ("--shard", "0/3"), ("--shard", "1/3"), ("--shard", "2/3")):
        outcome = command("extract_rop1m.py", *make, *words)
        assert outcome.code == 0, outcome.err
    work = tmp_path / "work"
    parts = [np.load(path) for path in find_shards(work / "feats.npy")]
    np.testing.assert_array_equal(np.concatenate(parts), np.load(work / "feats.npy"))

    data = ("TEST.WEIGHTS", checkpoint_50, "TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k", *quick)
    whole = command("test.py", *data, "SupG.onemeval", "TEST.DISTRACTORS", "feats.npy")
    shutil.move(work / "feats.npy", work / "whole.npy")
    sharded = command("test.py", *data, "SupG.onemeval", "TEST.DISTRACTORS", "feats.npy")
    assert sharded.code == 0, sharded.err
    lines = [[line for line in each.out.splitlines() if "results: " in line] for each in (whole, sharded)]
    assert lines[0] == lines[1] != []


@pytest.mark.parametrize("text", ["3/3", "-1/3", "a/b", "1"])
def test_an_invalid_shard_number_is_rejected(command, text):
    outcome = command("extract_rop1m.py", "--weight", "x", "--depth", 50, "--out", "feats.npy", "--shard", text)
    assert outcome.code == 2
    assert "is not I/N" in outcome.err or "expected one argument" in outcome.err
