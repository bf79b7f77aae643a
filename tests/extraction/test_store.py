import json
import logging
import multiprocessing
import os

import numpy as np
import pytest

from extraction.store import DescriptorStore, provenance_differences, write_json
from model.errors import InputError

ROWS = np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)
SOURCE = {"checkpoint": "abc", "scales": [0.7071, 1.0], "sgem": float("inf")}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.npy"


def begin(path, count: int, blocks: int = 1) -> None:
    """Simulates an interrupted run that wrote the first `count` rows, in the given number of blocks."""
    store = DescriptorStore(path, 10, 4, SOURCE)
    for part in np.array_split(np.arange(count), blocks):
        for row in part:
            store.write(row, ROWS[row])
        store.flush()


def finish(path) -> np.ndarray:
    store = DescriptorStore(path, 10, 4, SOURCE)
    for row in store.missing():
        store.write(row, ROWS[row])
    store.finish()
    return np.load(path)


def test_rows_are_read_as_they_were_written(path):
    np.testing.assert_array_equal(finish(path), ROWS)
    assert sorted(file.name for file in path.parent.iterdir()) == ["rows.npy", "rows.npy.json"]


def test_a_second_start_resumes_the_first(path):
    begin(path, 6)
    assert not path.exists()
    assert DescriptorStore(path, 10, 4, SOURCE).missing().tolist() == [6, 7, 8, 9]
    np.testing.assert_array_equal(finish(path), ROWS)


def test_rows_that_were_not_flushed_are_missing_again(path):
    begin(path, 3)
    store = DescriptorStore(path, 10, 4, SOURCE)
    store.write(3, ROWS[3])
    del store
    assert 3 in DescriptorStore(path, 10, 4, SOURCE).missing()


def test_the_row_of_an_incomplete_last_line_of_the_journal_is_missing(path, caplog):
    begin(path, 6, blocks=2)
    journal = path.with_name("rows.npy.journal")
    journal.write_bytes(journal.read_bytes()[:-5])
    assert DescriptorStore(path, 10, 4, SOURCE).missing().tolist() == [3, 4, 5, 6, 7, 8, 9]
    np.testing.assert_array_equal(finish(path), ROWS)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("name", ["rows.npy.journal", "rows.npy.part"])
def test_a_damaged_block_is_reported_and_never_used(path, caplog, name):
    begin(path, 6, blocks=2)
    file = path.with_name(name)
    content = bytearray(file.read_bytes())
    at = content.index(b"\n") + 3 if name.endswith("journal") else 128 + 5
    content[at] ^= 1
    file.write_bytes(content)
    assert DescriptorStore(path, 10, 4, SOURCE).missing().tolist() == [0, 1, 2, 6, 7, 8, 9]
    assert "1 damaged blocks are ignored" in caplog.text
    np.testing.assert_array_equal(finish(path), ROWS)


def test_a_journal_without_a_head_and_a_part_of_another_length_are_refused(path):
    begin(path, 6)
    part, journal = path.with_name("rows.npy.part"), path.with_name("rows.npy.journal")
    whole = journal.read_bytes()
    journal.write_bytes(b"x" + whole)
    with pytest.raises(InputError, match=r"rows.npy.journal is damaged"):
        DescriptorStore(path, 10, 4, SOURCE)
    journal.write_bytes(whole)
    part.write_bytes(part.read_bytes()[:-8])
    with pytest.raises(InputError, match="is not 288 bytes long"):
        DescriptorStore(path, 10, 4, SOURCE)


def test_a_run_without_any_row_does_not_conflict_with_other_settings(path):
    DescriptorStore(path, 10, 4, {**SOURCE, "checkpoint": "the wrong one"})
    assert len(DescriptorStore(path, 10, 4, SOURCE).missing()) == 10
    finish(path)
    np.testing.assert_array_equal(np.load(path), ROWS)


def test_rows_of_other_settings_are_not_mixed(path):
    begin(path, 6)
    with pytest.raises(InputError, match="checkpoint: abc before, xyz now"):
        DescriptorStore(path, 10, 4, {**SOURCE, "checkpoint": "xyz"})
    assert len(DescriptorStore(path, 10, 4, {**SOURCE, "checkpoint": "xyz"}, resume=False).missing()) == 10


@pytest.mark.parametrize("finished", [False, True])
def test_only_rows_whose_image_changed_are_extracted_again(path, finished):
    fingerprints = [f"size-{row}" for row in range(10)]
    store = DescriptorStore(path, 10, 4, SOURCE, fingerprints=fingerprints)
    for row in range(10 if finished else 6):
        store.write(row, ROWS[row])
    store.finish() if finished else store.flush()

    changed = ["new" if row in (2, 9) else fingerprint for row, fingerprint in enumerate(fingerprints)]
    expected = [2, 9] if finished else [2, 6, 7, 8, 9]
    for _ in range(2):  # the second start finds what the first one left
        assert DescriptorStore(path, 10, 4, SOURCE, fingerprints=changed).missing().tolist() == expected
    store = DescriptorStore(path, 10, 4, SOURCE, fingerprints=changed)
    for row in store.missing():
        store.write(row, -ROWS[row])
    store.finish()
    signs = np.where(np.isin(np.arange(10), expected), -1, 1)[:, None]
    np.testing.assert_array_equal(np.load(path), signs * ROWS)
    assert DescriptorStore(path, 10, 4, SOURCE, fingerprints=changed).complete


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("now", [[7, 3, 12, 0], [*range(10), 12, 13], [12, 9, 8, 2, 1, 0, 3, 4, 5, 6, 7], [12]])
def test_rows_follow_their_images_through_a_changed_list(path, finished, now):
    rows = np.random.default_rng(1).random((14, 4), dtype=np.float32)
    store = DescriptorStore(path, 10, 4, SOURCE, fingerprints=[f"image-{row}" for row in range(10)])
    there = range(10 if finished else 6)
    for row in there:
        store.write(row, rows[row])
    store.finish() if finished else store.flush()

    fingerprints = [f"image-{number}" for number in now]
    expected = [row for row, number in enumerate(now) if number not in there]
    for _ in range(2):
        store = DescriptorStore(path, len(now), 4, SOURCE, fingerprints=fingerprints)
        assert store.missing().tolist() == expected
    for row in expected:
        store.write(row, rows[now[row]])
    store.finish()
    np.testing.assert_array_equal(np.load(path), rows[now])


def test_files_of_one_name_and_two_endings_keep_their_provenance_apart(path):
    finish(path)
    other = path.with_suffix(".pth")
    store = DescriptorStore(other, 10, 4, {**SOURCE, "checkpoint": "xyz"})
    for row in range(10):
        store.write(row, ROWS[row])
    store.finish()
    assert provenance_differences(path, SOURCE) == []
    assert provenance_differences(other, SOURCE) == ["checkpoint: xyz before, abc now"]


def test_provenance_files_of_older_versions_are_read_if_unambiguous(path):
    finish(path)
    path.with_name("rows.npy.json").rename(path.with_name("rows.json"))
    assert DescriptorStore(path, 10, 4, SOURCE).complete
    path.with_name("rows.pth").write_bytes(b"another")
    assert provenance_differences(path, SOURCE) is None
    assert provenance_differences(path.with_name("rows.pth"), SOURCE) is None


def test_a_finished_file_is_reused_only_with_the_same_provenance(path):
    finish(path)
    assert DescriptorStore(path, 10, 4, SOURCE).complete
    assert not DescriptorStore(path, 10, 4, {**SOURCE, "scales": [1.0]}).complete
    assert json.loads(path.with_name("rows.npy.json").read_text())["sgem"] == "inf"


FINGERPRINTS = [f"image-{row}" for row in range(10)]


def fill(store: DescriptorStore, rows: np.ndarray = ROWS) -> DescriptorStore:
    for row in store.missing():
        store.write(row, rows[row])
    return store


@pytest.mark.parametrize("moment", ["part", "journal"])
def test_a_kill_while_the_list_changes_loses_no_row(path, monkeypatch, moment):
    begun = fill(DescriptorStore(path, 10, 4, SOURCE, fingerprints=FINGERPRINTS))
    begun.flush()
    replaced = []

    def killed(old, new, replace=os.replace):
        replaced.append(new)
        if str(new).endswith(f".{moment}") and str(old).endswith((".part.new", ".next-journal")):
            if moment == "journal":
                raise KeyboardInterrupt
            replace(old, new)
            raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as patched:
        patched.setattr("extraction.store.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            DescriptorStore(path, 10, 4, SOURCE, fingerprints=["new", *FINGERPRINTS[1:]])
    assert DescriptorStore(path, 10, 4, SOURCE, fingerprints=["new", *FINGERPRINTS[1:]]).missing().tolist() == [0]
    assert not list(path.parent.glob("*.next-journal"))


def test_other_settings_that_made_no_row_leave_the_finished_file_as_it_is(path):
    fill(DescriptorStore(path, 10, 4, SOURCE, fingerprints=FINGERPRINTS)).finish()
    DescriptorStore(path, 10, 4, {**SOURCE, "checkpoint": "xyz"}, fingerprints=FINGERPRINTS)
    assert DescriptorStore(path, 10, 4, SOURCE, fingerprints=FINGERPRINTS).complete
    np.testing.assert_array_equal(np.load(path), ROWS)


def test_rows_of_zeros_are_not_descriptors(path):
    lost = np.where(np.isin(np.arange(10), (2, 7))[:, None], 0, ROWS).astype(np.float32)
    store = fill(DescriptorStore(path, 10, 4, SOURCE, fingerprints=FINGERPRINTS), lost)
    store.flush()
    assert DescriptorStore(path, 10, 4, SOURCE, fingerprints=FINGERPRINTS).missing().tolist() == [2, 7]
    fill(DescriptorStore(path, 10, 4, SOURCE, fingerprints=FINGERPRINTS), lost).finish()
    store = DescriptorStore(path, 10, 4, SOURCE, fingerprints=FINGERPRINTS)
    assert store.failed.tolist() == [2, 7]
    store.reopen(store.failed)
    fill(store).finish()
    np.testing.assert_array_equal(np.load(path), ROWS)


@pytest.mark.parametrize("name", ["rows.npy", "rows.npy.part"])
@pytest.mark.parametrize("size", [0, 20, 130])
def test_a_damaged_file_is_replaced(path, name, size):
    store = fill(DescriptorStore(path, 10, 4, SOURCE, fingerprints=FINGERPRINTS))
    store.finish() if name == "rows.npy" else store.flush()
    os.truncate(path.with_name(name), size)
    assert len(DescriptorStore(path, 10, 4, SOURCE, fingerprints=FINGERPRINTS).missing()) == 10


def test_a_json_file_is_written_by_several_processes_at_once(tmp_path):
    def write():
        for _ in range(50):
            write_json(tmp_path / "facts.json", {"depth": 50})

    processes = [multiprocessing.get_context("fork").Process(target=write) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert json.loads((tmp_path / "facts.json").read_text()) == {"depth": 50}
    assert len(list(tmp_path.iterdir())) == 1
