"""Full disks, vanished folders and limited file systems are reported in one line, and nothing is lost."""

import errno
import os
import resource
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import NETWORK, ROOT, kept
from forked import Forked

from extraction.identity import NO_STAT, Identity
from extraction.images import ImageFile
from extraction.provenance import Provenance
from extraction.store import Records, Store


@pytest.fixture
def words(layout, tmp_path) -> list[str]:
    """The options of a run with a fast network with 2048 dimensions."""
    (tmp_path / "mine.py").write_text(NETWORK.replace("16, 5, 4", "2048, 16, 16"))
    words = ["MODEL.NAME", tmp_path / "mine.py:build", "TEST.DATA_DIR", layout.data_dir]
    words += ["TEST.DATASET_LIST", "roxford5k", "TEST.SCALE_LIST", 1, "DATA_LOADER.NUM_WORKERS", 0]
    return [*map(str, words)]


def limited(work: Path, words: list[str], most_bytes: int) -> Forked:
    """Runs test.py with a limit on the size of files, which has the effect of a full disk."""
    work.mkdir(exist_ok=True)
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    process = Forked(ROOT / "test.py", words, work, prepare=limit)
    process.wait()
    return process


def error_line(outcome) -> str:
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert "Logging error" not in outcome.err
    (line,) = (line for line in outcome.err.splitlines() if line.startswith("error: "))
    return line


def test_a_disk_too_full_for_the_rows_is_reported_and_the_run_resumes(command, words, tmp_path):
    outcome = limited(tmp_path / "work", words, 100_000)  # the queries' rows fit, the database's do not
    assert "roxford5k_db.npy.blocks" in error_line(outcome)
    again = command("test.py", *words)
    assert again.code == 0, again.err
    rows = np.load(kept(tmp_path / "work" / "output", "roxford5k") / "roxford5k_db.npy")
    alone = command("test.py", *words, "TEST.OUT_DIR", "alone")
    assert alone.code == 0
    np.testing.assert_array_equal(rows, np.load(kept(tmp_path / "work" / "alone", "roxford5k") / "roxford5k_db.npy"))


def test_a_disk_too_full_for_the_log_is_reported(words, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "log.txt").write_bytes(b"-" * 500_000)
    outcome = limited(tmp_path / "work", words, 500_100)
    assert "log.txt" in error_line(outcome)


def test_a_folder_removed_during_a_run_is_reported_and_the_next_run_is_complete(command, words, tmp_path, monkeypatch):
    output, read = tmp_path / "work" / "output", ImageFile.read_identified

    def remove(image: ImageFile) -> tuple[np.ndarray, Identity]:
        if image.path.stem == "db_10":
            shutil.rmtree(output)
        return read(image)

    monkeypatch.setattr(ImageFile, "read_identified", remove)
    outcome = command("test.py", *words, "TEST.BATCH_SIZE", 1)
    assert "No such file" in error_line(outcome)
    monkeypatch.undo()
    assert command("test.py", *words).code == 0


def test_a_clock_that_was_set_back_has_no_effect(command, words, tmp_path):
    assert command("test.py", *words).code == 0
    for path in (tmp_path / "work" / "output").rglob("*"):
        os.utime(path, (4e9, 4e9), follow_symlinks=False)
    assert command("test.py", *words).out.count(": reused") == 2


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EINVAL, None])
def test_a_file_system_that_cannot_reserve_space_is_supported(tmp_path, monkeypatch, error):
    def refuse(*_):
        raise OSError(error, os.strerror(error))

    if error is None:
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    store = Store(tmp_path / "rows.npy", 3, Provenance({}, np.eye(2, dtype=np.float32)))
    store.write(b"a.jpg", identity := Identity(b"a" * 16, NO_STAT), np.ones(3, np.float32))
    store.flush()
    store.finish(Records.of([b"a.jpg"], [identity]))
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npy"), [[1, 1, 1]])
