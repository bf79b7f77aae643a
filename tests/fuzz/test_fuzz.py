"""Damaged files of every kind that comes from outside give an InputError or a result, and nothing else.

Each run tries the same 200 files of each kind, or 20 that a child process reads.
With more: FUZZ_TRIES=100000 python -m pytest tests/fuzz
"""

import contextlib
import gzip
import io
import os
import pickle
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from config import OPTIONS, CommandLine
from extraction.identity import NO_STAT, Identity
from extraction.images import read_image
from extraction.store import Store
from model.checkpoint import encoder_state, load_encoder
from model.cvnet import ResNet
from model.errors import InputError
from revisitop.descriptors import load_distractors, load_features
from revisitop.layout_revisitop import read_ground_truth
from revisitop.layouts import load_dataset
from tools.download import unpack

TRIES = int(os.environ.get("FUZZ_TRIES", 200))
IN_A_CHILD = (".mat", ".pkl", ".pth", ".pyth")


def mutated(samples: list[bytes], tries: int = TRIES) -> Iterator[bytes]:
    """Yields samples with bytes changed, cut off, repeated or taken from another sample."""
    rng = random.Random(0)
    for _ in range(tries):
        data = bytearray(rng.choice(samples))
        for _ in range(rng.choice((1, 1, 2, 5, 20))):
            place = rng.randrange(len(data)) if rng.random() < 0.6 else rng.randrange(min(len(data), 300))
            kind = rng.randrange(5)
            if kind == 0:
                data[place] = rng.randrange(256)
            elif kind == 1:
                data[place] ^= 1 << rng.randrange(8)
            elif kind == 2:
                data[place : place + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(9))
            elif kind == 3:
                other = rng.choice(samples)
                start = rng.randrange(len(other))
                data[place:place] = other[start : start + rng.randrange(1, 40)]
            elif rng.random() < 0.3:
                del data[place:]
            data = data or bytearray(b"\0")
        yield bytes(data)


def survives(path: Path, samples: list[bytes], read: Callable[[Path], object]) -> None:
    """Reads mutated samples, some of which must be rejected."""
    refused = 0
    for data in mutated(samples, TRIES // 10 if path.suffix in IN_A_CHILD else TRIES):
        path.write_bytes(data)
        try:
            read(path)
        except InputError:
            refused += 1
        except Exception as error:
            kept = path.with_name(f"failure{path.suffix}")
            kept.write_bytes(data)
            pytest.fail(f"{type(error).__name__}: {error}; the input is {kept}")
    assert refused > 0


def test_ground_truth(layout):
    arrays = {**layout.gnd, "gnd": [{k: np.array(v) for k, v in entry.items()} for entry in layout.gnd["gnd"]]}
    samples = [pickle.dumps(content, protocol) for content in (layout.gnd, arrays) for protocol in range(6)]
    survives(layout.ground_truth_file, samples, lambda path: read_ground_truth("roxford5k", path))


def test_images(tmp_path):
    samples = []
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM"):
        image.save(file := io.BytesIO(), kind)
        samples.append(file.getvalue())
    survives(tmp_path / "x.jpg", samples, read_image)


@pytest.mark.parametrize("kind", ["npz", "mat", "pth", "npy"])
def test_saved_descriptors(layout, tmp_path, kind):
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
    survives(tmp_path / f"roxford5k_db.{kind}", [file.getvalue()], lambda path: load_features(path, dataset))


@pytest.mark.parametrize("kind", ["pth", "npy"])
def test_distractors(tmp_path, kind):
    rows = torch.nn.functional.normalize(torch.randn(40, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    file = io.BytesIO()
    torch.save(rows, file) if kind == "pth" else np.save(file, rows.numpy())
    survives(tmp_path / f"feats.{kind}", [file.getvalue()], load_distractors)


def test_checkpoints(tmp_path):
    state = {f"encoder_q.{key}": torch.zeros(2) for key in ("stem.conv.weight", "s1.b1.f.a.weight", "head.pool.p")}
    samples = []
    for zipped in (True, False):
        torch.save({"model_state": state}, file := io.BytesIO(), _use_new_zipfile_serialization=zipped)
        samples.append(file.getvalue())
    with torch.device("meta"):
        network = ResNet(50)
    survives(tmp_path / "x.pyth", samples, lambda path: (encoder_state(path), load_encoder(network, path)))


@pytest.mark.parametrize("kind", ["rows.npy", "json", "images.npz", "block", "provenance.json", "probe.npy"])
def test_stores(tmp_path, kind):
    """Rows that are found in damaged files are correct, to the bit."""
    rows = np.random.default_rng(0).random((10, 4), dtype=np.float32) + 1
    identities = [Identity(bytes([row]) * 16, NO_STAT) for row in range(10)]

    def store() -> Store:
        return Store(tmp_path / "rows.npy", 4, {"checkpoint": "abc"}, np.eye(2, dtype=np.float32))

    written = store()
    for number, (identity, row) in enumerate(zip(identities, rows, strict=True)):
        written.write(str(number).encode(), identity, row)
    written.flush()
    if kind in ("rows.npy", "json", "images.npz"):
        written.finish([str(number).encode() for number in range(10)], identities)
    whole = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    path = next(each for each in whole if each.name.endswith(".npz" if kind == "block" else kind))

    found = 0
    for data in mutated([whole[path]]):
        for other in {*tmp_path.rglob("*")} - whole.keys():
            other.unlink(missing_ok=True) if other.is_file() else None
        for other, content in whole.items():
            other.parent.mkdir(exist_ok=True)
            other.write_bytes(data if other == path else content)
        read = store()
        read.read()
        for identity, row in zip(identities, rows, strict=True):
            if identity.key in read:
                np.testing.assert_array_equal(read.row(identity.key), row)
                found += 1
    assert found < 10 * TRIES


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
    for data in mutated(samples):
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
    survives(tmp_path / "y.tar.gz", [whole], lambda path: unpack(folder, path, flat=True))  # damage that gzip detects


def test_command_lines(tmp_path):
    rng = random.Random(0)
    values = ["", "1", "-1", "nan", "inf", "1e400", "[", "[1", "(0.5,", "'x'", "True", "\0", "é", "../..", "cuda:1"]
    files = ["{}", "a", "- 1", "TEST: [", "1: 2", "{[1]: 2}"]
    files += [f"TEST: {{SCALE_LIST: {value}}}" for value in ("{a: 1}", "[1, a]", "9" * 30)]
    files += [f"TEST: {{OUT_DIR: {value}}}" for value in values]
    config = tmp_path / "run.yaml"
    keys = [option.key for option in OPTIONS]
    for _ in range(TRIES):
        words = [rng.choice(keys + values) for _ in range(rng.randrange(1, 6))]
        if rng.random() < 0.3:
            config.write_text(rng.choice(files))
            words = ["--config-file", str(config), *words]
        with contextlib.suppress(InputError):
            CommandLine("").parse(words)
