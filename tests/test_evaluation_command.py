"""The command line of test.py, from files to metrics."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from conftest import ROOT, kept, latest
from forked import ranks
from oracles import all_protocols, dense_reranking, full_ranking
from PIL import Image

MODULES = ("SupG.gemp", "SupG.rgem", "SupG.sgem", "SupG.relup", "SupG.rerank", "SupG.onemeval", "False")


def logged(work, stage: str) -> dict[str, float]:
    """Returns the metrics in the last line of this stage in the log."""
    lines = re.findall(rf"{stage} results: mAP E: ([\d.]+), M: ([\d.]+), H: ([\d.]+)", (work / "log.txt").read_text())
    return dict(zip("EMH", map(float, lines[-1]), strict=True))


def evaluate_saved(work, layout, rerank: tuple | None = None) -> dict[str, float]:
    """Returns the metrics of the protocol for the descriptors that a run saved, computed by the textbook formulas."""
    queries, rows = (np.load(kept(work / "output", "roxford5k") / f"roxford5k_{kind}.npy") for kind in ("query", "db"))
    ranking = full_ranking(queries, rows)
    if rerank:
        m, k, beta = rerank
        for i, query in enumerate(queries):
            ranking[i, :m] = ranking[i, :m][dense_reranking(query, rows[ranking[i, :m]], k, beta)]
    return all_protocols(ranking, layout.gnd["gnd"])


@pytest.mark.parametrize("scales", [1, 3, 5])
def test_metrics_follow_the_protocol_for_the_saved_descriptors(command, layout, checkpoint_50, tmp_path, scales):
    outcome = command(
        "test.py", "MODEL.DEPTH", 50, "TEST.WEIGHTS", checkpoint_50.parent, "TEST.DATA_DIR", layout.data_dir,
        *MODULES, "TEST.DATASET_LIST", "['roxford5k']", "TEST.SCALE_LIST", scales, "DATA_LOADER.NUM_WORKERS", 0,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    work = tmp_path / "work"
    assert logged(work, "Retrieval") == pytest.approx(evaluate_saved(work, layout), abs=0.0051)
    assert logged(work, "Reranking") == pytest.approx(evaluate_saved(work, layout, (24, 9, 0.15)), abs=0.0051)

    entry = json.loads((latest(work / "output") / "results.json").read_text())["datasets"]["roxford5k"]
    assert entry["retrieval"]["M"]["mAP"] == pytest.approx(evaluate_saved(work, layout)["M"], abs=1e-9)
    assert entry["checkpoint"]["sha256"] in (work / "log.txt").read_text()
    assert np.load(latest(work / "output") / "roxford5k_reranking_ranks.npy").shape == (3, 24)


def test_reranking_can_be_set_and_switched_off_and_descriptors_are_reused(command, layout, checkpoint_50, tmp_path):
    base = ("TEST.WEIGHTS", checkpoint_50, "TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k")
    quick = ("TEST.SCALE_LIST", 1, "DATA_LOADER.NUM_WORKERS", 0)
    outcome = command("test.py", *base, *quick, "SupG.rerank", "False")
    assert outcome.code == 0, outcome.err
    assert "Reranking" not in outcome.out
    outcome = command("test.py", *base, *quick, "SupG.rerank_m", 10, "SupG.rerank_k", 3, "SupG.rerank_beta", 0.5)
    assert ": reused" in outcome.out
    work = tmp_path / "work"
    assert logged(work, "Reranking") == pytest.approx(evaluate_saved(work, layout, (10, 3, 0.5)), abs=0.0051)

    before = np.load(kept(work / "output", "roxford5k") / "roxford5k_db.npy")
    shutil.copy(layout.image("query_0"), layout.image("db_4"))  # only the changed image is extracted again
    assert "roxford5k database: 1 images extracted" in command("test.py", *base, *quick).out
    after = np.load(kept(work / "output", "roxford5k") / "roxford5k_db.npy")
    assert np.flatnonzero((before != after).any(axis=1)).tolist() == [4]


def test_descriptors_of_another_precision_are_extracted_again(command, layout, checkpoint_50, tmp_path):
    base = ("TEST.WEIGHTS", checkpoint_50, "TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k")
    rows = {}
    for precision in ("fp32", "bf16"):
        outcome = command(
            "test.py", *base, "TEST.SCALE_LIST", 1, "DATA_LOADER.NUM_WORKERS", 0, "TEST.PRECISION", precision
        )
        assert outcome.code == 0, outcome.err
        rows[precision] = np.load(kept(tmp_path / "work" / "output", "roxford5k") / "roxford5k_db.npy")
    cosines = (rows["fp32"] * rows["bf16"]).sum(axis=1)
    assert 0.999 < cosines.min() < cosines.max() < 0.9999999


def test_depth_101_runs(command, layout, checkpoint_101):
    outcome = command(
        "test.py", "MODEL.DEPTH", 101, "TEST.WEIGHTS", checkpoint_101, "TEST.DATA_DIR", layout.data_dir,
        "TEST.DATASET_LIST", "['roxford5k']", "TEST.SCALE_LIST", 1, "DATA_LOADER.NUM_WORKERS", 0,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err


def test_the_script_starts_from_another_folder_and_ends_with_code_2_and_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "test.py", "SupG.gem"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "error: unknown option SupG.gem; did you mean SupG.gemp?\n"


# ---- bad input: one line, exit code 2 ----


@pytest.fixture
def refused(command, layout, checkpoint_50):
    """Runs on roxford5k, with a valid checkpoint unless the test gives another; returns the line of the error."""

    def run(*arguments, weights=checkpoint_50) -> str:
        outcome = command(
            "test.py", "TEST.WEIGHTS", weights, "TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k",
            "TEST.SCALE_LIST", 1, "DATA_LOADER.NUM_WORKERS", 0, *arguments,
        )  # fmt: skip
        assert outcome.code == 2
        assert "Traceback" not in outcome.err
        last = outcome.err.splitlines()[-1]  # a progress bar may precede it
        assert last.startswith("error: ")
        return last

    return run


def test_missing_weights(refused, tmp_path):
    assert "no file or folder" in refused(weights=tmp_path / "none.pyth")


def test_a_folder_without_weights_says_where_to_get_them(refused, tmp_path):
    (tmp_path / "weights").mkdir()
    line = refused(weights=tmp_path / "weights")
    assert "no ResNet-50 checkpoint in" in line
    assert "weights/README.md" in line


def test_a_folder_with_two_weights_that_fit(refused, checkpoint_50, tmp_path):
    for name in ("a.pyth", "b.pth"):
        (tmp_path / name).symlink_to(checkpoint_50)
    assert "several ResNet-50 checkpoints (a.pyth, b.pth)" in refused(weights=tmp_path)


def test_a_resnet_101_file_for_depth_50(refused, checkpoint_101):
    assert "ResNet-101" in refused(weights=checkpoint_101)
    assert "is a ResNet-101" in refused(weights=checkpoint_101.parent)


def test_a_file_that_is_not_a_checkpoint(refused, tmp_path):
    path = tmp_path / "page.pyth"
    path.write_text("<html>")
    assert "is not a PyTorch file" in refused(weights=path)


def test_a_truncated_checkpoint(refused, checkpoint_50, tmp_path):
    path = tmp_path / "cut.pyth"
    path.write_bytes(checkpoint_50.read_bytes()[:1_000_000])
    assert "damaged" in refused(weights=path)
    assert "cut.pyth is damaged" in refused(weights=tmp_path)


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_checkpoint_that_would_run_code(refused, tmp_path):
    path = tmp_path / "evil.pyth"
    torch.save({"model_state": RunsCode()}, path)
    assert "might run code when loaded" in refused(weights=path)
    assert not (tmp_path / "work" / "ran").exists()


def test_ground_truth_that_would_run_code(refused, layout, tmp_path):
    layout.ground_truth_file.write_bytes(pickle.dumps({"gnd": RunsCode()}))
    assert "is refused: it would call posix.mkdir" in refused()
    assert not (tmp_path / "work" / "ran").exists()


def test_ground_truth_that_points_past_the_image_list(refused, layout):
    layout.gnd["gnd"][1]["hard"].append(24)
    layout.write()
    assert "query query_1 lists image 24 as hard, but imlist has 24 (0 to 23)" in refused()


def test_damaged_ground_truth(refused, layout):
    layout.ground_truth_file.write_bytes(layout.ground_truth_file.read_bytes()[:100])
    assert "is damaged or not a pickle" in refused()


def test_missing_images(refused, layout):
    layout.image("db_3").unlink()
    layout.image("query_0").unlink()
    line = refused()
    assert "2 of 27 images are missing" in line
    assert "db_3.jpg" in line


def test_damaged_images_are_all_named(refused, layout):
    cut = layout.image("db_3")
    cut.write_bytes(cut.read_bytes()[:-300])
    layout.image("db_9").write_text("not an image")
    line = refused()
    assert re.search(r"2 images cannot be used: .*db_3.jpg: .*truncated.*, .*db_9.jpg: not an image", line)


def test_after_a_damaged_image_is_replaced_the_run_resumes(refused, command, layout, checkpoint_50):
    image = layout.image("db_20")
    whole = image.read_bytes()
    image.write_text("not an image")
    refused()
    image.write_bytes(whole)
    data = ("TEST.WEIGHTS", checkpoint_50, "TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k")
    outcome = command("test.py", *data, "TEST.SCALE_LIST", 1, "DATA_LOADER.NUM_WORKERS", 0)
    assert "roxford5k database: 4 images extracted, 20 unchanged" in outcome.out


def test_an_image_of_too_many_pixels_is_read_with_the_limit_that_the_error_advises(
    refused, command, layout, checkpoint_50
):
    Image.new("RGB", (300, 20)).save(layout.image("db_7"))
    line = refused("DATA_LOADER.MAX_PIXELS", 5000, "DATA_LOADER.NUM_WORKERS", 1)
    assert "db_7.jpg: has 6,000 pixels, more than the limit of 5,000" in line
    limit = re.search(r"raise the limit to (\d+) pixels", line)[1]
    data = ("TEST.WEIGHTS", checkpoint_50, "TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k")
    assert command("test.py", *data, "TEST.SCALE_LIST", 1, "DATA_LOADER.MAX_PIXELS", limit).code == 0


def test_missing_images_of_the_last_dataset_are_reported_before_the_first_is_extracted(refused, layout):
    shutil.copytree(layout.folder, layout.data_dir / "rparis6k")
    (layout.data_dir / "rparis6k" / "gnd_roxford5k.pkl").rename(layout.data_dir / "rparis6k" / "gnd_rparis6k.pkl")
    (layout.data_dir / "rparis6k" / "jpg" / "db_3.jpg").unlink()
    assert "rparis6k: 1 of 27 images are missing" in refused("TEST.DATASET_LIST", "[roxford5k, rparis6k]")
    assert not list((layout.data_dir.parent / "work" / "output").rglob("*.npy"))


def test_a_descriptor_that_is_not_finite_is_never_saved(refused, tmp_path):
    assert "its descriptor is not finite; a power or threshold of the modules is too large" in refused(
        "SupG.relup_threshold", "1e30"
    )
    assert not list((tmp_path / "work" / "output").rglob("*.npy"))


def test_a_query_box_outside_its_image(refused, layout):
    layout.gnd["gnd"][2]["bbx"] = [90, 5, 120, 30]
    layout.write()
    assert "query_2.jpg: the query box (90, 5, 120, 30) holds no pixel of this 80 x 60 image" in refused()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("MODEL.DEPTH", 52), "MODEL.DEPTH"),
        (("SupG.gem",), "did you mean SupG.gemp?"),
        (("TEST.SCALE_LIST", 4), "TEST.SCALE_LIST"),
        (("TEST.DATASET_LIST", "rparis6k"), "no dataset rparis6k in"),
        (("TEST.OUT_DIR", "/dev/null/out"), "TEST.OUT_DIR: /dev/null/out cannot be created"),
        (("SupG.onemeval",), "no file feats_1m_RN50.pth; create it with extract_rop1m.py"),
    ],
)
def test_bad_options(refused, words, message):
    assert message in refused(*words)


def test_roxford5k_never_takes_the_toys_weights(command, layout):
    (layout.data_dir / "toy").mkdir()
    outcome = command("test.py", "TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k")
    assert outcome.code == 2
    assert "see weights/README.md for the download of CVPR2022_CVNet_R50.pyth" in outcome.err


# ---- saved descriptors ----


@pytest.fixture
def features() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((27, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows[:3], rows[3:]


def save_features(folder, kind: str, queries: np.ndarray, rows: np.ndarray):
    folder.mkdir()
    path = folder / f"features.{kind}"
    if kind == "mat":
        scipy.io.savemat(path, {"Q": queries.T, "X": rows.T})
    elif kind == "npz":
        np.savez(path, Q=queries, X=rows)
    elif kind == "pth":
        torch.save({"Q": torch.from_numpy(queries.T.copy()), "X": torch.from_numpy(rows.T.copy())}, path)
    else:
        path = folder if kind == "folder" else folder / "roxford5k_db.npy"
        np.save(folder / "roxford5k_query.npy", queries)
        np.save(folder / "roxford5k_db.npy", rows)
    return path


@pytest.fixture
def evaluate_features(command, layout):
    def run(path):
        return command(
            "test.py", "TEST.FEATURES", path, "TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k"
        )

    return run


@pytest.mark.parametrize("kind", ["mat", "npz", "pth", "npy", "folder"])
def test_saved_descriptors_are_evaluated_without_images(evaluate_features, layout, tmp_path, features, kind):
    shutil.rmtree(layout.folder / "jpg")
    outcome = evaluate_features(save_features(tmp_path / "saved", kind, *features))
    assert outcome.code == 0, outcome.err
    assert "not of unit length" not in outcome.out
    expected = all_protocols(full_ranking(*features), layout.gnd["gnd"])
    assert logged(tmp_path / "work", "Retrieval") == pytest.approx(expected, abs=0.0051)


def test_unit_length_is_restored_with_a_warning(evaluate_features, layout, tmp_path, features):
    queries, rows = features
    scale = np.linspace(0.5, 2, len(rows), dtype=np.float32)[:, None]
    outcome = evaluate_features(save_features(tmp_path / "saved", "mat", queries, rows * scale))
    assert re.search(r"database descriptors of .*: \d+ of 24 are not of unit length; they are normalised", outcome.out)
    expected = all_protocols(full_ranking(queries, rows), layout.gnd["gnd"])
    assert logged(tmp_path / "work", "Retrieval") == pytest.approx(expected, abs=0.0051)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, x: (q, x[:-1]), "roxford5k has 24 images, but the shape is (16, 23)"),
        (lambda q, x: (q[:, :-1], x), "queries have 15 dimensions, the database 16"),
        (lambda q, x: (q, x * (np.arange(24) != 5)[:, None]), "the descriptor of image 5 (from 0) is zero"),
        (lambda q, x: (q + np.nan, x), "the descriptor of image 0 (from 0) is zero or not finite"),
        (lambda q, x: ((q * 100).astype(np.int16), x), "floating-point array, got int16"),
    ],
)
def test_saved_descriptors_that_do_not_fit_are_rejected(evaluate_features, tmp_path, features, change, message):
    outcome = evaluate_features(save_features(tmp_path / "saved", "mat", *change(*features)))
    assert outcome.code == 2
    assert message in outcome.err


def test_queries_and_database_of_different_settings_are_not_compared(evaluate_features, tmp_path, features):
    folder = save_features(tmp_path / "saved", "folder", *features)
    for kind, scales in (("query", 3), ("db", 5)):
        (folder / f"roxford5k_{kind}.npy.json").write_text(json.dumps({"scales": scales, "fingerprint": kind}))
    outcome = evaluate_features(folder)
    assert outcome.code == 2
    assert "scales: 5 before, 3 now" in outcome.err


@pytest.mark.parametrize(
    "name", ["none.mat", "bad.mat", "bad.npz", "bad.pth", "roxford5k_db.npy", "x.txt", "other.npy"]
)
def test_files_without_descriptors_are_rejected(evaluate_features, tmp_path, name):
    path = tmp_path / name
    if name != "none.mat":
        path.write_text("something else")
    outcome = evaluate_features(path)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("dimensions", [3, 24])
def test_with_as_many_dimensions_as_images_descriptors_are_recognised_by_unit_length(
    command, layout, tmp_path, dimensions
):
    rows = np.random.default_rng(0).standard_normal((27, dimensions)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    words = ("TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k", "TEST.FEATURES")
    lines = []
    for name, (queries, database) in {"rows": (rows[:3], rows[3:]), "columns": (rows[:3].T, rows[3:].T)}.items():
        np.savez(tmp_path / f"{name}.npz", Q=queries, X=database)
        out = command("test.py", *words, tmp_path / f"{name}.npz").out
        lines.append([line for line in out.splitlines() if "results: " in line])
    assert lines[0] == lines[1] != []
    np.savez(tmp_path / "long.npz", Q=2 * rows[:3], X=2 * rows[3:])
    outcome = command("test.py", *words, tmp_path / "long.npz")
    assert outcome.code == 2
    assert f"rows and columns cannot be distinguished by the shape ({dimensions}, {dimensions}); save" in outcome.err


# At the first start, the second process is killed while it extracts.
KILLED = f"""
import os, runpy, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from extraction.store import Store
write = Store.write
def write_or_die(store, label, identity, row):
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and b"db_20" in label:
        open("killed", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    write(store, label, identity, row)
Store.write = write_or_die
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
    time.sleep(2)  # the other process must not take the address of the killed one for this one's
runpy.run_path({str(ROOT / "test.py")!r}, run_name="__main__")
"""


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shared(count: int, script: str, words: tuple, folder: Path) -> str:
    """Returns what the processes of a torchrun print."""
    folder.mkdir()
    processes = ranks(count, ROOT / script, list(words), folder)
    assert [process.wait() for process in processes] == [0] * count, [process.err for process in processes]
    return "".join(process.out for process in processes)


def test_the_processes_of_a_torchrun_share_extraction_and_search_and_one_may_be_killed(
    command, layout, checkpoint_50, tmp_path, one_thread
):
    far = np.random.default_rng(0).standard_normal((50, 2048)).astype(np.float32)
    np.save(tmp_path / "far.npy", far / np.linalg.norm(far, axis=1, keepdims=True))
    words = ("TEST.WEIGHTS", checkpoint_50, "TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k")
    words += ("SupG.onemeval", "TEST.DISTRACTORS", tmp_path / "far.npy", "TEST.BATCH_SIZE", 1)
    words = [str(word) for word in (*words, "TEST.SCALE_LIST", 1, "DATA_LOADER.NUM_WORKERS", 0)]
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "driver.py").write_text(KILLED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "--max-restarts=3", "driver.py", *words], cwd=tmp_path / "shared", capture_output=True, text=True,
        check=False, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "process 2 of 2" in done.stderr, done.stderr
    assert (tmp_path / "shared" / "killed").exists()

    alone = command("test.py", *words)
    assert alone.code == 0, alone.err
    lines = [[line for line in out.splitlines() if "results: " in line] for out in (done.stdout, alone.out)]
    assert lines[0] == lines[1] != []
    for name in ("roxford5k_retrieval_ranks.npy", "roxford5k_reranking_ranks.npy"):
        files = [latest(tmp_path / where / "output") / name for where in ("shared", "work")]
        assert files[0].read_bytes() == files[1].read_bytes()
    rows = [kept(tmp_path / where / "output", "roxford5k") / "roxford5k_db.npy" for where in ("shared", "work")]
    assert rows[0].read_bytes() == rows[1].read_bytes()


def test_the_processes_of_a_torchrun_share_a_table(command, layout, checkpoint_50, tmp_path, one_thread):
    """A missing dataset has its row, as with one process."""
    words = ("rerank", "TEST.WEIGHTS", checkpoint_50, "TEST.DATA_DIR", layout.data_dir)
    words += ("TEST.DATASET_LIST", "['roxford5k', 'rparis6k']", "TEST.SCALE_LIST", 1, "DATA_LOADER.NUM_WORKERS", 0)
    assert shared(2, "tools/tables.py", words, tmp_path / "shared") == command("tools/tables.py", *words).out


def test_the_processes_of_a_torchrun_share_the_search_of_a_folder(command, layout, checkpoint_50, tmp_path, one_thread):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(8):
        shutil.copy(layout.image(f"db_{number}"), images)
    words = ("--database", images, "--queries", images, "--json", "--weights", checkpoint_50)
    words += ("TEST.SCALE_LIST", 1, "DATA_LOADER.NUM_WORKERS", 0)
    out = shared(3, "tools/search.py", words, tmp_path / "shared")
    assert json.loads(out) == json.loads(command("tools/search.py", *words).out)
