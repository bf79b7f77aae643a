"""Damaged files of every kind that comes from outside give an InputError of one line or a result, and nothing else.

Each run tries the same 2,000 inputs; `python benchmarks/reliability.py mutated` 100,000. Files that a child process
reads have small shares.
"""

import contextlib
import gzip
import io
import json
import pickle
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from conftest import latest
from drawn_descriptors import draw_descriptors
from fuzz.mutations import count_of, mutated, survives
from PIL import Image

from config import OPTIONS, CommandLine
from extraction.identity import NO_STAT, Identity
from extraction.images import ReadingLimits, read_image
from extraction.provenance import Provenance
from extraction.store import Records, Store
from model.checkpoint import encoder_state, load_encoder
from model.cvnet import ResNet
from model.errors import InputError
from model.whitening import load_whitening
from modules.whitening import Whitening
from revisitop.descriptors import load_distractors, load_features, load_ranking
from revisitop.layout_revisitop import read_ground_truth
from revisitop.layouts import load_dataset
from tools.compare import compare, differing_options, read_run
from tools.download import unpack

pytestmark = pytest.mark.slow  # reads 2,000 files


def test_ground_truth(layout):
    arrays = {**layout.gnd, "gnd": [{k: np.array(v) for k, v in entry.items()} for entry in layout.gnd["gnd"]]}
    samples = [pickle.dumps(content, protocol) for content in (layout.gnd, arrays) for protocol in range(6)]
    survives(layout.ground_truth_file, samples, lambda path: read_ground_truth("roxford5k", path), 2)


def test_images(tmp_path, monkeypatch):
    """A small file can claim as many pixels as the limit allows, which bounds its memory."""
    monkeypatch.setattr("extraction.images._limits", ReadingLimits(1_000_000))
    samples = []
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM"):
        image.save(file := io.BytesIO(), kind)
        samples.append(file.getvalue())
    survives(tmp_path / "x.jpg", samples, read_image, 24)


@pytest.mark.parametrize(("kind", "share"), [("npz", 8), ("mat", 0.3), ("pth", 0.7), ("npy", 8)])
def test_saved_descriptors(layout, tmp_path, kind, share):
    dataset = load_dataset("roxford5k", layout.data_dir)
    rows = np.random.default_rng(0).standard_normal((27, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    file = io.BytesIO()
    if kind == "npz":
        np.savez_compressed(file, Q=rows[:3], X=rows[3:])
    elif kind == "mat":
        scipy.io.savemat(file, {"Q": rows[:3].T, "X": rows[3:].T})
    elif kind == "pth":
        torch.save({"Q": torch.from_numpy(rows[:3]), "X": torch.from_numpy(rows[3:])}, file)
    else:
        np.save(file, rows[3:])
        np.save(tmp_path / "roxford5k_query.npy", rows[:3])
    survives(tmp_path / f"roxford5k_db.{kind}", [file.getvalue()], lambda path: load_features(path, dataset), share)


@pytest.mark.parametrize(("kind", "share"), [("pth", 0.7), ("npy", 7)])
def test_distractors(tmp_path, kind, share):
    rows = torch.nn.functional.normalize(torch.randn(40, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    file = io.BytesIO()
    torch.save(rows, file) if kind == "pth" else np.save(file, rows.numpy())
    survives(tmp_path / f"feats.{kind}", [file.getvalue()], load_distractors, share)


def test_checkpoints(tmp_path):
    state = {f"encoder_q.{key}": torch.zeros(2) for key in ("stem.conv.weight", "s1.b1.f.a.weight", "head.pool.p")}
    samples = []
    for zipped in (True, False):
        torch.save({"model_state": state}, file := io.BytesIO(), _use_new_zipfile_serialization=zipped)
        samples.append(file.getvalue())
    with torch.device("meta"):
        network = ResNet(50)
    survives(tmp_path / "x.pyth", samples, lambda path: (encoder_state(path), load_encoder(network, path)), 1)


def test_whitenings(tmp_path):
    whitening = Whitening(torch.zeros(4), torch.eye(4)[:2])
    torch.save({**whitening.state_dict(), "learnt_from": {"dataset": "toy"}}, file := io.BytesIO())
    survives(tmp_path / "w.pth", [file.getvalue()], load_whitening, 0.5)


def test_saved_rankings(layout, tmp_path):
    dataset = load_dataset("roxford5k", layout.data_dir)
    ids = np.argsort(np.random.default_rng(0).random((3, 24)), axis=1)
    saved = np.stack([np.linspace(1, 0, 24)[None].repeat(3, 0), ids])
    torch.save(torch.from_numpy(saved), file := io.BytesIO())
    samples = [pickle.dumps(saved), pickle.dumps(torch.from_numpy(saved)), file.getvalue()]
    survives(tmp_path / "nn.pkl", samples, lambda path: load_ranking(path, dataset), 1)


@pytest.mark.parametrize("name", ["index.csv", "queries.csv", "solution.csv", "predictions.csv"])
def test_csv_files(tmp_path, name):
    folder, contents = tmp_path / "own", {
        "index.csv": "id\n" + "\n".join(f"{number:016x}" for number in range(9)),
        "queries.csv": 'id,x0,y0,x1,y1\nq0,,,,\n"q1",2,2,40,30.5\nq2,0,0,1e3,9\n',
        "solution.csv": f"id,images,Usage\nq0,{1:016x} {2:016x},Public\nq1,{5:016x},Private\nq2,None,Ignored\n",
        "predictions.csv": f"id,images\nq0,{1:016x} {2:016x} x\nq1,{5:016x}\n",
    }  # fmt: skip
    folder.mkdir()
    for other, content in contents.items():
        (folder / other).write_text(content)

    def read(path: Path) -> None:
        dataset = load_dataset("own", tmp_path)
        load_ranking(folder / "predictions.csv", dataset)

    survives(folder / name, [content.encode() for content in contents.values()], read, 3)


def test_results_of_runs(command, tmp_path):
    draw_descriptors(tmp_path / "data", tmp_path / "features", "new", 0)
    words = ("TEST.DATASET_LIST", "new", "TEST.DATA_DIR", tmp_path / "data", "TEST.FEATURES", tmp_path / "features")
    assert command("test.py", *words).code == 0
    sample = (latest(tmp_path / "work" / "output") / "results.json").read_bytes()

    def read(path: Path) -> None:
        run = read_run("A", str(path))
        for name in run.results:
            for pairs in compare(run, run, name):
                assert pairs.cells()
        assert differing_options(run, run) == {}

    survives(tmp_path / "results.json", [sample, json.dumps(json.loads(sample)).encode()], read, 4)


def test_configurations(tmp_path):
    samples = [
        b"MODEL:\n  DEPTH: 101\n  NAME: cvnet\nTEST:\n  DATASET_LIST: [toy, roxford5k]\n  SCALE_LIST: 3\n",
        b"# ours\nSupG: {gemp: true, gemp_p: 4.6, relup: yes, sgem_p: .inf}\nRERANK: {K1: 20, LAMBDA: 0.3}\n",
        b"TEST:\n- a: &x 1\n  b: *x\n",
    ]
    survives(tmp_path / "run.yaml", samples, lambda path: CommandLine("").parse(["--config-file", str(path)]), 6)


@pytest.mark.parametrize("kind", ["rows.npy", "json", "images.npz", "block", "provenance.json", "probe.npy"])
def test_stores(tmp_path, kind):
    """Rows that are found in damaged files are correct, to the bit; files with right checksums are read or not."""
    rows = np.random.default_rng(0).random((10, 4), dtype=np.float32) + 1
    identities = [Identity(bytes([row]) * 16, NO_STAT) for row in range(10)]
    records = Records.of([str(number).encode() for number in range(10)], identities)

    def store() -> Store:
        return Store(tmp_path / "rows.npy", 4, Provenance({"checkpoint": "abc"}, np.eye(2, dtype=np.float32)))

    written = store()
    for number, (identity, row) in enumerate(zip(identities, rows, strict=True)):
        written.write(str(number).encode(), identity, row)
    written.flush()
    if kind in ("rows.npy", "json", "images.npz"):
        written.finish(records)
    whole = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    path = next(each for each in whole if each.name.endswith(".npz" if kind == "block" else kind))

    found = 0
    count = count_of(1.5)
    damaged, forged = (mutated([whole[path]], count, forged) for forged in (False, True))
    for number, data in enumerate((*damaged, *forged)):
        for other in {*tmp_path.rglob("*")} - whole.keys():
            other.unlink(missing_ok=True) if other.is_file() else None
        for other, content in whole.items():
            other.parent.mkdir(exist_ok=True)
            other.write_bytes(data if other == path else content)
        read = store()
        read.read()
        known = read.has(records.keys)
        if number < count:
            np.testing.assert_array_equal(read.rows(records.keys)[known], rows[known])
            found += int(known.sum())
    assert found < 10 * count


def test_archives(tmp_path):
    samples = []
    for names in (["a.jpg", "b/c.jpg"], ["d/e.jpg"], ["../out.jpg"], ["/etc/out.jpg"], ["link"]):
        with tarfile.open(fileobj=(file := io.BytesIO()), mode="w") as tar:
            for name in names:
                member = tarfile.TarInfo(name)
                member.type = tarfile.SYMTYPE if name == "link" else tarfile.REGTYPE
                member.linkname, member.size = "/etc/passwd" if name == "link" else "", 700 * (name != "link")
                tar.addfile(member, io.BytesIO(b"x" * member.size))
        samples.append(file.getvalue())
    folder, archive = tmp_path / "inside" / "folder", tmp_path / "x.tar.gz"
    (tmp_path / "inside").mkdir()
    refused = unpacked = 0
    for data in mutated(samples, count_of(3)):
        archive.write_bytes(gzip.compress(data, 1))
        try:
            unpack(folder, archive, flat=refused % 2 == 0)
            unpacked += 1
        except InputError:
            refused += 1
        assert not any(path.is_symlink() for path in folder.rglob("*"))
        assert {path.name for path in tmp_path.iterdir()} == {"inside", "x.tar.gz"}
        assert {path.name for path in (tmp_path / "inside").iterdir()} == {"folder"}
    assert min(refused, unpacked) > 0
    whole = archive.read_bytes()
    # Damage that gzip detects.
    survives(tmp_path / "y.tar.gz", [whole], lambda path: unpack(folder, path, flat=True), 1)


def test_command_lines(tmp_path):
    rng = random.Random(0)
    values = ["", "1", "-1", "nan", "inf", "1e400", "[", "[1", "(0.5,", "'x'", "True", "\0", "é", "../..", "cuda:1"]
    files = ["{}", "a", "- 1", "TEST: [", "1: 2", "{[1]: 2}"]
    files += [f"TEST: {{SCALE_LIST: {value}}}" for value in ("{a: 1}", "[1, a]", "9" * 30)]
    files += [f"TEST: {{OUT_DIR: {value}}}" for value in values]
    config = tmp_path / "run.yaml"
    keys = [option.key for option in OPTIONS]
    for _ in range(count_of(5)):
        words = [rng.choice(keys + values) for _ in range(rng.randrange(1, 6))]
        if rng.random() < 0.3:
            config.write_text(rng.choice(files))
            words = ["--config-file", str(config), *words]
        with contextlib.suppress(InputError):
            CommandLine("").parse(words)


def test_a_name_with_line_breaks_makes_no_second_line():
    assert len(str(InputError("list.csv: query a\nb\u2028c has no box")).splitlines()) == 1
