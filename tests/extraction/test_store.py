import itertools
import logging
import os
import resource
import shutil

import numpy as np
import pytest
import torch

from extraction.identity import KEY_BYTES, Identity
from extraction.provenance import Provenance, file_fingerprint, read_provenance, sidecars
from extraction.store import NO_KEY, Records, Store, load_rows
from model.errors import InputError

ROWS = np.random.default_rng(0).standard_normal((200, 4)).astype(np.float32)
PROBE = np.eye(4, dtype=np.float32)[:2]
SETTINGS = {"checkpoint": "abc", "scales": [0.7071, 1.0], "sgem_p": float("inf")}
LABELS = [f"{number}.jpg".encode() for number in range(200)]
IDENTITIES = [Identity(number.to_bytes(KEY_BYTES, "big"), (number, 1, 2, 3)) for number in range(1, 201)]


@pytest.fixture(params=["rows.npy", "rows.pth"])
def path(request, tmp_path):
    return tmp_path / request.param


def open_store(path, settings=SETTINGS, probe=PROBE, **options) -> Store:
    store = Store(path, 4, Provenance(settings, probe), **options)
    store.read()
    return store


def missing(store: Store, count: int = 200) -> list[int]:
    return np.flatnonzero(~store.has(Records.of(LABELS[:count], IDENTITIES[:count]).keys)).tolist()


def fill(store: Store, numbers) -> Store:
    for number in numbers:
        store.write(LABELS[number], IDENTITIES[number], ROWS[number])
    store.flush()
    return store


def records(numbers) -> Records:
    return Records.of([LABELS[n] for n in numbers], [IDENTITIES[n] for n in numbers])


def finished(path, numbers=range(200)) -> Store:
    store = fill(open_store(path), numbers)
    store.finish(records(numbers))
    return store


def test_a_finished_file_has_the_rows_in_the_order_of_the_list(path):
    order = np.random.default_rng(1).permutation(200).tolist()
    finished(path, order)
    np.testing.assert_array_equal(load_rows(path).numpy(), ROWS[order])
    assert {file.name for file in path.parent.iterdir()} == {path.name, *(each.name for each in sidecars(path))}
    assert read_provenance(path)["sgem_p"] == "inf"


def test_a_tensor_file_is_the_same_whatever_its_name(tmp_path):
    for name in ("a.pth", "b.pth"):
        finished(tmp_path / name)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    assert torch.load(tmp_path / "a.pth", weights_only=True).shape == (200, 4)


def test_an_interrupted_run_keeps_what_was_flushed_by_any_process(path):
    fill(open_store(path), range(50))
    other = Store(path, 4, Provenance(SETTINGS, PROBE))  # a rank, or a machine with a part of the list
    fill(other, range(120, 150))
    other.write(LABELS[7], IDENTITIES[199], ROWS[7])  # never flushed
    assert not path.exists()
    assert missing(open_store(path)) == [*range(50, 120), *range(150, 200)]


def test_rows_are_found_by_content_when_images_are_renamed_or_the_list_changes(path):
    finished(path)
    store = open_store(path)
    numbers = [5, 3, 199, 0]
    store.finish(Records.of([b"new name", *(LABELS[n] for n in numbers[1:])], [IDENTITIES[n] for n in numbers]))
    np.testing.assert_array_equal(load_rows(path).numpy(), ROWS[numbers])
    again = open_store(path).records
    assert again.labels.tolist() == [b"new name", *(LABELS[n] for n in numbers[1:])]
    assert again.with_label(np.array([LABELS[199], b"unknown", b"new name"])).tolist() == [2, -1, 0]
    np.testing.assert_array_equal(again.keys, records(numbers).keys)


def test_an_image_without_a_row_has_zeros_and_is_missing_the_next_time(path):
    unread = Identity(NO_KEY, (0, 0, 0, 0))
    fill(open_store(path), range(10)).finish(Records.of(LABELS[:11], [*IDENTITIES[:10], unread]))
    np.testing.assert_array_equal(load_rows(path).numpy(), [*ROWS[:10], np.zeros(4)])
    store = open_store(path)
    assert not store.has(Records.of([b""], [unread]).keys).any()
    assert missing(store, 11) == [10]


@pytest.mark.parametrize(
    ("settings", "probe", "noun"),
    [
        ({**SETTINGS, "checkpoint": "xyz"}, PROBE, "checkpoint"),
        (SETTINGS, np.array([[1, 0, 0, 0], [0, 1, 0.002, 0]], np.float32), "code"),
        (SETTINGS, PROBE * np.nan, "code"),
    ],
)
@pytest.mark.parametrize("complete", [False, True])
def test_rows_of_other_settings_or_other_code_are_replaced_or_refused(path, settings, probe, noun, complete):
    finished(path) if complete else fill(open_store(path), range(50))
    with pytest.raises(InputError, match=noun):
        open_store(path, settings, probe, replace=False)
    assert len(missing(open_store(path))) == (0 if complete else 150)
    if complete:
        assert Provenance(settings, probe).differences(*sidecars(path)) != []
    store = open_store(path, settings, probe)
    assert len(missing(store)) == 200
    fill(store, [4]).finish(records([4]))
    np.testing.assert_array_equal(load_rows(path).numpy(), ROWS[4:5])


def test_the_probe_may_differ_by_rounding(path):
    finished(path)
    assert Provenance(SETTINGS, PROBE + np.float32(1e-5), 1e-6).differences(*sidecars(path)) == []


def test_starting_over_keeps_the_finished_file_until_the_new_one_is_complete(path):
    finished(path)
    store = Store(path, 4, Provenance(SETTINGS, PROBE))
    store.clear()
    fill(store, [0])
    np.testing.assert_array_equal(load_rows(path).numpy(), ROWS)
    store.finish(records([0]))
    np.testing.assert_array_equal(load_rows(path).numpy(), ROWS[:1])


def test_damaged_rows_of_a_finished_file_are_missing_and_a_copy_is_whole(path, tmp_path):
    finished(path)
    content = bytearray(path.read_bytes())
    place = content.index(ROWS[100].tobytes())
    content[place] ^= 1
    path.write_bytes(content)
    lost = missing(open_store(path))
    assert 100 in lost
    assert len(lost) < 200 or path.suffix == ".pth"
    content[place] ^= 1
    path.write_bytes(content)
    assert missing(open_store(path)) == []  # another time and inode, and the same rows
    for size in (0, 20, 1000):
        os.truncate(path, size)
        assert len(missing(open_store(path))) == 200


def test_hashes_of_another_shape_are_damage_not_a_crash(path):
    finished(path)
    sidecar = sidecars(path)[1]
    with np.load(sidecar) as content:
        np.savez(sidecar, **{**content, "hashes": np.uint8(7)})
    assert len(missing(open_store(path))) == 200


def test_a_damaged_block_is_named_and_never_used(path, caplog):
    fill(fill(open_store(path), range(50)), range(50, 90))
    block = sorted(path.parent.glob("*.blocks/*.npz"))[0]
    content = bytearray(block.read_bytes())
    content[len(content) // 2] ^= 1
    block.write_bytes(content)
    assert len(missing(open_store(path))) in (150, 160)
    assert block.name in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def killed_at(monkeypatch, moment: int, step) -> bool:
    """Calls a function that is killed at this step in the file system; returns whether it was."""
    countdown = itertools.count(moment, -1)

    def deadly(call):
        def attempt(*arguments, **options):
            if next(countdown) == 0:
                raise KeyboardInterrupt
            return call(*arguments, **options)

        return attempt

    with monkeypatch.context() as patched:
        for name in ("replace", "unlink", "rmdir"):
            patched.setattr(os, name, deadly(getattr(os, name)))
        try:
            step()
        except KeyboardInterrupt:
            return True
    return False


def test_a_kill_at_any_step_of_finishing_loses_no_row(path, monkeypatch):
    for moment in itertools.count():
        finished(path, range(100, 200))
        store = fill(open_store(path), range(100))
        if not killed_at(monkeypatch, moment, lambda store=store: store.finish(records(range(200)))):
            break
        store = open_store(path)
        assert missing(store) == []
        store.finish(records(range(200)))
        np.testing.assert_array_equal(load_rows(path).numpy(), ROWS)
    assert moment >= 5


def test_the_fingerprint_of_a_file_is_that_of_its_rows(tmp_path):
    for name in ("a.npy", "b.npy"):
        finished(tmp_path / name)
    first = file_fingerprint(tmp_path / "a.npy")
    assert first == file_fingerprint(tmp_path / "b.npy")
    stat = os.stat(tmp_path / "a.npy")
    np.save(tmp_path / "c.npy", ROWS[::-1])
    shutil.copyfile(tmp_path / "c.npy", tmp_path / "a.npy")
    os.utime(tmp_path / "a.npy", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file_fingerprint(tmp_path / "a.npy") != first


def test_a_kill_while_blocks_of_other_settings_are_removed_leaves_none_to_the_new_settings(tmp_path, monkeypatch):
    other, moment = {**SETTINGS, "checkpoint": "xyz"}, 0
    for moment in itertools.count():
        path = tmp_path / f"{moment}.npy"
        for number in range(3):
            fill(open_store(path), [number])
        if not killed_at(monkeypatch, moment, lambda path=path: open_store(path, other)):
            break
        fill(open_store(path, other), [7])
        assert missing(open_store(path, other), 9) == [0, 1, 2, 3, 4, 5, 6, 8]
    assert moment >= 2  # Python 3.10 hides those of pathlib from the test


def test_rows_never_get_the_provenance_of_a_file_that_was_not_published(tmp_path, monkeypatch):
    for moment in itertools.count():
        path = tmp_path / f"{moment}.npy"
        first = fill(open_store(path), range(3))
        assert killed_at(monkeypatch, 3, lambda store=first: store.finish(records(range(3))))
        assert sidecars(tmp_path / f"{path.name}.new")[0].exists()
        second = Store(path, 4, Provenance({**SETTINGS, "checkpoint": "xyz"}, PROBE))

        def run(store=second):
            store.clear()
            for number in range(3):
                store.write(LABELS[number], IDENTITIES[number], -ROWS[number])
            store.flush()
            store.finish(records(range(3)))

        done = not killed_at(monkeypatch, moment, run)
        store = open_store(path)
        for number in set(range(3)) - set(missing(store, 3)):
            np.testing.assert_array_equal(store.rows(records([number]).keys), ROWS[[number]])
        if done:
            break


def test_a_kill_while_a_list_is_finished_is_no_error_where_nothing_may_be_replaced(path, monkeypatch):
    for moment in itertools.count():
        file = path.with_name(f"{moment}{path.suffix}")
        store = fill(open_store(file), range(3))
        killed = killed_at(monkeypatch, moment, lambda store=store: store.finish(records(range(3))))
        assert missing(open_store(file, replace=False), 3) == []
        if not killed:
            break
    assert moment > 3


@pytest.mark.parametrize("settings", [SETTINGS, {**SETTINGS, "checkpoint": "xyz"}])
def test_blocks_without_a_provenance_are_never_used(path, settings):
    store = fill(open_store(path, {**SETTINGS, "checkpoint": "xyz"}), range(10))
    (store.folder / "provenance.json").unlink()
    with pytest.raises(InputError, match="provenance"):
        open_store(path, settings, replace=False)
    store = open_store(path, settings)
    store.write(LABELS[0], IDENTITIES[0], -ROWS[0])
    store.flush()
    store.read_blocks()
    np.testing.assert_array_equal(store.rows(records(range(10)).keys), [-ROWS[0], *np.zeros((9, 4))])


def test_a_full_disk_gets_no_part_of_a_file_and_loses_no_row(path):
    store, limits = fill(open_store(path), range(200)), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(InputError, match="kept"):
            store.finish(records(range(200)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in path.parent.iterdir()] == [store.folder.name]
    assert missing(open_store(path)) == []
