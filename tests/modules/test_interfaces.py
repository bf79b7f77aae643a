"""What other programs rely on: whole rankings with scores, matrices of scores, trained powers, refusals that help."""

import math

import faiss
import numpy as np
import pytest
import torch
from torch import nn

from modules import GeM, GeMPlus, RegionalGeM, ScaleGeM, SuperGlobalReranker, attach, search
from modules.reranking import neighbour_weights

RANDOM = torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def vectors():
    """Queries (3, 16), a database (40, 16), and the first 30 results with their scores."""
    rows = nn.functional.normalize(torch.randn(43, 16, generator=RANDOM, dtype=torch.float64), dim=1)
    found = search(rows[:3], rows[3:], 30)
    return rows[:3], rows[3:], found.ids, found.scores


@pytest.mark.parametrize("with_scores", [True, False])
def test_the_whole_ranking_is_returned_with_scores_that_continue(vectors, with_scores):
    queries, rows, ids, scores = vectors
    reranker = SuperGlobalReranker(m=12, k=4)
    new = reranker.rerank(queries, ids, rows.__getitem__, scores=scores if with_scores else None)
    expected = reranker(queries, rows[ids[:, :12]])
    assert torch.equal(new.order, expected.order)
    assert torch.equal(new.scores[:, :12], expected.scores)
    assert torch.equal(new.ids[:, :12], ids.gather(1, expected.order))
    assert torch.equal(new.ids[:, 12:], ids[:, 12:])
    assert (new.scores.diff(dim=1)[:, 11:] < 0).all()
    if with_scores:  # the differences among the others are those of the search
        torch.testing.assert_close(
            new.scores[:, 12:].diff(dim=1), scores[:, 12:].diff(dim=1).double(), atol=1e-6, rtol=0
        )


def test_scores_of_the_search_that_are_low_enough_are_kept(vectors):
    queries, rows, ids, scores = vectors
    new = SuperGlobalReranker(m=12, k=4).rerank(queries, ids, rows.__getitem__, scores=scores - 9)
    assert torch.equal(new.scores[:, 12:], (scores - 9)[:, 12:].double())


@pytest.mark.parametrize("kind", [torch.Tensor, np.ndarray])
def test_a_matrix_of_scores_sorts_the_database_as_reranking_does(vectors, kind):
    queries, rows, *_ = vectors
    given = (queries, rows) if kind is torch.Tensor else (queries.numpy(), rows.numpy())
    reranker = SuperGlobalReranker(m=12, k=4)
    matrix = reranker.similarities(*given)
    assert isinstance(matrix, kind)
    assert matrix.shape == (3, 40)
    found = search(queries, rows, 40)
    expected = reranker.rerank(queries, found.ids, rows.__getitem__, scores=found.scores).ids
    assert torch.equal(torch.as_tensor(matrix).argsort(dim=1, descending=True, stable=True), expected)


def test_an_index_without_a_direct_map_is_refused_and_the_advice_works(vectors):
    queries, rows = (each.float().numpy() for each in vectors[:2])
    index = faiss.index_factory(16, "PCA8,IVF2,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(rows)
    index.add(rows)
    _, ids = index.search(queries, 10)
    reranker = SuperGlobalReranker(m=10, k=3)
    with pytest.raises(ValueError, match="make_direct_map"):
        reranker.rerank(queries, ids, index.reconstruct_batch)
    faiss.extract_index_ivf(index).make_direct_map()
    assert reranker.rerank(queries, ids, index.reconstruct_batch).ids.shape == (3, 10)


@pytest.mark.parametrize("kind", ["IVF2,Flat", "IDMap,Flat"])
def test_an_index_with_ids_of_its_own_is_refused_and_the_advice_works(vectors, kind):
    queries, rows = (each.float().numpy() for each in vectors[:2])
    numbers = np.arange(len(rows)) * 7 + 1000
    index = faiss.index_factory(16, kind, faiss.METRIC_INNER_PRODUCT)
    index.train(rows)
    index.add_with_ids(rows, numbers)
    _, ids = index.search(queries, 10)
    reranker = SuperGlobalReranker(m=10, k=3)
    with pytest.raises(ValueError, match="IndexIDMap2"):
        reranker.rerank(queries, ids, index.reconstruct_batch)
    if kind == "IDMap,Flat":
        index = faiss.IndexIDMap2(faiss.IndexFlatIP(16))
        index.add_with_ids(rows, numbers)
    else:
        faiss.extract_index_ivf(index).set_direct_map_type(faiss.DirectMap.Hashtable)
    assert {*reranker.rerank(queries, ids, index.reconstruct_batch).ids.flatten()} <= {*numbers, -1}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model, x: torch.jit.trace(model, x),
        lambda model, x: torch.jit.script(model),
        lambda model, x: torch.onnx.export(model, (x,), "unused.onnx", dynamo=False),
    ],
    ids=["trace", "script", "legacy ONNX"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_graph_that_would_be_wrong_at_other_sizes_is_refused(wrap, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = attach(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval())
    with pytest.raises(RuntimeError, match=r"torch\.export"):
        wrap(model, torch.rand(1, 3, 32, 48))


@pytest.mark.parametrize("p", [0.7, 3.0, 9.0])
@pytest.mark.parametrize("kind", [GeM, GeMPlus, RegionalGeM, ScaleGeM])
def test_a_power_that_is_a_parameter_is_trained(kind, p):
    layer = kind(nn.Parameter(torch.tensor(p, dtype=torch.float64)))
    assert [*layer.state_dict()] == ["p"]
    x = torch.rand(2, 3, 5, 6, generator=RANDOM, dtype=torch.float64).add(0.1)
    x = (x[..., 0] if kind is ScaleGeM else x).requires_grad_()

    def values(x, power):
        return torch.func.functional_call(layer, {"p": power}, x)

    torch.testing.assert_close(layer(x), kind(p)(x))
    assert torch.autograd.gradcheck(values, (x, layer.p), fast_mode=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).sum().backward()
    optimizer.step()
    assert layer.p.item() != p
    assert f"p={layer.p.item():g}" in repr(layer)


@pytest.mark.parametrize("bad", [torch.tensor([3.0, 4.0]), torch.tensor(-1.0), torch.tensor(math.inf)])
@pytest.mark.parametrize("kind", [GeM, ScaleGeM])
def test_an_invalid_parameter_is_refused(kind, bad):
    with pytest.raises(ValueError, match="power p"):
        kind(nn.Parameter(bad))


@pytest.mark.parametrize("p", [0.01, 0.5, 1, 3, 40])
@pytest.mark.parametrize(
    "v", [torch.randn(3, 2, 8, generator=RANDOM), torch.randn(1, 2, 8, generator=RANDOM), torch.ones(3, 2, 8)]
)
def test_the_gradient_of_scale_gem_is_finite(p, v):
    v = v.clone().requires_grad_()
    out = ScaleGeM(p)(v)
    out.sum().backward()
    assert v.grad.isfinite().all()
    shifted = (v - v.amin(dim=(0, 2), keepdim=True)).double()
    expected = shifted.pow(p).mean(dim=0).pow(1 / p) + v.amin(dim=(0, 2))[:, None]
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("similarity", [-0.2, -1 / 3, -0.5, -1.0])
def test_opposite_candidates_do_not_reverse_the_order(similarity):
    exact = torch.tensor([1.0, 0.0], dtype=torch.float64)
    other = torch.tensor([similarity, math.sqrt(1 - similarity**2)], dtype=torch.float64)
    found = SuperGlobalReranker(m=2, k=1, beta=3.0)(exact[None], torch.stack([other, exact])[None])
    assert found.order[0].tolist() == [1, 0]
    _, weights = neighbour_weights(torch.stack([exact, other])[None], 1, 3.0)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(1, 2, dtype=torch.float64))


def test_sorting_by_the_new_scores_gives_the_new_order_on_random_problems():
    rng = np.random.default_rng(0)
    for _ in range(300):
        q, n, d = (int(rng.integers(1, top)) for top in (4, 40, 9))
        m, dtype = int(rng.integers(1, n + 3)), rng.choice([np.float32, np.float64])
        rows = rng.standard_normal((n, d)).astype(dtype)
        rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True))[rng.integers(0, n, n)]  # equal rows tie
        queries, scale = rows[rng.integers(0, n, q)], rng.choice([1e-3, 1.0, 1e3])
        found = search(queries, rows, n)
        ids = np.where(np.arange(n) < rng.integers(0, n + 1, (q, 1)), found.ids, -1)  # an index may find fewer
        scores = None if rng.random() < 0.3 else scale * found.scores + rng.choice([-5, 0, 5])
        new = SuperGlobalReranker(m, min(m, 3)).rerank(queries, ids, rows.__getitem__, scores=scores)
        for before, after, values, order in zip(ids, new.ids, new.scores, new.order, strict=True):
            present, first = int((before >= 0).sum()), min(m, int((before >= 0).sum()))
            assert sorted(after[:first]) == sorted(before[:first])
            assert (after[first:] == before[first:]).all()
            assert (after[: len(order)] == before[order]).all()
            assert (np.diff(values[:present]) <= 0).all()
            assert (np.argsort(-values, kind="stable")[:present] == np.arange(present)).all()
            assert np.isneginf(values[present:]).all()
            if first < present and first:
                assert values[first] < values[first - 1]


@pytest.mark.parametrize("wrong", ["distances", "NaN"])
def test_scores_that_do_not_descend_are_refused(vectors, wrong):
    queries, rows, ids, scores = vectors
    scores = -scores if wrong == "distances" else scores.index_fill(1, torch.tensor([12]), torch.nan)
    with pytest.raises(ValueError, match="query 0"):
        SuperGlobalReranker(m=12, k=4).rerank(queries, ids, rows.__getitem__, scores=scores)


def test_a_network_shows_the_relu_plus_of_an_earlier_attach():
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.ReLU())
    first = attach(network, relup="0")
    assert "0.1: has ReLU+" in repr(attach(network))
    first.detach()
    assert "ReLU+" not in repr(attach(network))


def test_a_network_that_fails_at_another_scale_names_the_scale():
    class OneSize(nn.Module):
        def forward(self, x):
            assert x.shape[2:] == (32, 32), "wrong size"
            return x

    with pytest.raises(RuntimeError, match="resized"):
        attach(OneSize())(torch.rand(1, 3, 32, 32))
    assert attach(OneSize(), scales=(1.0,))(torch.rand(1, 3, 32, 32)).shape == (1, 3)
