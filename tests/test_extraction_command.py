"""The command line of extract_rop1m.py, killed and restarted, and the evaluation that uses its file."""

import itertools
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import ROOT, latest
from forked import Forked, ranks
from oracles import all_protocols, dense_reranking, full_ranking
from PIL import Image

from extraction import store
from extraction.provenance import sidecars

pytestmark = pytest.mark.slow  # starts, kills and restarts commands

COUNT = 40


@pytest.fixture(scope="session")
def distractors(tmp_path_factory):
    """A folder in revisitop1m's layout."""
    folder = tmp_path_factory.mktemp("revisitop1m")
    rng = np.random.default_rng(1)
    names = [f"{number % 3}/{number:03d}.jpg" for number in range(COUNT)]
    for name in names:
        path = folder / "jpg" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(path)
    (folder / "revisitop1m.txt").write_text("\n".join(names) + "\n")
    return folder


@pytest.fixture
def arguments(distractors, two_layers) -> list[str]:
    return ["--data-dir", distractors, "--out", "feats.pth", *two_layers, "TEST.BATCH_SIZE", 1]


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def whole(distractors, two_layers, tmp_path_factory):
    """The file of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    words = ["--data-dir", distractors, "--out", "feats.pth", *two_layers, "TEST.BATCH_SIZE", 1]
    assert Forked(ROOT / "extract_rop1m.py", [*words, "DATA_LOADER.NUM_WORKERS", 2], folder).wait() == 0
    return folder / "feats.pth"


def run_until(arguments: list, work, block: int, count: int = 1) -> list[int]:
    """Runs as many processes, each until it has written that many blocks of three rows, or to its end if it is 0.

    Returns exit codes.
    """

    def prepare() -> None:
        flush, written = store.Store.flush, itertools.count(1)

        def flush_or_die(rows: store.Store) -> None:
            full = bool(rows._buffer)
            flush(rows)
            if full and next(written) == block:
                os.kill(os.getpid(), signal.SIGKILL)

        store._BLOCK_ROWS, store.Store.flush = 3, flush_or_die

    script = ROOT / "extract_rop1m.py"
    processes = ranks(count, script, arguments, work, prepare)
    codes = [process.wait() for process in processes]
    assert any(codes) == bool(block), [process.err for process in processes]
    return codes


def same_bytes(a, b) -> bool:
    return a.read_bytes() == b.read_bytes()


def test_the_file_holds_unit_rows_in_list_order(whole):
    rows = torch.load(whole, weights_only=True)
    assert rows.dtype == torch.float32
    assert rows.shape == (COUNT, 16)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(COUNT))
    assert json.loads(sidecars(whole)[0].read_text())["skipped"] == []
    names = {path.name for path in whole.parent.iterdir() if path.name[0] != "."}
    assert names == {whole.name, "log.txt", *(path.name for path in sidecars(whole))}


def test_killed_at_several_moments_and_damaged_it_ends_with_the_same_file(work, arguments, whole):
    for block in (1, 7):
        run_until(arguments, work, block)
        assert not (work / whole.name).exists()
    block = sorted(work.glob("*.blocks/*.npz"))[2]
    content = bytearray(block.read_bytes())
    content[len(content) // 2] ^= 1
    block.write_bytes(content)
    (work / f"{whole.name}.blocks" / ".half.npz.1.new").write_bytes(b"half a block")
    run_until(arguments, work, 0)
    assert block.name in (work / "log.txt").read_text()
    assert same_bytes(work / whole.name, whole)
    assert not list(work.glob("*.blocks"))


def test_two_processes_killed_and_restarted_end_with_the_same_file(work, arguments, whole):
    run_until(arguments, work, 2, count=2)
    assert not (work / whole.name).exists()
    run_until(arguments, work, 0, count=2)
    assert same_bytes(work / whole.name, whole)


def test_parts_of_the_list_are_extracted_independently_and_then_joined(command, arguments, whole, tmp_path):
    for number in (2, 0):
        outcome = command("extract_rop1m.py", *arguments, "--shard", f"{number}/3")
        assert outcome.code == 0, outcome.err
        assert not (tmp_path / "work" / "feats.pth").exists()
    outcome = command("extract_rop1m.py", *arguments)
    assert outcome.code == 0, outcome.err
    assert "13 images extracted, 27 unchanged" in outcome.out
    assert same_bytes(tmp_path / "work" / "feats.pth", whole)


@pytest.fixture
def copied(whole, tmp_path):
    """The finished file, in the folder for commands."""
    (tmp_path / "work").mkdir(exist_ok=True)
    for path in (whole, *sidecars(whole)):
        shutil.copy(path, tmp_path / "work")
    return tmp_path / "work" / whole.name


def test_a_second_start_after_the_end_changes_nothing(command, arguments, copied):
    before = copied.stat()
    outcome = command("extract_rop1m.py", *arguments)
    assert outcome.code == 0, outcome.err
    assert "reused" in outcome.out
    assert (copied.stat().st_ino, copied.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_an_image_that_cannot_be_read_is_named_or_skipped(command, arguments, distractors, tmp_path):
    shutil.copytree(distractors, tmp_path / "copy")
    arguments = [*arguments, "--data-dir", tmp_path / "copy"]
    (tmp_path / "copy" / "jpg" / "1/004.jpg").write_text("no image")
    os.rename(tmp_path / "copy" / "jpg" / "0/030.jpg", tmp_path / "030.jpg")
    for name in ("0/030.jpg", "1/004.jpg"):
        outcome = command("extract_rop1m.py", *arguments)
        assert outcome.code == 2
        assert name in outcome.err.splitlines()[-1]
        shutil.copyfile(distractors / "jpg" / "0/030.jpg", tmp_path / "copy" / "jpg" / "0/030.jpg")

    outcome = command("extract_rop1m.py", *arguments, "--on-error", "skip")
    assert outcome.code == 0, outcome.err
    rows = torch.load("feats.pth", weights_only=True)
    assert rows.norm(dim=1).round().tolist() == [float(row != 4) for row in range(COUNT)]
    skipped = json.loads((tmp_path / "work" / "feats.pth.json").read_text())["skipped"]
    assert [name.rpartition("/")[2] for name in skipped] == ["004.jpg"]


# ---- bad input: one line, exit code 2 ----


@pytest.mark.parametrize(
    ("words", "noun"),
    [
        (("MODEL.NAME", "cvnet"), "--weight"),
        (("--depth", 52), "52"),
        (("--data-dir", "none"), "none/revisitop1m.txt"),
        (("--out", "feats.bin"), "feats.bin"),
        (("--out", "none/feats.pth"), "none"),
        (("--shard", "3/3"), "3/3"),
    ],
)
def test_bad_arguments(command, arguments, words, noun):
    outcome = command("extract_rop1m.py", *arguments, *words)
    assert outcome.code == 2
    assert noun in outcome.err.splitlines()[-1]


def test_rows_of_other_settings_are_neither_overwritten_nor_mixed(command, arguments, copied):
    outcome = command("extract_rop1m.py", *arguments, "SupG.gemp", "False")
    assert outcome.code == 2
    assert "gemp_p" in outcome.err
    sidecars(copied)[0].unlink()
    assert command("extract_rop1m.py", *arguments).code == 2


def test_a_full_disk_is_reported_before_the_start(command, arguments, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    outcome = command("extract_rop1m.py", *arguments)
    assert outcome.code == 2
    assert "GB" in outcome.err


# ---- evaluation with distractors ----


@pytest.fixture
def evaluate(command, layout, tmp_path):
    """Runs test.py on roxford5k with distractors; the descriptors of the images are random and saved."""
    rows, saved = far_rows(27, seed=3), tmp_path / "saved"
    saved.mkdir()
    np.save(saved / "roxford5k_query.npy", rows[:3])
    np.save(saved / "roxford5k_db.npy", rows[3:])
    words = ("TEST.FEATURES", saved, "TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k")

    def run(*arguments):
        return command("test.py", *words, "SupG.onemeval", *arguments)

    run.queries, run.rows = rows[:3], rows[3:]
    return run


def far_rows(count: int, dim: int = 64, seed: int = 4) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("kind", ["pth", "npy", "half", "old.pth"])
def test_distractors_follow_the_database(evaluate, layout, tmp_path, kind):
    rows = far_rows(500)
    rows[7] = evaluate.rows[3]  # the same score as a database image, which precedes it
    rows[9] = 0
    work = tmp_path / "work"
    work.mkdir()
    if kind == "npy":
        np.save(work / "feats_1m_RN50.npy", rows)
    else:
        rows = rows.astype(np.float16 if kind == "half" else np.float32)
        new = kind != "old.pth"
        torch.save(torch.from_numpy(rows), work / "feats_1m_RN50.pth", _use_new_zipfile_serialization=new)
    outcome = evaluate()
    assert outcome.code == 0, outcome.err
    assert "feats_1m_RN50" in outcome.out  # it has no provenance

    together = np.concatenate([evaluate.rows, rows.astype(np.float32)])
    ranking = full_ranking(evaluate.queries, together)
    entry = json.loads((latest(work / "output") / "results.json").read_text())["datasets"]["roxford5k"]
    assert entry["distractors"] == 500
    np.testing.assert_array_equal(np.load(latest(work / "output") / "roxford5k_retrieval_ranks.npy"), ranking[:, :400])
    for stage in ("retrieval", "reranking"):
        expected = all_protocols(ranking, layout.gnd["gnd"])
        assert {name: entry[stage][name]["mAP"] for name in "EMH"} == pytest.approx(expected, abs=1e-6)
        for row, query in zip(ranking, evaluate.queries, strict=True):
            row[:400] = row[:400][dense_reranking(query, together[row[:400]], 9, 0.15)]


def test_distractors_of_other_settings_or_another_network_are_refused(
    command, layout, distractors, checkpoint_50, checkpoint_101, tmp_path
):
    few = tmp_path / "few"
    shutil.copytree(distractors, few)
    (few / "revisitop1m.txt").write_text("0/000.jpg\n1/001.jpg\n")
    quick = ("TEST.SCALE_LIST", 1, "DATA_LOADER.NUM_WORKERS", 0)
    outcome = command("extract_rop1m.py", "--weight", checkpoint_50, "--depth", 50, "--data-dir", few, *quick)
    assert outcome.code == 0, outcome.err
    data = ("TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k", *quick, "SupG.onemeval")
    for words, noun in (
        (("TEST.WEIGHTS", checkpoint_50, "TEST.SCALE_LIST", 3), "scales"),
        (("TEST.WEIGHTS", checkpoint_101, "MODEL.DEPTH", 101, "TEST.DISTRACTORS", "feats_1m_RN50.pth"), "depth"),
    ):
        outcome = command("test.py", *data, *words)
        assert outcome.code == 2
        assert noun in outcome.err
    assert command("test.py", *data, "TEST.WEIGHTS", checkpoint_50).code == 0


@pytest.mark.parametrize("suffix", [".pth", ".npy"])
def test_distractors_that_do_not_fit_are_rejected(evaluate, tmp_path, suffix):
    def write(rows: np.ndarray) -> None:
        np.save(path, rows) if suffix == ".npy" else torch.save(torch.from_numpy(rows.copy()), path)

    path, rows = tmp_path / f"feats{suffix}", far_rows(50)
    nan = np.where(np.arange(50)[:, None] == 3, np.float32(np.nan), rows)
    for content, noun in (
        (far_rows(5, 32), "32 dimensions"),
        (nan, "distractor 3"),
        (rows[:0], "no descriptors"),
        (rows * 3, "unit length"),
        (rows.astype(np.int64), "floating-point"),
        (rows[0], "floating-point"),
        *((kept, "feats") for kept in (0, 0.5, 0.999)),
    ):
        if isinstance(content, np.ndarray):
            write(content)
        else:
            write(rows)
            os.truncate(path, int(path.stat().st_size * content))
        outcome = evaluate("TEST.DISTRACTORS", path)
        assert outcome.code == 2, noun
        assert noun in outcome.err.splitlines()[-1]
