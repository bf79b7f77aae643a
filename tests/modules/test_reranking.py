import uuid

import numpy as np
import pytest
import torch

from modules.reranking import SuperGlobalReranker, largest
from modules.search import Database, search

SETTINGS = [(50, 9, 0.15), (400, 9, 0.15), (30, 3, 0.5)]


def clustered(n: int, d: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(8, d, generator=generator)
    rows = centres[torch.arange(n) % 8] + torch.randn(n, d, generator=generator)
    return rows / rows.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize(("m", "k", "beta"), SETTINGS)
def test_reranking_gives_the_papers_ranking(reference, m, k, beta):
    queries, rows = (torch.from_numpy(reference[name]) for name in ("rerank_Q", "rerank_X"))
    ids = search(queries, rows, m=len(rows)).ids
    order = SuperGlobalReranker(m, k, beta).rerank(queries, ids, Database(rows).rows).order
    ids[:, :m] = ids.gather(1, order)
    np.testing.assert_array_equal(ids.T, reference[f"rerank_ranks_M{m}_K{k}_b{beta}"])


def test_a_zero_row_does_not_borrow_the_score_of_another():
    candidates = clustered(40, 16)
    query = candidates[:1]
    candidates[20] = 0
    reranked = SuperGlobalReranker(m=40, k=5)(query, candidates[None])
    assert reranked.scores[0, reranked.order[0].tolist().index(20)] == 0


def test_the_largest_equal_topk_with_any_candidates_missing():
    random = np.random.default_rng(0)
    for _ in range(1500):
        m, k = int(random.integers(80, 460)), int(random.integers(1, 41))
        x = torch.from_numpy(
            random.integers(-3, 4, (2, m)) if random.random() < 0.3 else random.standard_normal((2, m))
        )
        x = x.float()
        there = int(random.integers(0, m + 1)) if random.random() < 0.5 else int(random.integers(0, 12))
        x[:, random.permutation(m)[there:]] = -torch.inf
        values, indices = largest(x, k)
        assert torch.equal(values, x.topk(k).values)
        assert torch.equal(x.gather(1, indices), values)
        assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.parametrize("kind", ["text", "object", "lists", "uuids"])
def test_ids_of_any_kind_are_accepted_and_each_is_fetched_once(kind):
    rows, queries = clustered(60, 32), clustered(3, 32, seed=1)
    ids = search(queries, rows, m=20).ids
    expected = SuperGlobalReranker(m=20).rerank(queries, ids, Database(rows).rows)
    names = [uuid.UUID(int=number) if kind == "uuids" else f"image_{number}" for number in range(60)]
    if kind in ("text", "object"):
        given = np.array(names, dtype=object if kind == "object" else None)[ids.numpy()]
    else:
        given = [[names[number] for number in row] for row in ids.tolist()]
        given[1] = given[1][:12] + [None] * 3
        ids[1, 12:] = -1
        expected = SuperGlobalReranker(m=20).rerank(queries, ids, Database(rows).rows)
    asked: list = []

    def fetch(wanted):
        asked.extend(wanted)
        return rows[[names.index(name) for name in wanted]]

    found = SuperGlobalReranker(m=20).rerank(queries, given, fetch)
    assert torch.equal(found.order, expected.order)
    for row, before, order in zip(found.ids, given, expected.order.tolist(), strict=True):
        first = [before[place] for place in order if place < len(before) and before[place] is not None]
        assert list(row)[: len(first)] == first
    if kind == "text":
        assert found.ids.dtype == given.dtype
    assert len(asked) == len(set(asked)) == len(ids[ids >= 0].unique())


def test_numpy_input_gives_numpy_output():
    rows, queries = clustered(60, 32), clustered(3, 32, seed=1)
    ids = search(queries, rows, m=20).ids
    reranker = SuperGlobalReranker(m=20)
    expected = reranker.rerank(queries, ids, Database(rows).rows)
    array = rows.numpy()
    unsigned = reranker.rerank(queries.numpy(), ids.numpy().astype(np.uint64), Database(rows).rows)
    array.flags.writeable = False  # as memory maps usually are
    kinds = []

    def fetch(wanted):
        kinds.append(type(wanted))
        return array[wanted]

    found = reranker.rerank(queries.numpy(), ids.numpy(), fetch)
    direct = reranker(queries.numpy(), array[ids.numpy()], np.ones((3, 20), dtype=bool))
    assert set(kinds) == {np.ndarray}
    for result in (found, direct, unsigned):
        assert isinstance(result.order, np.ndarray)
        np.testing.assert_array_equal(result.order, expected.order.numpy())
        np.testing.assert_allclose(result.scores, expected.scores.numpy(), atol=1e-6)


def test_half_precision_is_reranked_in_float32():
    queries, candidates = clustered(2, 16, seed=1).half(), clustered(60, 16).view(2, 30, 16).half()
    expected = SuperGlobalReranker()(queries.float(), candidates.float())
    assert torch.equal(SuperGlobalReranker()(queries, candidates).scores, expected.scores)


def test_an_empty_set_of_queries_is_valid():
    ids = torch.zeros(0, 5, dtype=torch.long)
    assert SuperGlobalReranker().rerank(torch.rand(0, 8), ids, torch.rand(9, 8).__getitem__).order.shape == (0, 5)


def test_rows_that_were_never_normalised_are_reported():
    with pytest.warns(UserWarning, match="of length"):
        SuperGlobalReranker()(20 * clustered(1, 16), clustered(20, 16)[None])


Q, X = clustered(2, 8, seed=1), clustered(20, 8).view(2, 10, 8)
NONE = torch.zeros(2, 0, dtype=torch.long)


@pytest.mark.parametrize(
    ("queries", "candidates", "mask", "message"),
    [
        (Q[0], X, None, r"got \(8,\) and \(2, 10, 8\)"),
        (Q, X[0], None, r"got \(2, 8\) and \(10, 8\)"),
        (Q, X[:, :, :4], None, r"got \(2, 8\) and \(2, 10, 4\)"),
        (Q, X[:, :0], None, r"no candidates to rerank: got \(2, 8\) and \(2, 0, 8\)"),
        (Q, X.long(), None, r"floating-point, got \(2, 8\) and \(2, 10, 8\) of torch.float32 and torch.int64"),
        (Q, X, torch.ones(2, 9, dtype=torch.bool), r"mask must be bool \(Q, M\), got torch.bool of shape \(2, 9\)"),
        (Q, X, torch.ones(2, 10), r"mask must be bool \(Q, M\), got torch.float32 of shape \(2, 10\)"),
        (Q.tolist(), X, None, "queries must be a tensor or a NumPy array, got list"),
        (np.array([["a"]]), X, None, r"queries: an array of <U1, shape \(1, 1\), cannot be converted"),
        (Q, np.ones((2, 10, 8), dtype=">f4"), None, "candidates: an array of >f4"),
    ],
)
@pytest.mark.filterwarnings("ignore:reranking expects descriptors of unit length")
def test_invalid_candidates_are_rejected(queries, candidates, mask, message):
    with pytest.raises(ValueError, match=message):
        SuperGlobalReranker()(queries, candidates, mask)


@pytest.mark.parametrize(
    ("queries", "ids", "fetch", "message"),
    [
        (Q, NONE, None, "fetch must be a function"),
        (Q, NONE, X.view(-1, 8).__getitem__, r"no candidates to rerank: got queries \(2, 8\) and ids \(2, 0\)"),
        (Q, torch.zeros(3, 4, dtype=torch.long), X.view(-1, 8).__getitem__, r"got queries \(2, 8\) and ids \(3, 4\)"),
        (Q, torch.zeros(2, 4), X.view(-1, 8).__getitem__, r"ids must be integers .* \(2, 4\) of torch.float32"),
        (Q, NONE.new_zeros(2, 4), lambda ids: X[0], r"fetch gave shape .* ids; queries have 8 dimensions"),
    ],
)
def test_invalid_ids_and_fetch_functions_are_rejected(queries, ids, fetch, message):
    with pytest.raises(ValueError, match=message):
        SuperGlobalReranker().rerank(queries, ids, fetch)
