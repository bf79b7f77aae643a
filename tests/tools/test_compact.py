import json
import re

import numpy as np
import pytest
import torch
from drawn_descriptors import draw_descriptors

from extraction.store import write_json


@pytest.fixture
def vectors(tmp_path):
    """Unit descriptors (5000, 64), as a .pth file with its provenance."""
    rows = torch.randn(5000, 64, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "rows.pth"
    torch.save(torch.nn.functional.normalize(rows, dim=1), path)
    write_json(tmp_path / "rows.pth.json", {"depth": 50})
    return path


@pytest.fixture
def compact(command, tmp_path):
    def run(file, dtype: str, out=tmp_path / "small.npy"):
        return command("tools/compact.py", file, "--dtype", dtype, "--out", out)

    return run


@pytest.mark.parametrize(("dtype", "size", "most"), [("float16", 128, 1e-3), ("int8", 68, 2e-2)])
def test_compact_rows_are_smaller_and_the_loss_is_reported(compact, vectors, tmp_path, dtype, size, most):
    outcome = compact(vectors, dtype)
    assert outcome.code == 0, outcome.err
    assert f"5000 rows of 64 as {dtype}" in outcome.out
    assert f", {size} bytes per image" in outcome.out
    largest, mean, kept = map(
        float, re.search(r"cosine: (\S+) at most, (\S+) on average; of the first 10, (\S+) stay", outcome.out).groups()
    )
    assert 0 < mean < largest < most
    assert 9 < kept <= 10
    rows, small = torch.load(vectors), np.load(tmp_path / "small.npy").astype(np.float32)
    if dtype == "int8":
        small = small * np.load(tmp_path / "small.scale.npy")[:, None]
    queries = rows[torch.linspace(0, 4999, 100).long()].double()
    errors = (queries @ (rows.double() - torch.from_numpy(small).double()).T).abs()
    assert largest == pytest.approx(float(errors.max()), rel=0.1)
    assert mean == pytest.approx(float(errors.mean()), rel=0.1)
    assert json.loads((tmp_path / "small.npy.json").read_text()) == {"depth": 50, "dtype": dtype}


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_compact_rows_are_distractors_and_a_database(compact, command, vectors, tmp_path, dtype):
    draw_descriptors(tmp_path / "data", tmp_path / "features", "new", 0, dim=64)
    assert compact(vectors, dtype).code == 0
    words = ("TEST.FEATURES", tmp_path / "features", "TEST.DATA_DIR", tmp_path / "data", "TEST.DATASET_LIST", "new")
    maps = []
    for file in (vectors, tmp_path / "small.npy"):
        outcome = command("test.py", *words, "SupG.onemeval", "TEST.DISTRACTORS", file)
        assert outcome.code == 0, outcome.err
        maps.append([float(value) for value in re.findall(r"[EMH]: ([\d.]+)[,\n]", outcome.out)])
    assert maps[0] == pytest.approx(maps[1], abs=1)
    queries = tmp_path / "features" / "new_query.npy"
    words = ("--queries", queries, "--database", tmp_path / "small.npy", "--out", tmp_path / "ranks.npy")
    outcome = command("tools/rerank.py", *words, "--reranker", "none")
    assert outcome.code == 0, outcome.err
    best = np.argsort(-(np.load(queries) @ torch.load(vectors).numpy().T), axis=1)[:, 0]
    assert (np.load(tmp_path / "ranks.npy")[:, 0] == best).mean() > 0.8


def test_bad_input_is_reported_in_one_line(compact, vectors, tmp_path):
    rows = torch.load(vectors).numpy()
    rows[7, 3] = np.nan
    np.save(tmp_path / "nan.npy", rows)
    np.save(tmp_path / "long.npy", 2 * torch.load(vectors).numpy())
    for file, out, message in (
        (tmp_path / "nan.npy", "a.npy", "row 7 (from 0) has NaN or infinity"),
        (tmp_path / "long.npy", "a.npy", "its rows are not of unit length"),
        (vectors, "a.pth", "must end in .npy: rows are written in NumPy's format"),
        (tmp_path / "nan.npy", "nan.npy", "is the input file: give another name"),
        (vectors, "nowhere/a.npy", "cannot be written (No such file or directory)"),
        (tmp_path / "none.npy", "a.npy", "No such file"),
    ):
        outcome = compact(file, "int8", tmp_path / out)
        assert outcome.code == 2, outcome.err
        assert message in outcome.err.splitlines()[-1]
    assert not list(tmp_path.glob("a*"))
    assert not list(tmp_path.glob("*.new"))


def test_int8_rows_without_their_scales_are_refused(compact, command, vectors, tmp_path):
    assert compact(vectors, "int8").code == 0
    words = ("--queries", vectors, "--database", tmp_path / "small.npy", "--out", tmp_path / "ranks.npy")
    np.save(tmp_path / "small.scale.npy", np.ones(3, dtype=np.float32))
    outcome = command("tools/rerank.py", *words)
    assert outcome.code == 2
    assert "small.scale.npy must hold a float32 scale for each of the 5000 rows" in outcome.err
    (tmp_path / "small.scale.npy").unlink()
    outcome = command("tools/rerank.py", *words)
    assert outcome.code == 2
    assert "small.scale.npy: No such file" in outcome.err
