import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import latest
from drawn_descriptors import draw_descriptors

from model.errors import InputError
from modules.diffusion import DiffusionReranker
from modules.reranking import SuperGlobalReranker
from modules.search import Database
from revisitop.index import indexed, new_index
from revisitop.measures import NOT_FOUND
from revisitop.retrieve import rerank, retrieve


def clustered(count: int, dim: int = 32, seed: int = 0) -> torch.Tensor:
    """Unit descriptors around 20 centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((20, dim))
    rows = centres[rng.integers(0, 20, count)] + rng.standard_normal((count, dim))
    return torch.from_numpy((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))


@pytest.fixture
def database() -> Database:
    rows = clustered(1500)
    rows[700] = rows[3]  # equal rows keep the lower number first
    return Database([rows[:900], rows[900:]])


LISTED = [torch.tensor([3, 700, 1499]), torch.arange(1500), torch.tensor([], dtype=torch.int64)]


def test_a_flat_index_is_exact_search(database, tmp_path):
    queries = torch.cat([database.rows(torch.tensor([3])), clustered(2, seed=1)])
    exact = retrieve(queries, database, 100, LISTED)
    found = retrieve(queries, indexed(database, "Flat", tmp_path / "x", {}), 100, LISTED)
    assert torch.equal(found.ids, exact.ids)
    torch.testing.assert_close(found.scores, exact.scores, atol=1e-6, rtol=0)
    for ours, whole in zip(found.positions, exact.positions, strict=True):
        assert torch.equal(ours, torch.where(whole < 100, whole, NOT_FOUND))
    for reranker in (SuperGlobalReranker(m=50), DiffusionReranker(m=50)):
        assert torch.equal(
            rerank(found, reranker, queries, database).ids, rerank(exact, reranker, queries, database).ids
        )


@pytest.mark.parametrize("factory", ["IVF16,Flat", "HNSW16", "IVF16,PQ8x4", "SQ8"])
def test_exact_rows_are_sorted_by_their_cosine_and_decoded_ones_come_from_the_index(database, tmp_path, factory):
    queries = clustered(5, seed=1)
    exact = indexed(database, factory, tmp_path / "x", {})
    found = retrieve(queries, exact, 50)
    cosines = (queries.double()[:, None] * database.rows(found.ids).double()).sum(dim=2).float()
    assert torch.equal(found.scores, cosines)
    assert (found.scores.diff(dim=1) <= 0).all()
    assert torch.equal(exact.rows(found.ids), database.rows(found.ids))
    decoded = indexed(database, factory, tmp_path / "x", {}, decoded=True)
    rows = decoded.rows(found.ids)
    assert rows.shape == (5, 50, 32)
    torch.testing.assert_close(rows.norm(dim=2), torch.ones(5, 50))
    if "PQ" in factory:
        assert (rows - database.rows(found.ids)).abs().max() > 0.01
    assert (rows * database.rows(found.ids)).sum(dim=2).mean() > 0.5
    assert SuperGlobalReranker(m=50).rerank(queries, found.ids, decoded.rows).order.shape == (5, 50)


def test_more_lists_find_more_and_all_of_them_everything(database, tmp_path):
    queries, recalls = clustered(20, seed=1), []
    exact = retrieve(queries, database, 100).ids
    for parameters in ("nprobe=1", "", "nprobe=32"):
        found = retrieve(queries, indexed(database, "IVF32,Flat", tmp_path / "x", {}, parameters), 100)
        assert ((found.ids < 0) == (found.scores == -torch.inf)).all()
        same = [np.isin(a, b).mean() for a, b in zip(exact.numpy(), found.ids.numpy(), strict=True)]
        recalls.append(np.mean(same))
        rerank(found, SuperGlobalReranker(), queries, database)  # also if fewer than M are found
    assert recalls[0] < recalls[1] < recalls[2] == 1


def test_an_index_is_reused_only_for_the_same_rows(database, tmp_path, caplog):
    caplog.set_level("INFO")

    def outcome(*arguments) -> str:
        caplog.clear()
        indexed(*arguments)
        return "reused" if ": reused" in caplog.text else "built"

    file = tmp_path / "x.IVF8_Flat.faiss"
    assert outcome(database, "IVF8,Flat", tmp_path / "x", {"files": 1}) == "built"
    assert outcome(database, "IVF8,Flat", tmp_path / "x", {"files": 1}) == "reused"
    assert outcome(database, "IVF8,Flat", tmp_path / "x", {"files": 2}) == "built"
    assert outcome(Database(clustered(1400)), "IVF8,Flat", tmp_path / "x", {"files": 2}) == "built"
    file.write_bytes(file.read_bytes()[:-100])
    assert outcome(Database(clustered(1400)), "IVF8,Flat", tmp_path / "x", {"files": 2}) == "built"
    file.write_bytes(b"no index" + file.read_bytes()[8:])
    assert outcome(Database(clustered(1400)), "IVF8,Flat", tmp_path / "x", {"files": 2}) == "built"
    assert outcome(Database(clustered(1400)), "IVF8,Flat", tmp_path / "x", {"files": 2}) == "reused"
    outcome(Database(clustered(1400, seed=2)), "IVF8,Flat", tmp_path / "other", {"files": 2})
    shutil.copy2(tmp_path / "other.IVF8_Flat.faiss", file)
    assert outcome(Database(clustered(1400)), "IVF8,Flat", tmp_path / "x", {"files": 2}) == "built"


@pytest.mark.parametrize(
    ("factory", "parameters", "message"),
    [
        ("IVF4096,PQ64", "", "FAISS has no index 'IVF4096,PQ64' for 32 dimensions"),
        ("nonsense", "", "FAISS has no index 'nonsense' for 32 dimensions"),
        ("HNSW0", "", "'HNSW0' has a count of 0"),
        ("IVF4096,Flat", "", "1500 rows are too few, or unsuitable, to train the index IVF4096,Flat"),
        ("IVF8,Flat", "efSearch=3", "invalid parameters 'efSearch=3' for the index IVF8,Flat"),
    ],
)
def test_an_invalid_index_is_rejected(database, tmp_path, factory, parameters, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        indexed(database, factory, tmp_path / "x", {}, parameters)
    assert "\n" not in str(error.value)
    assert "/project/" not in str(error.value)


def test_an_index_that_cannot_decode_its_rows_is_rejected(database, tmp_path):
    indexed(database, "IVF8,PQ8x4fs", tmp_path / "x", {})
    with pytest.raises(InputError, match="the index IVF8,PQ8x4fs cannot decode its rows; use the exact ones"):
        indexed(database, "IVF8,PQ8x4fs", tmp_path / "x", {}, decoded=True)


def test_missing_faiss_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match="an index needs FAISS, which is not installed: pip install faiss-cpu"):
        new_index("Flat", 32)


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat"])
def test_a_row_or_a_query_with_nan_is_named(database, tmp_path, factory):
    queries = clustered(3)
    queries[1, 5] = torch.nan
    with pytest.raises(InputError, match="query 1"):
        retrieve(queries, indexed(database, factory, tmp_path / "x", {}), 5)
    database.parts[1][17, 3] = torch.nan
    with pytest.raises(InputError, match=r"database row 917 .* has NaN"):
        indexed(database, factory, tmp_path / "y", {})
    assert not list(tmp_path.glob("y*.json"))


# ---- in test.py and tools.rerank ----


@pytest.fixture
def evaluate(command, tmp_path):
    draw_descriptors(tmp_path / "data", tmp_path / "features", "new", 0)

    def run(*arguments):
        features = ("TEST.FEATURES", tmp_path / "features", "TEST.DATA_DIR", tmp_path / "data")
        outcome = command("test.py", *features, "TEST.DATASET_LIST", "new", *arguments)
        folder = latest(tmp_path / "work" / "output")
        ranks = [np.load(path) for path in sorted(folder.glob("new_*_ranks.npy"))] if outcome.code == 0 else []
        return outcome, ranks

    return run


def test_images_that_the_index_misses_count_as_never_found(evaluate, tmp_path):
    exact, _ = evaluate("TEST.RERANKER", "none")
    outcome, (ranks,) = evaluate("TEST.RERANKER", "none", "TEST.INDEX", "IVF12,Flat", "TEST.INDEX_SEARCH", "nprobe=1")
    assert outcome.code == 0, outcome.err
    lost = int(re.search(r"(\d+) of 120 images that metrics need are not among", outcome.out)[1])
    assert lost > 0
    assert (ranks == -1).any()
    values = [float(re.search(r"mAP E: ([\d.]+)", each.out)[1]) for each in (exact, outcome)]
    assert values[1] < values[0]
    facts = json.loads((latest(tmp_path / "work" / "output") / "results.json").read_text())["datasets"]["new"]
    assert facts["index"] == {"factory": "IVF12,Flat", "parameters": "nprobe=1", "rows": "exact"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("TEST.INDEX", "IVF8;Flat"), "TEST.INDEX: FAISS has no index 'IVF8;Flat' for 32 dimensions"),
        (("TEST.INDEX", "Flat", "TEST.RERANKER", "dba"), "TEST.RERANKER dba replaces all rows"),
    ],
)
def test_an_index_that_a_run_cannot_use_is_reported_in_one_line(evaluate, words, message):
    outcome, _ = evaluate(*words)
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith(f"error: {message}")
