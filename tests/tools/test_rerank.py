import numpy as np
import pytest
import torch
from conftest import latest
from drawn_descriptors import draw_descriptors


@pytest.fixture
def vectors(tmp_path):
    """Queries (12, 32) and a database (120, 32)."""
    draw_descriptors(tmp_path / "data", tmp_path / "features", "new", 0)
    return [tmp_path / "features" / f"new_{kind}.npy" for kind in ("query", "db")]


@pytest.fixture
def rerank(command, vectors, tmp_path):
    def run(*arguments, queries=vectors[0], database=vectors[1]):
        out = tmp_path / "ranks.npy"
        return command("tools/rerank.py", "--queries", queries, "--database", database, "--out", out, *arguments)

    return run


def order(tmp_path) -> np.ndarray:
    return np.load(tmp_path / "ranks.npy")


@pytest.mark.parametrize("name", ["superglobal", "aqe", "alpha-qe", "dba", "k-reciprocal", "diffusion", "none"])
def test_the_order_equals_that_of_test_py(rerank, command, tmp_path, name):
    outcome = rerank("--reranker", name)
    assert outcome.code == 0, outcome.err
    features = ("TEST.FEATURES", tmp_path / "features", "TEST.DATA_DIR", tmp_path / "data", "TEST.DATASET_LIST", "new")
    assert command("test.py", *features, "TEST.RERANKER", name).code == 0
    stage = "retrieval" if name == "none" else "reranking"
    expected = np.load(latest(tmp_path / "work" / "output") / f"new_{stage}_ranks.npy")
    ours = order(tmp_path)
    assert ours.dtype == np.int64
    assert ours.shape == (12, 120)
    assert (ours == expected).all()


def test_a_large_database_gives_the_first_400(rerank, tmp_path):
    rows = np.random.default_rng(0).standard_normal((1000, 8))
    np.save(tmp_path / "rows.npy", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    torch.save(torch.from_numpy(np.load(tmp_path / "rows.npy")[:5]), tmp_path / "queries.pth")
    outcome = rerank("SupG.rerank_m", 50, queries=tmp_path / "queries.pth", database=tmp_path / "rows.npy")
    assert outcome.code == 0, outcome.err
    ours, cosine = order(tmp_path), rows[:5] @ rows.T
    cosine /= np.linalg.norm(rows, axis=1)
    assert ours.shape == (5, 400)
    assert (ours[:, 50:] == np.argsort(-cosine, axis=1)[:, 50:400]).all()


@pytest.mark.parametrize("name", ["superglobal", "alpha-qe", "diffusion"])
def test_given_candidates_are_reranked_and_nothing_else_is_read(rerank, vectors, tmp_path, name):
    queries, rows = map(np.load, vectors)
    words = ("--reranker", name, "SupG.rerank_m", 30)
    assert rerank(*words).code == 0
    whole = order(tmp_path)
    ids = np.argsort(-(queries @ rows.T), axis=1)[:, :30]
    ids[3, 20:] = -1  # an index may find fewer
    np.save(tmp_path / "ids.npy", ids)
    outcome = rerank(*words, "--ids", tmp_path / "ids.npy")
    assert outcome.code == 0, outcome.err
    ours = order(tmp_path)
    assert ours.shape == (12, 30)
    for query, row in enumerate(ours):
        assert sorted(row.tolist()) == sorted(ids[query].tolist())
        if query != 3 and name != "alpha-qe":
            assert (row == whole[query, :30]).all()
    assert (ours[3, 20:] == -1).all()


def test_rows_of_another_length_are_normalised_with_a_line(rerank, vectors, tmp_path):
    assert rerank().code == 0
    expected = order(tmp_path)
    long = [tmp_path / path.name for path in vectors]
    for path, copy in zip(vectors, long, strict=True):
        rows = np.load(path)
        np.save(copy, rows * np.linspace(0.5, 20, len(rows))[:, None])
    outcome = rerank(queries=long[0], database=long[1])
    assert outcome.code == 0, outcome.err
    assert f"{long[1]}: 120 of 120 rows are not of unit length; they are normalised" in outcome.out
    assert (order(tmp_path) == expected).all()
    np.save(tmp_path / "ids.npy", expected)
    assert rerank("--ids", tmp_path / "ids.npy").code == 0
    expected = order(tmp_path)
    assert rerank("--ids", tmp_path / "ids.npy", queries=long[0], database=long[1]).code == 0
    assert (order(tmp_path) == expected).all()


def test_bad_vectors_are_refused_and_an_older_result_is_kept(rerank, vectors, tmp_path):
    assert rerank().code == 0
    before = order(tmp_path)
    rows = np.load(vectors[1])
    rows[7, 3] = np.nan
    one = np.zeros((12, 1), dtype=int)
    files = {"nan": rows, "wide": np.eye(40, dtype=np.float32), "whole": np.zeros((3, 32), dtype=int)}
    files |= {"one": one, "twice": np.zeros((12, 2), dtype=int), "far": one + 120}
    for name, array in files.items():
        np.save(tmp_path / f"{name}.npy", array)
    for arguments, database, noun in (
        ((), "nan.npy", "row 7"),
        ((), "wide.npy", "dimensions"),
        ((), "whole.npy", "whole.npy"),
        ((), "absent.npy", "absent.npy"),
        (("--ids", tmp_path / "twice.npy"), vectors[1], "query 0"),
        (("--ids", tmp_path / "far.npy"), vectors[1], "119"),
        (("--ids", vectors[0]), vectors[1], "whole numbers"),
        (("--reranker", "dba", "--ids", tmp_path / "one.npy"), vectors[1], "--ids"),
        (("TEST.INDEX", "Flat", "--ids", tmp_path / "one.npy"), vectors[1], "TEST.INDEX"),
        (("--reranker", "cvnet"), vectors[1], "cvnet"),
        (("--out", tmp_path / "none" / "x.npy"), vectors[1], "none"),
    ):
        outcome = rerank(*arguments, database=tmp_path / database)
        assert outcome.code == 2, noun
        assert noun in outcome.err
        assert outcome.err.count("error: ") == 1
    assert (order(tmp_path) == before).all()
