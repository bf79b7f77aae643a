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
def test_reranking_is_the_dense_formulation(m):
    queries, candidates = clustered(3, 32, seed=1), torch.stack([clustered(m, 32, seed=s) for s in (2, 3, 4)])
    order = SuperGlobalReranker(m=60).forward(queries, candidates).order
    for row, query, rows in zip(order, queries, candidates, strict=True):
        assert row.tolist() == dense_reranking(query.numpy(), rows.numpy(), 9, 0.15).tolist()


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


@pytest.mark.parametrize(("m", "k", "beta"), [(5, 6, 0.1), (0, 0, 0.1), (5, 0, 0.1), (5, 3, -0.1)])
def test_settings_that_make_no_sense_are_refused(m, k, beta):
    with pytest.raises(ValueError, match="got"):
        SuperGlobalReranker(m, k, beta)


def test_shapes_that_do_not_fit_are_told():
    with pytest.raises(ValueError, match=r"got \(2, 16\) and \(2, 5, 8\)"):
        SuperGlobalReranker()(torch.rand(2, 16), torch.rand(2, 5, 8))


@pytest.mark.parametrize("m", [1, 10, 127, 128, 129, 400])
def test_the_gram_matrix_is_symmetric_and_exact(m):
    candidates = torch.stack([clustered(m, 64, seed) for seed in range(3)])
    gram = gram_matrices(candidates)
    assert torch.equal(gram, gram.transpose(1, 2))
    exact = candidates.double() @ candidates.double().transpose(1, 2)
    torch.testing.assert_close(gram.double(), exact, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("m", "k"), [(1, 1), (79, 10), (80, 10), (81, 40), (399, 10), (400, 1), (401, 41)])
def test_the_largest_are_those_of_a_sort(m, k):
    x = torch.randn(3, 7, m, generator=torch.Generator().manual_seed(m))
    values, indices = largest(x, k)
    expected = x.sort(dim=-1, descending=True)
    assert torch.equal(values, expected.values[..., :k])
    assert torch.equal(indices, expected.indices[..., :k])
