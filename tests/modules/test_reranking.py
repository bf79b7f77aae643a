import uuid

import numpy as np
import pytest
import torch
from oracles import dense_reranking

from modules.reranking import SuperGlobalReranker, gram_matrices, largest, neighbour_weights, refined_scores
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


@pytest.mark.parametrize(("m", "k", "beta"), SETTINGS)
def test_refined_scores_are_the_papers(reference, m, k, beta):
    queries, rows = (torch.from_numpy(reference[name]) for name in ("rerank_Q", "rerank_X"))
    candidates = rows[search(queries, rows, m=m).ids]
    s1 = refined_scores(queries, candidates, *neighbour_weights(candidates, k, beta))
    np.testing.assert_allclose(s1.numpy(), reference[f"rerank_refined_scores_M{m}_K{k}_b{beta}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("m", [1, 2, 9, 10, 60])
@pytest.mark.parametrize("s2", ["refined", "original"])
def test_reranking_is_the_dense_formulation(m, s2):
    queries, candidates = clustered(3, 32, seed=1), torch.stack([clustered(m, 32, seed=s) for s in (2, 3, 4)])
    order = SuperGlobalReranker(m=60, s2=s2).forward(queries, candidates).order
    for row, query, rows in zip(order, queries, candidates, strict=True):
        assert row.tolist() == dense_reranking(query.numpy(), rows.numpy(), 9, 0.15, s2).tolist()


def test_the_two_kinds_of_s2_are_distinguished():
    queries, candidates = clustered(3, 32, seed=1), clustered(180, 32).view(3, 60, 32)
    refined, original = (SuperGlobalReranker(m=60, s2=s2)(queries, candidates) for s2 in ("refined", "original"))
    assert not torch.equal(refined.order, original.order)
    assert torch.equal(refined.scores, SuperGlobalReranker(m=60)(queries, candidates).scores)
    assert "s2=original" in repr(SuperGlobalReranker(s2="original"))
    with pytest.raises(ValueError, match="refined, original, got 'released'"):
        SuperGlobalReranker(s2="released")


def test_scores_descend():
    scores = SuperGlobalReranker()(clustered(3, 16), clustered(120, 16).view(3, 40, 16)).scores
    assert (scores.diff(dim=1) <= 0).all()


def test_queries_do_not_depend_on_each_other():
    queries, candidates = clustered(3, 16, seed=1), clustered(120, 16).view(3, 40, 16)
    reranker = SuperGlobalReranker()
    together = reranker(queries, candidates)
    for i in range(3):
        assert torch.equal(together.order[i], reranker(queries[i : i + 1], candidates[i : i + 1]).order[0])


def test_a_zero_row_does_not_borrow_the_score_of_another():
    candidates = clustered(40, 16)
    query = candidates[:1]
    candidates[20] = 0
    reranked = SuperGlobalReranker(m=40, k=5)(query, candidates[None])
    assert reranked.scores[0, reranked.order[0].tolist().index(20)] == 0


@pytest.mark.parametrize(
    ("m", "k", "beta"),
    [(5, 6, 0.1), (0, 0, 0.1), (5, 0, 0.1), (5, 3, -0.1), (5.0, 3, 0.1), (5, None, 0.1), (5, 3, "x")],
)
def test_invalid_settings_are_rejected(m, k, beta):
    with pytest.raises(ValueError, match="got"):
        SuperGlobalReranker(m, k, beta)


def test_shapes_that_do_not_fit_are_rejected():
    with pytest.raises(ValueError, match=r"got \(2, 16\) and \(2, 5, 8\)"):
        SuperGlobalReranker()(torch.rand(2, 16), torch.rand(2, 5, 8))


@pytest.mark.parametrize("m", [1, 10, 127, 128, 129, 400])
def test_the_gram_matrix_is_symmetric_and_exact(m):
    candidates = torch.stack([clustered(m, 64, seed) for seed in range(3)])
    gram = gram_matrices(candidates)
    assert torch.equal(gram, gram.transpose(1, 2))
    exact = candidates.double() @ candidates.double().transpose(1, 2)
    torch.testing.assert_close(gram.double(), exact, atol=1e-6, rtol=0)


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


@pytest.mark.parametrize("m", [81, 90, 100, 105, 110, 119, 120, 149, 150])
@pytest.mark.parametrize("count", [0, 1, 5, 9, 10])
def test_few_candidates_of_many_places_are_reranked(m, count):
    rows, queries = clustered(200, 32), clustered(2, 32, seed=1)
    ids = search(queries, rows, m=m).ids
    ids[0, count:] = -1
    found = SuperGlobalReranker(m=m).rerank(queries, ids, Database(rows).rows)
    assert sorted(found.order[0, :count].tolist()) == list(range(count))
    assert (found.scores[0, count:] == -torch.inf).all()


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
    assert len(asked) == len(set(asked)) == len(ids[ids >= 0].unique())


@pytest.mark.parametrize(("m", "k"), [(1, 1), (79, 10), (80, 10), (81, 40), (399, 10), (400, 1), (401, 41)])
def test_the_largest_are_those_of_a_sort(m, k):
    x = torch.randn(3, 7, m, generator=torch.Generator().manual_seed(m))
    values, indices = largest(x, k)
    expected = x.sort(dim=-1, descending=True)
    assert torch.equal(values, expected.values[..., :k])
    assert torch.equal(indices, expected.indices[..., :k])


def ragged(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns queries and candidates; candidates outside the mask are filled with NaN."""
    queries, candidates = clustered(len(mask), 32, seed=1), clustered(mask.numel(), 32).view(*mask.shape, 32)
    candidates[~mask] = torch.nan
    return queries, candidates


@pytest.mark.parametrize("counts", [(40, 40), (1, 40), (5, 0), (12, 3)])
@pytest.mark.parametrize("scattered", [False, True])
def test_a_query_with_fewer_candidates_is_reranked_as_if_alone(counts, scattered):
    mask = torch.arange(40) < torch.tensor(counts)[:, None]
    if scattered:
        mask = mask[:, torch.randperm(40, generator=torch.Generator().manual_seed(2))]
    queries, candidates = ragged(mask)
    reranker = SuperGlobalReranker()
    together = reranker(queries, candidates, mask)
    for q, there in enumerate(mask):
        count, places = int(there.sum()), there.nonzero().squeeze(1)
        if count:
            alone = reranker(queries[q : q + 1], candidates[q, there][None])
            assert together.order[q, :count].tolist() == places[alone.order[0]].tolist()
            torch.testing.assert_close(together.scores[q, :count], alone.scores[0])
        assert together.order[q, count:].tolist() == (~there).nonzero().squeeze(1).tolist()
        assert (together.scores[q, count:] == -torch.inf).all()


def test_ids_of_minus_one_are_not_candidates_and_never_fetched():
    rows, queries = clustered(60, 32), clustered(2, 32, seed=1)
    ids = search(queries, rows, m=20).ids
    ids[0, 12:] = -1
    ids[1, 3] = -1
    given = []

    def fetch(wanted):
        given.append(wanted)
        return rows[wanted]

    reranker = SuperGlobalReranker(m=20)
    found = reranker.rerank(queries, ids, fetch)
    expected = reranker(queries, rows[ids], ids >= 0)
    assert torch.equal(found.order, expected.order)
    assert torch.cat(given).min() >= 0
    assert ids.gather(1, found.order)[0, 12:].tolist() == [-1] * 8


def test_numpy_input_gives_numpy_output():
    rows, queries = clustered(60, 32), clustered(3, 32, seed=1)
    ids = search(queries, rows, m=20).ids
    reranker = SuperGlobalReranker(m=20)
    expected = reranker.rerank(queries, ids, Database(rows).rows)
    array = rows.numpy()
    array.flags.writeable = False  # as memory maps usually are
    kinds = []

    def fetch(wanted):
        kinds.append(type(wanted))
        return array[wanted]

    found = reranker.rerank(queries.numpy(), ids.numpy(), fetch)
    direct = reranker(queries.numpy(), array[ids.numpy()], np.ones((3, 20), dtype=bool))
    assert set(kinds) == {np.ndarray}
    for result in (found, direct):
        assert isinstance(result.order, np.ndarray)
        np.testing.assert_array_equal(result.order, expected.order.numpy())
        np.testing.assert_allclose(result.scores, expected.scores.numpy(), atol=1e-6)


def test_scores_have_gradients():
    queries, candidates = clustered(2, 6, seed=1).double(), clustered(24, 6).view(2, 12, 6).double()
    mask = torch.arange(12) < torch.tensor([[12], [7]])
    reranker = SuperGlobalReranker(m=12, k=3)
    for m in (None, mask):
        inputs = (queries.requires_grad_(), candidates.requires_grad_())
        torch.autograd.gradcheck(
            lambda q, x, m=m: reranker(q, x, m).scores[:, :7], inputs, eps=1e-7, atol=1e-5, fast_mode=True
        )


def test_only_the_first_m_candidates_are_used():
    queries, candidates = clustered(2, 16, seed=1), clustered(60, 16).view(2, 30, 16)
    found = SuperGlobalReranker(m=10)(queries, candidates)
    assert torch.equal(found.order, SuperGlobalReranker(m=10)(queries, candidates[:, :10]).order)


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
        (Q[:1], X, None, r"got \(1, 8\) and \(2, 10, 8\)"),
        (Q, X[:, :0], None, r"no candidates to rerank: got \(2, 8\) and \(2, 0, 8\)"),
        (Q, X.long(), None, r"floating-point, got \(2, 8\) and \(2, 10, 8\) of torch.float32 and torch.int64"),
        (Q, X * torch.nan, None, r"candidate 0 of query 0 has NaN or infinity, .* \(2, 10, 8\)"),
        (Q / 0, X, None, r"^query 0 has NaN or infinity, got \(2, 8\)"),
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


def test_the_row_that_is_not_finite_is_named():
    rows = clustered(60, 512)
    queries = clustered(200, 512, seed=1)
    ids = torch.arange(40).repeat(200, 1)
    broken = rows.clone()
    broken[17, 3] = torch.nan
    with pytest.raises(ValueError, match="the row with id 17, a candidate of query 0 has NaN"):
        SuperGlobalReranker().rerank(queries, ids, Database(broken).rows)
    queries[177] = torch.nan
    with pytest.raises(ValueError, match=r"^query 177 has NaN"):
        SuperGlobalReranker().rerank(queries, ids, Database(rows).rows)


def test_unsigned_ids_are_accepted():
    rows, queries = clustered(60, 32), clustered(2, 32, seed=1)
    ids = search(queries, rows, m=20).ids
    reranker = SuperGlobalReranker()
    expected = reranker.rerank(queries, ids, Database(rows).rows).order.numpy()
    found = reranker.rerank(queries.numpy(), ids.numpy().astype(np.uint64), Database(rows).rows)
    np.testing.assert_array_equal(found.order, expected)


@pytest.mark.parametrize(
    ("queries", "ids", "fetch", "message"),
    [
        (Q, NONE, None, "fetch must be a function"),
        (Q, NONE, X.view(-1, 8).__getitem__, r"no candidates to rerank: got queries \(2, 8\) and ids \(2, 0\)"),
        (Q, torch.zeros(3, 4, dtype=torch.long), X.view(-1, 8).__getitem__, r"got queries \(2, 8\) and ids \(3, 4\)"),
        (Q, torch.zeros(2, 4), X.view(-1, 8).__getitem__, r"ids must be integers .* \(2, 4\) of torch.float32"),
        (Q, torch.full((2, 4), -2), X.view(-1, 8).__getitem__, "ids must be integers from 0, or -1 for none"),
        (
            Q,
            torch.zeros(2, 4, dtype=torch.long),
            lambda ids: X[0],
            r"fetch gave shape .* ids; queries have 8 dimensions",
        ),
    ],
)
def test_invalid_ids_and_fetch_functions_are_rejected(queries, ids, fetch, message):
    with pytest.raises(ValueError, match=message):
        SuperGlobalReranker().rerank(queries, ids, fetch)
