"""The command line of extract_rop1m.py, killed and restarted, and the evaluation that uses its file."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, latest
from forked import Forked, ranks
from oracles import all_protocols, dense_reranking, full_ranking
from PIL import Image

from extraction.store import sidecars

COUNT = 40

# Blocks of three rows, so that it is killed between blocks.
DRIVER = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import extraction.store
extraction.store._BLOCK_ROWS = 3
runpy.run_path({str(ROOT / "extract_rop1m.py")!r}, run_name="__main__")
"""


@pytest.fixture(scope="session")
def distractors(tmp_path_factory):
    """A folder in revisitop1m's layout."""
    folder = tmp_path_factory.mktemp("revisitop1m")
    rng = np.random.default_rng(1)
    names = [f"{number % 3}/{number:03d}.jpg" for number in range(COUNT)]
    for name in names:
        path = folder / "jpg" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)
    (folder / "revisitop1m.txt").write_text("\n".join(names) + "\n")
    return folder


@pytest.fixture
def arguments(distractors, checkpoint_50) -> list[str]:
    return [
        "--weight", str(checkpoint_50), "--depth", "50", "--data-dir", str(distractors),
        "TEST.SCALE_LIST", "1", "DATA_LOADER.NUM_WORKERS", "0", "TEST.BATCH_SIZE", "2",
    ]  # fmt: skip


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir(exist_ok=True)
    (folder / "driver.py").write_text(DRIVER)
    return folder


@pytest.fixture(scope="session")
def whole(distractors, checkpoint_50, tmp_path_factory):
    """The file of an uninterrupted run, with other batches than those of `arguments`."""
    folder = tmp_path_factory.mktemp("whole")
    command = [
        sys.executable, ROOT / "extract_rop1m.py", "--weight", checkpoint_50, "--depth", "50",
        "--data-dir", distractors, "TEST.SCALE_LIST", "1", "DATA_LOADER.NUM_WORKERS", "2",
    ]  # fmt: skip
    subprocess.run(command, cwd=folder, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return folder / "feats_1m_RN50.pth"


def run_until(arguments: list, work, blocks: int | None, count: int = 1) -> list[int] | None:
    """Starts as many processes; kills them when there are that many blocks of rows. Returns exit codes."""
    driver = work / "driver.py"
    processes = [Forked(driver, arguments, work)] if count == 1 else ranks(count, driver, arguments, work)
    while blocks is not None and any(process.poll() is None for process in processes):
        if len(list(work.glob("*.blocks/*.npz"))) >= blocks:
            for process in processes:
                process.kill()
            return None
        time.sleep(0.01)
    return [process.wait() for process in processes]


def same_bytes(a, b) -> bool:
    return a.read_bytes() == b.read_bytes()


def test_the_file_holds_unit_rows_in_list_order(whole):
    rows = torch.load(whole, weights_only=True)
    assert rows.dtype == torch.float32
    assert rows.shape == (COUNT, 2048)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(COUNT))
    facts = json.loads(sidecars(whole)[0].read_text())
    assert facts["depth"] == 50
    assert facts["skipped"] == []
    names = {path.name for path in whole.parent.iterdir() if path.name[0] != "."}
    assert names == {whole.name, "log.txt", *(path.name for path in sidecars(whole))}


def test_killed_at_several_moments_and_damaged_it_ends_with_the_same_file(work, arguments, whole):
    for blocks in (1, 7):
        assert run_until(arguments, work, blocks) is None
        assert not (work / whole.name).exists()
    block = sorted(work.glob("*.blocks/*.npz"))[2]
    content = bytearray(block.read_bytes())
    content[len(content) // 2] ^= 1
    block.write_bytes(content)
    (work / f"{whole.name}.blocks" / ".half.npz.1.new").write_bytes(b"half a block")
    assert run_until(arguments, work, None) == [0]
    assert block.name in (work / "log.txt").read_text()
    assert same_bytes(work / whole.name, whole)
    assert not list(work.glob("*.blocks"))


def test_two_processes_killed_and_restarted_end_with_the_same_file(work, arguments, whole):
    arguments = [*arguments, "--out", "other.pth"]
    assert run_until(arguments, work, 4, count=2) is None
    assert run_until(arguments, work, None, count=2) == [0, 0]
    assert same_bytes(work / "other.pth", whole)


def test_parts_of_the_list_are_extracted_independently_and_then_joined(command, arguments, whole, tmp_path):
    arguments = [*arguments, "--out", "feats.pth"]
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


def test_an_image_that_cannot_be_read_stops_the_run_or_is_skipped(command, arguments, distractors, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(distractors, folder)
    arguments[arguments.index("--data-dir") + 1] = str(folder)
    (folder / "jpg" / "1" / "004.jpg").write_text("no image")
    outcome = command("extract_rop1m.py", *arguments)
    assert outcome.code == 2
    assert "1/004.jpg" in outcome.err.splitlines()[-1]
    (folder / "jpg" / "0" / "030.jpg").unlink()
    outcome = command("extract_rop1m.py", *arguments)
    assert outcome.code == 2
    assert "0/030.jpg" in outcome.err.splitlines()[-1]

    outcome = command("extract_rop1m.py", *arguments, "--on-error", "skip")
    assert outcome.code == 0, outcome.err
    rows = torch.load("feats_1m_RN50.pth", weights_only=True)
    assert rows.norm(dim=1).round().tolist() == [float(row not in (4, 30)) for row in range(COUNT)]
    skipped = json.loads((tmp_path / "work" / "feats_1m_RN50.pth.json").read_text())["skipped"]
    assert [name.rpartition("/")[2] for name in skipped] == ["004.jpg", "030.jpg"]


# ---- bad input: one line, exit code 2 ----


@pytest.mark.parametrize(
    ("change", "noun"),
    [
        ({"--weight": "none.pyth"}, "none.pyth"),
        ({"--depth": "52"}, "52"),
        ({"--depth": "101"}, "ResNet-50"),
        ({"--data-dir": "none"}, "none/revisitop1m.txt"),
        ({"--out": "feats.bin"}, "feats.bin"),
        ({"--out": "none/feats.pth"}, "none"),
        ({"--shard": "3/3"}, "3/3"),
    ],
)
def test_bad_arguments(command, arguments, change, noun):
    for name, value in change.items():
        if name in arguments:
            arguments[arguments.index(name) + 1] = value
        else:
            arguments = [name, value, *arguments]
    outcome = command("extract_rop1m.py", *arguments)
    assert outcome.code == 2
    assert noun in outcome.err.splitlines()[-1]


def test_a_file_of_other_settings_is_neither_overwritten_nor_mixed(command, arguments, copied):
    outcome = command("extract_rop1m.py", *arguments, "SupG.gemp", "False")
    assert outcome.code == 2
    assert "gemp_p: 4.6 before, off now" in outcome.err
    sidecars(copied)[0].unlink()
    assert command("extract_rop1m.py", *arguments).code == 2


def test_a_second_file_with_other_settings_and_suffix_is_not_mistaken_for_the_first(
    command, layout, arguments, checkpoint_50
):
    for out, relup in (("found.pth", True), ("found.npy", False)):
        outcome = command("extract_rop1m.py", *arguments, "--out", out, "SupG.relup", relup)
        assert outcome.code == 0, outcome.err
    data = ("TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k", "TEST.WEIGHTS", checkpoint_50)
    options = (*data, "TEST.SCALE_LIST", 1, "DATA_LOADER.NUM_WORKERS", 0, "SupG.onemeval", "TEST.DISTRACTORS")
    assert command("test.py", *options, "found.pth").code == 0
    outcome = command("test.py", *options, "found.npy")
    assert outcome.code == 2
    assert "relup_threshold: off before, 0.014 now" in outcome.err


def test_starting_over_keeps_the_finished_file_until_there_is_a_new_one(work, arguments, whole, copied):
    assert run_until([*arguments, "--no-resume"], work, 2) is None
    assert same_bytes(copied, whole)


def test_an_interrupted_run_of_other_settings_is_not_mixed(work, command, arguments):
    assert run_until(arguments, work, 1) is None
    outcome = command("extract_rop1m.py", *arguments, "SupG.relup", "False")
    assert outcome.code == 2
    assert "relup_threshold: 0.014 before, off now" in outcome.err


def test_a_full_disk_is_reported_before_the_start(command, arguments, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    outcome = command("extract_rop1m.py", *arguments)
    assert outcome.code == 2
    assert "GB are needed" in outcome.err


# ---- evaluation with distractors ----


@pytest.fixture
def evaluate(command, layout, checkpoint_50, tmp_path):
    """Runs test.py on roxford5k with distractors; the descriptors of the images are random and saved."""
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((27, 2048)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    saved = tmp_path / "saved"
    saved.mkdir()
    np.save(saved / "roxford5k_query.npy", rows[:3])
    np.save(saved / "roxford5k_db.npy", rows[3:])

    def run(*arguments):
        return command(
            "test.py", "TEST.FEATURES", saved, "TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k",
            "SupG.onemeval", *arguments,
        )  # fmt: skip

    run.queries, run.rows = rows[:3], rows[3:]
    return run


def far_rows(count: int, dim: int = 2048) -> np.ndarray:
    rows = np.random.default_rng(4).standard_normal((count, dim)).astype(np.float32)
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


def test_distractors_of_other_settings_are_refused(command, layout, checkpoint_50, whole):
    options = (
        "TEST.WEIGHTS", checkpoint_50, "TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k",
        "TEST.DISTRACTORS", whole, "SupG.onemeval", "DATA_LOADER.NUM_WORKERS", "0",
    )  # fmt: skip
    outcome = command("test.py", *options)
    assert outcome.code == 2
    assert "scales: [1.0] before, [0.7071, 1.0, 1.4142] now" in outcome.err
    assert command("test.py", *options, "TEST.SCALE_LIST", "1").code == 0


def test_distractors_without_provenance_are_used_with_a_warning(command, layout, checkpoint_50, whole, tmp_path):
    path = tmp_path / "alone.pth"
    path.symlink_to(whole)
    outcome = command(
        "test.py", "TEST.WEIGHTS", checkpoint_50, "TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k",
        "TEST.DISTRACTORS", path, "SupG.onemeval", "TEST.SCALE_LIST", "1", "DATA_LOADER.NUM_WORKERS", "0",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "alone.pth.json" in outcome.out


def test_distractors_of_another_depth_are_refused(command, layout, checkpoint_101, whole):
    outcome = command(
        "test.py", "MODEL.DEPTH", "101", "TEST.WEIGHTS", checkpoint_101, "TEST.DATA_DIR", layout.data_dir,
        "TEST.DATASET_LIST", "roxford5k", "TEST.DISTRACTORS", whole, "SupG.onemeval", "TEST.SCALE_LIST", "1",
    )  # fmt: skip
    assert outcome.code == 2
    assert "depth: 50 before, 101 now" in outcome.err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (far_rows(5, 512), "the distractors have 512 dimensions, the database 2048"),
        (
            np.where(np.arange(5)[:, None] == 3, np.nan, far_rows(5)),
            "the descriptor of distractor 3 (from 0)",
        ),
        (far_rows(5)[:0], "contains no descriptors"),
        (far_rows(5) * 3, "not of unit length (3 to 3)"),
        (far_rows(5).astype(np.float64).astype(np.int64), "floating-point"),
        (far_rows(5)[0], "floating-point"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".npy"])
def test_distractors_that_do_not_fit_are_rejected(evaluate, tmp_path, rows, message, suffix):
    path = tmp_path / f"feats{suffix}"
    if suffix == ".npy":
        np.save(path, rows.astype(np.float32) if rows.dtype == np.float64 else rows)
    else:
        torch.save(torch.from_numpy(rows.astype(np.float32) if rows.dtype == np.float64 else rows.copy()), path)
    outcome = evaluate("TEST.DISTRACTORS", path)
    assert outcome.code == 2
    assert message in outcome.err.splitlines()[-1]


@pytest.mark.parametrize("kept", [0, 0.5, 0.999])
@pytest.mark.parametrize("suffix", [".pth", ".npy"])
def test_truncated_and_empty_files_are_rejected(evaluate, tmp_path, suffix, kept):
    path = tmp_path / f"feats{suffix}"
    np.save(path, far_rows(50)) if suffix == ".npy" else torch.save(torch.from_numpy(far_rows(50)), path)
    os.truncate(path, int(path.stat().st_size * kept))
    outcome = evaluate("TEST.DISTRACTORS", path)
    assert outcome.code == 2
    assert re.search(r"damaged|is empty", outcome.err.splitlines()[-1])
