"""The command line of test.py, from files to metrics."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.io
import torch
from conftest import ROOT, Outcome, kept, latest
from forked import ranks
from oracles import all_protocols, dense_reranking, full_ranking
from PIL import Image

pytestmark = pytest.mark.slow  # runs commands on CVNet's network and in several processes

MODULES = ("SupG.gemp", "SupG.rgem", "SupG.sgem", "SupG.relup", "SupG.rerank", "SupG.onemeval", "False")


@pytest.fixture
def evaluate(command, layout, two_layers):
    """Runs the command on roxford5k with a fast network."""
    words = ("TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k", *two_layers)
    return lambda *others: command("test.py", *words, *others)


def logged(work, stage: str) -> dict[str, float]:
    """Returns the metrics in the last line of this stage in the log."""
    lines = re.findall(rf"{stage} results: mAP E: ([\d.]+), M: ([\d.]+), H: ([\d.]+)", (work / "log.txt").read_text())
    return dict(zip("EMH", map(float, lines[-1]), strict=True))


def by_the_book(work, layout, rerank: tuple | None = None) -> dict[str, float]:
    """Returns the metrics of the protocol for the descriptors that a run saved, computed by the textbook formulas."""
    queries, rows = (np.load(kept(work / "output", "roxford5k") / f"roxford5k_{kind}.npy") for kind in ("query", "db"))
    ranking = full_ranking(queries, rows)
    if rerank:
        m, k, beta = rerank
        for i, query in enumerate(queries):
            ranking[i, :m] = ranking[i, :m][dense_reranking(query, rows[ranking[i, :m]], k, beta)]
    return all_protocols(ranking, layout.gnd["gnd"])


def test_metrics_follow_the_protocol_for_the_saved_descriptors(command, layout, checkpoint_50, tmp_path):
    outcome = command(
        "test.py", "MODEL.DEPTH", 50, "TEST.WEIGHTS", checkpoint_50.parent, "TEST.DATA_DIR", layout.data_dir,
        *MODULES, "TEST.DATASET_LIST", "['roxford5k']", "DATA_LOADER.NUM_WORKERS", 0,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    work = tmp_path / "work"
    assert logged(work, "Retrieval") == pytest.approx(by_the_book(work, layout), abs=0.0051)
    assert logged(work, "Reranking") == pytest.approx(by_the_book(work, layout, (24, 9, 0.15)), abs=0.0051)

    entry = json.loads((latest(work / "output") / "results.json").read_text())["datasets"]["roxford5k"]
    assert entry["retrieval"]["M"]["mAP"] == pytest.approx(by_the_book(work, layout)["M"], abs=1e-9)
    assert entry["checkpoint"]["sha256"] in (work / "log.txt").read_text()
    assert np.load(latest(work / "output") / "roxford5k_reranking_ranks.npy").shape == (3, 24)


def test_reranking_can_be_set_and_switched_off_and_only_changed_images_are_extracted(evaluate, layout, tmp_path):
    outcome = evaluate("SupG.rerank", "False")
    assert outcome.code == 0, outcome.err
    assert "Reranking" not in outcome.out
    outcome = evaluate("SupG.rerank_m", 10, "SupG.rerank_k", 3, "SupG.rerank_beta", 0.5)
    assert ": reused" in outcome.out
    work = tmp_path / "work"
    assert logged(work, "Reranking") == pytest.approx(by_the_book(work, layout, (10, 3, 0.5)), abs=0.0051)

    before = np.load(kept(work / "output", "roxford5k") / "roxford5k_db.npy")
    shutil.copy(layout.image("query_0"), layout.image("db_4"))
    assert "roxford5k database: 1 images extracted" in evaluate().out
    after = np.load(kept(work / "output", "roxford5k") / "roxford5k_db.npy")
    assert np.flatnonzero((before != after).any(axis=1)).tolist() == [4]


# ---- bad input: one line, exit code 2 ----


def refused(outcome: Outcome) -> str:
    """Returns the line of the error."""
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    last = outcome.err.splitlines()[-1]  # a progress bar may precede it
    assert last.startswith("error: ")
    return last


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("name", "content", "noun"),
    [
        ("none.pyth", None, "none.pyth"),
        ("", None, "weights/README.md"),
        ("page.pyth", "<html>", "page.pyth"),
        ("evil.pyth", {"model_state": RunsCode()}, "evil.pyth"),
    ],
)
def test_weights_that_cannot_be_used(command, layout, tmp_path, name, content, noun):
    (tmp_path / "weights").mkdir()
    path = tmp_path / "weights" / name
    if content is not None:
        path.write_text(content) if isinstance(content, str) else torch.save(content, path)
    words = ("TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k", "TEST.WEIGHTS", path)
    assert noun in refused(command("test.py", *words))
    assert not (tmp_path / "work" / "ran").exists()


@pytest.mark.parametrize(
    ("change", "noun"),
    [
        (lambda layout: layout.ground_truth_file.write_bytes(pickle.dumps(RunsCode())), "gnd_roxford5k.pkl"),
        (lambda layout: (layout.image("db_3").unlink(), layout.image("query_0").unlink()), "2 of 27 .*db_3.jpg"),
        (lambda layout: layout.gnd["gnd"][2].update(bbx=[90, 5, 120, 30]) or layout.write(), "query_2.jpg"),
    ],
)
def test_a_dataset_that_cannot_be_used(evaluate, layout, tmp_path, change, noun):
    change(layout)
    assert re.search(noun, refused(evaluate()))
    assert not (tmp_path / "work" / "ran").exists()


def test_an_image_of_too_many_pixels_is_read_with_the_limit_that_the_error_advises(evaluate, layout):
    Image.new("RGB", (300, 20)).save(layout.image("db_7"))
    line = refused(evaluate("DATA_LOADER.MAX_PIXELS", 5000, "DATA_LOADER.NUM_WORKERS", 1))
    assert "db_7.jpg" in line
    limit = re.search(r"raise the limit to (\d+) pixels", line)[1]
    assert evaluate("DATA_LOADER.MAX_PIXELS", limit).code == 0


def test_missing_images_of_the_last_dataset_are_reported_before_the_first_is_extracted(evaluate, layout):
    shutil.copytree(layout.folder, layout.data_dir / "rparis6k")
    (layout.data_dir / "rparis6k" / "gnd_roxford5k.pkl").rename(layout.data_dir / "rparis6k" / "gnd_rparis6k.pkl")
    (layout.data_dir / "rparis6k" / "jpg" / "db_3.jpg").unlink()
    assert "rparis6k: 1 of 27" in refused(evaluate("TEST.DATASET_LIST", "[roxford5k, rparis6k]"))
    assert not list((layout.data_dir.parent / "work" / "output").rglob("*.npy"))


@pytest.mark.parametrize(
    ("words", "noun"),
    [
        (("TEST.DATASET_LIST", "rparis6k"), "rparis6k"),
        (("TEST.OUT_DIR", "/dev/null/out"), "TEST.OUT_DIR"),
        (("SupG.onemeval",), "extract_rop1m.py"),
    ],
)
def test_bad_options(evaluate, words, noun):
    assert noun in refused(evaluate(*words))


def test_roxford5k_never_takes_the_toys_weights(command, layout):
    (layout.data_dir / "toy").mkdir()
    outcome = command("test.py", "TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k")
    assert "weights/README.md" in refused(outcome)


# ---- saved descriptors ----


@pytest.fixture
def features() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((27, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows[:3], rows[3:]


def save_features(folder, kind: str, queries: np.ndarray, rows: np.ndarray):
    folder.mkdir()
    path = {"mat": folder / "features.mat", "folder": folder, "npy": folder / "roxford5k_db.npy"}[kind]
    scipy.io.savemat(folder / "features.mat", {"Q": queries.T, "X": rows.T})
    np.save(folder / "roxford5k_query.npy", queries)
    np.save(folder / "roxford5k_db.npy", rows)
    return path


@pytest.fixture
def evaluate_features(command, layout):
    words = ("TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k")
    return lambda path: command("test.py", "TEST.FEATURES", path, *words)


@pytest.mark.parametrize("kind", ["mat", "npy", "folder"])
def test_saved_descriptors_are_evaluated_without_images(evaluate_features, layout, tmp_path, features, kind):
    shutil.rmtree(layout.folder / "jpg")
    outcome = evaluate_features(save_features(tmp_path / "saved", kind, *features))
    assert outcome.code == 0, outcome.err
    assert "not of unit length" not in outcome.out
    expected = all_protocols(full_ranking(*features), layout.gnd["gnd"])
    assert logged(tmp_path / "work", "Retrieval") == pytest.approx(expected, abs=0.0051)


@pytest.mark.parametrize(
    ("change", "noun"),
    [
        (lambda q, x: (q, x[:-1]), "24 images"),
        (lambda q, x: (q[:, :-1], x), "dimensions"),
        (lambda q, x: (q, x * (np.arange(24) != 5)[:, None]), "row 5"),
        (lambda q, x: (q + np.nan, x), "row 0"),
        (lambda q, x: ((q * 100).astype(np.int16), x), "int16"),
    ],
)
def test_saved_descriptors_that_do_not_fit_are_rejected(evaluate_features, tmp_path, features, change, noun):
    assert noun in refused(evaluate_features(save_features(tmp_path / "saved", "mat", *change(*features))))


def test_queries_and_database_of_different_settings_are_not_compared(evaluate_features, tmp_path, features):
    folder = save_features(tmp_path / "saved", "folder", *features)
    for kind, scales in (("query", 3), ("db", 5)):
        (folder / f"roxford5k_{kind}.npy.json").write_text(json.dumps({"scales": scales, "fingerprint": kind}))
    assert "scales" in refused(evaluate_features(folder))


# ---- several processes ----

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


def test_the_processes_of_a_torchrun_share_extraction_and_search_and_one_may_be_killed(
    evaluate, layout, two_layers, tmp_path, one_thread
):
    far = np.random.default_rng(0).standard_normal((50, 16)).astype(np.float32)
    np.save(tmp_path / "far.npy", far / np.linalg.norm(far, axis=1, keepdims=True))
    words = ("SupG.onemeval", "TEST.DISTRACTORS", tmp_path / "far.npy", "TEST.BATCH_SIZE", 1)
    data = ("TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "roxford5k", *two_layers)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "driver.py").write_text(KILLED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "--max-restarts=3", "driver.py", *map(str, (*data, *words))], cwd=tmp_path / "shared",
        capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "shared" / "killed").exists()  # the second process wrote rows

    alone = evaluate(*words)
    assert alone.code == 0, alone.err
    lines = [[line for line in out.splitlines() if "results: " in line] for out in (done.stdout, alone.out)]
    assert lines[0] == lines[1] != []
    outputs = [tmp_path / where / "output" for where in ("shared", "work")]
    for name in ("roxford5k_retrieval_ranks.npy", "roxford5k_reranking_ranks.npy"):
        assert (latest(outputs[0]) / name).read_bytes() == (latest(outputs[1]) / name).read_bytes()
    rows = [kept(output, "roxford5k") / "roxford5k_db.npy" for output in outputs]
    assert rows[0].read_bytes() == rows[1].read_bytes()


@pytest.mark.parametrize("name", ["tables", "search"])
def test_the_processes_of_a_torchrun_share_the_work_of_other_commands(
    command, layout, two_layers, tmp_path, one_thread, name
):
    """A missing dataset has its row in a table, as with one process."""
    images = layout.folder / "jpg"
    words = {
        "tables": ("rerank", "TEST.DATA_DIR", layout.data_dir, "TEST.DATASET_LIST", "['roxford5k', 'rparis6k']"),
        "search": ("--database", images, "--queries", images, "--json"),
    }[name]
    script, folder = f"tools/{name}.py", tmp_path / "shared"
    folder.mkdir()
    processes = ranks(2, ROOT / script, [*words, *two_layers], folder)
    assert [process.wait() for process in processes] == [0, 0], [process.err for process in processes]
    out, alone = "".join(process.out for process in processes), command(script, *words, *two_layers).out
    assert out == alone if name == "tables" else json.loads(out) == json.loads(alone)
