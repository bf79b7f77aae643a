"""A command learns whitening, and an option applies it to descriptors."""

import json
import re

import numpy as np
import pytest
from conftest import kept, latest
from sklearn.decomposition import PCA


@pytest.fixture
def words(layout, checkpoint_50) -> tuple:
    words = ("TEST.WEIGHTS", checkpoint_50, "TEST.DATA_DIR", layout.data_dir, "TEST.SCALE_LIST", 1)
    return (*words, "DATA_LOADER.NUM_WORKERS", 0)


def test_a_whitening_of_a_dataset_is_pca_applied_and_labelled(command, words, tmp_path):
    output = tmp_path / "work" / "output"
    outcome = command("tools/whiten.py", "--from", "roxford5k", "--dim", 8, "--out", "w.pth", *words)
    assert outcome.code == 0, outcome.err
    words = (*words, "TEST.DATASET_LIST", "roxford5k")
    assert command("test.py", *words).out.count("reused") == 1  # the database's descriptors
    plain = np.load(kept(output, "roxford5k") / "roxford5k_db.npy")
    outcome = command("test.py", *words, "MODEL.WHITENING", "w.pth")
    assert outcome.code == 0, outcome.err
    assert "was learnt on the database of roxford5k itself" in outcome.out
    rows = np.load(kept(output, "roxford5k") / "roxford5k_db.npy")
    expected = PCA(8, whiten=True, svd_solver="full").fit_transform(plain.astype(np.float64))
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    signs = np.sign((rows * expected).sum(axis=0))
    np.testing.assert_allclose(rows * signs, expected, atol=1e-4)
    entry = json.loads((latest(output) / "results.json").read_text())["datasets"]["roxford5k"]
    assert entry["whitening"]["learnt_on_the_test_set"] is True
    table = command("tools/tables.py", "main", "--depth", 50, *words, "MODEL.WHITENING", "w.pth")
    assert "whitening learnt on this database itself" in table.out


def test_invalid_input_of_a_whitening_is_rejected(command, words, tmp_path):
    outcome = command("tools/whiten.py", "--from", "roxford5k", "--dim", 100, "--out", "w.pth", *words)
    assert outcome.code == 2
    assert re.search(r"error: --dim 100: .*23", outcome.err)
    outcome = command(
        "tools/whiten.py", "--from", "roxford5k", "--dim", 8, "--out", "w.pth", "--discriminative", *words
    )
    assert (outcome.code, "needs classes" in outcome.err) == (2, True)


def test_a_file_of_descriptors_and_one_of_classes_make_a_discriminative_whitening(command, tmp_path, words):
    rng = np.random.default_rng(0)
    classes = np.arange(200) % 40
    rows = rng.standard_normal((40, 16))[classes] + 0.3 * rng.standard_normal((200, 16)) * np.linspace(0.1, 3, 16)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.save(tmp_path / "rows.npy", rows.astype(np.float32))
    (tmp_path / "classes.txt").write_text("".join(f"class {each}\n" for each in classes))
    learn = ("tools/whiten.py", "--from", tmp_path / "rows.npy", "--out", "w.pth")
    outcome = command(*learn, "--labels", tmp_path / "classes.txt", "--dim", 16)
    assert outcome.code == 0, outcome.err
    assert "discriminative whitening, 16 to 16 dimensions, from 200 descriptors" in outcome.out
    outcome = command("test.py", *words, "TEST.DATASET_LIST", "roxford5k", "MODEL.WHITENING", "w.pth")
    assert outcome.code == 2
    assert "takes descriptors of 16 dimensions, but these have 2048" in outcome.err
    (tmp_path / "classes.txt").write_text("one\n")
    outcome = command(*learn, "--labels", tmp_path / "classes.txt", "--dim", 16)
    assert "has 1 lines for 200 descriptors" in outcome.err
