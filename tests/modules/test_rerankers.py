"""Every reranker of modules/ equals its textbook formulation, and has the common properties of rerankers."""

import re
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import (
    database_augmentation,
    diffusion_scores,
    k_reciprocal_scores,
    query_expansion,
    query_expansion_scores,
    superglobal_scores,
)
from torch import Tensor

from modules import (
    Database,
    DiffusionReranker,
    KReciprocalReranker,
    QueryExpansion,
    SuperGlobalReranker,
    augmented_rows,
    candidates,
    expansion,
)

M = 120  # some tests have more candidates, some fewer

# Per case: the reranker, its textbook formulation, and the settings of both.
SETTINGS = {
    "AQE": (QueryExpansion, query_expansion_scores, {"n": 5, "alpha": 0}),
    "alpha-QE": (QueryExpansion, query_expansion_scores, {"n": 10, "alpha": 3}),
    "alpha-QE, all candidates": (QueryExpansion, query_expansion_scores, {"n": M, "alpha": 0.5}),
    "k-reciprocal": (KReciprocalReranker, k_reciprocal_scores, {"k1": 9, "k2": 4, "lambda_value": 0.3}),
    "k-reciprocal, no means": (KReciprocalReranker, k_reciprocal_scores, {"k1": 5, "k2": 1, "lambda_value": 0}),
    "k-reciprocal, K > M": (KReciprocalReranker, k_reciprocal_scores, {"k1": 300, "k2": 200, "lambda_value": 0.5}),
    "diffusion": (DiffusionReranker, diffusion_scores, {"k": 7, "kq": 5, "gamma": 3, "alpha": 0.99}),
    "diffusion, K > M": (DiffusionReranker, diffusion_scores, {"k": 300, "kq": 300, "gamma": 0.5, "alpha": 0.9}),
    "SuperGlobal": (SuperGlobalReranker, superglobal_scores, {"k": 9, "beta": 0.15}),
    "SuperGlobal, original": (SuperGlobalReranker, superglobal_scores, {"k": 9, "beta": 0.15, "s2": "original"}),
    "SuperGlobal, K > M": (SuperGlobalReranker, superglobal_scores, {"k": M, "beta": 0.05}),
}
DEFAULTS = [
    QueryExpansion(),
    KReciprocalReranker(),
    DiffusionReranker(),
    SuperGlobalReranker(),
    SuperGlobalReranker(s2="original"),
]


def problem(kind: str, count: int, queries: int = 3) -> tuple[Tensor, Tensor]:
    """Returns unit queries (Q, D) and candidates (Q, M, D) in float64, with values that float32 can represent."""
    random = torch.Generator().manual_seed(count)
    shape = (queries, count, 64)
    centres = torch.randn(6, 64, generator=random)
    q = torch.randn(queries, 64, generator=random) + centres[:1]
    x = torch.randn(shape, generator=random) + (kind != "random") * centres[torch.arange(count) % 6]
    if kind == "ties":  # products of signs are exact, so that many are equal
        q, x = q.sign() * 8, x.sign() * 8
    q, x = F.normalize(q, dim=-1), F.normalize(x, dim=-1)
    if kind in ("ties", "duplicates"):
        x[:, 1::3] = x[:, :-1:3]
        x[:, 2::11] = 0
    return q.double(), x.double()


def scores_of(textbook: Callable, query: np.ndarray, rows: np.ndarray, **settings) -> np.ndarray:
    """Returns the textbook's scores of the rows. To k-reciprocal, rows of zeros are absent, and last."""
    scores, present = np.full(len(rows), -np.inf), rows.any(axis=1) | (textbook is not k_reciprocal_scores)
    scores[present] = textbook(query, rows[present], **settings)
    return scores


def assert_ranked(order: Tensor, scores: Tensor, expected: np.ndarray, tolerance: float) -> None:
    """Checks scores and order; places whose scores are within the tolerance may be swapped.

    The tolerance is relative to the largest score.
    """
    finite = expected[np.isfinite(expected)]
    tolerance *= np.abs(finite).max(initial=0)
    assert sorted(order.tolist()) == list(range(len(expected)))
    np.testing.assert_allclose(scores, expected[order], atol=tolerance, rtol=0)
    np.testing.assert_allclose(expected[order], -np.sort(-expected), atol=tolerance, rtol=0)
    if np.diff(np.sort(finite)).min(initial=np.inf) > 2 * tolerance:
        assert order.tolist() == np.argsort(-expected, kind="stable").tolist()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", ["random", "clustered", "equal"])
@pytest.mark.parametrize("count", [1, 40, 150])
def test_every_reranker_is_its_textbook_formulation(name, kind, count):
    make, textbook, settings = SETTINGS[name]
    if kind == "equal":  # SuperGlobal does not define which of several equally near rows is the neighbour
        kind = "duplicates" if make is SuperGlobalReranker else "ties"
    q, x = problem(kind, count)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        found = make(m=M, **settings)(q.to(dtype), x.to(dtype))
        for order, scores, query, rows in zip(found.order, found.scores, q.numpy(), x[:, :M].numpy(), strict=True):
            assert_ranked(order, scores, scores_of(textbook, query, rows, **settings), tolerance)


@pytest.mark.parametrize("name", SETTINGS)
def test_lists_of_any_length_are_reranked_from_ids_as_from_rows(name):
    make, textbook, settings = SETTINGS[name]
    reranker = make(m=M, **settings)
    q, x = problem("clustered", 200)
    rows = x[0]
    mask = torch.rand(3, 150, generator=torch.Generator().manual_seed(0)) < torch.tensor([[1.0], [0.5], [0.02]])
    ids = torch.stack([torch.randperm(200, generator=torch.Generator().manual_seed(query)) for query in range(3)])
    ids = ids[:, :150].masked_fill(~mask, -1)
    direct = reranker(q, rows[ids].masked_fill(~mask[..., None], torch.nan), mask)
    lists = [[f"image {number}" for number in row if number >= 0] for row in ids[:, :M].tolist()]
    names = reranker.rerank(q, lists, lambda wanted: rows[[int(each.split()[1]) for each in wanted]])
    fetched = reranker.rerank(q, ids, rows.__getitem__)
    for query in range(3):
        there = mask[query, :M].nonzero().squeeze(1)
        count, own = len(there), rows[ids[query, there]]
        expected = textbook(q[query].numpy(), own.numpy(), **settings)
        places = torch.searchsorted(there, direct.order[query, :count])
        assert_ranked(places, direct.scores[query, :count], expected, 1e-11)
        assert_ranked(names.order[query, :count], names.scores[query, :count], expected, 1e-11)
        assert (direct.scores[query, count:] == -torch.inf).all()
        assert torch.equal(fetched.order[query, :count], direct.order[query, :count])
        torch.testing.assert_close(fetched.scores[query, :count], direct.scores[query, :count], atol=1e-12, rtol=0)


@pytest.mark.parametrize("reranker", DEFAULTS, ids=repr)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_queries_of_a_block_do_not_depend_on_each_other(reranker, size, monkeypatch):
    q, x = problem("clustered", 90, queries=5)
    q[1:3], x[3] = -q[1:3], problem("random", 90)[1][0]
    together = reranker(q, x)
    monkeypatch.setattr(candidates, "_CPU_BYTES", size * 4 * 90 * 90)
    blocks = []

    def fetch(wanted: Tensor) -> Tensor:
        blocks.append(len(wanted) // 90)
        return x.flatten(0, 1)[wanted]

    found = reranker.rerank(q, torch.arange(450).view(5, 90), fetch)
    assert 1 <= blocks[0] <= size
    assert torch.equal(found.order, together.order)
    torch.testing.assert_close(found.scores, together.scores, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "reranker",
    [
        QueryExpansion(n=3, alpha=0),
        QueryExpansion(n=3, alpha=0.5),
        QueryExpansion(n=3),
        KReciprocalReranker(k1=4, k2=2),
        DiffusionReranker(k=4, kq=3),
        DiffusionReranker(k=4, kq=3, gamma=0.5, alpha=0.5),
        SuperGlobalReranker(m=12, k=3),
        SuperGlobalReranker(m=12, k=3, s2="original"),
    ],
    ids=repr,
)
def test_scores_have_the_right_gradients(reranker):
    random = torch.Generator().manual_seed(0)
    q, x = (F.normalize(torch.randn(2, *size, 6, generator=random).double(), dim=-1) for size in ((), (12,)))
    x[:, 4] = -q  # a similarity below 0, at the first absent place
    mask = torch.arange(12) < torch.tensor([[12], [9]])
    for there in (None, mask):

        def scores(q: Tensor, x: Tensor, there: Tensor | None = there) -> Tensor:
            return reranker(q, x, there).scores[:, :9]

        inputs = (q.clone().requires_grad_(), x.clone().requires_grad_())
        assert torch.autograd.gradcheck(scores, inputs, eps=1e-7, atol=1e-5, fast_mode=True)
    x[:, :3] = 0
    inputs = (q.requires_grad_(), x.requires_grad_())
    for gradient in torch.autograd.grad(reranker(*inputs, mask).scores[:, :9].square().sum(), inputs):
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(QueryExpansion, n=0), "n must"),
        (partial(QueryExpansion, n=401), "n <= m"),
        (partial(QueryExpansion, alpha=-1), "alpha"),
        (partial(SuperGlobalReranker, 5, 6), "k <= m"),
        (partial(SuperGlobalReranker, 5, 3, -0.1), "beta"),
        (partial(SuperGlobalReranker, s2="released"), "s2"),
        (partial(KReciprocalReranker, k1=0), "k1"),
        (partial(KReciprocalReranker, lambda_value=1.1), "lambda_value"),
        (partial(DiffusionReranker, k=0), "k must"),
        (partial(DiffusionReranker, alpha=1), "alpha"),
        (partial(DiffusionReranker, gamma=0), "gamma"),
        (partial(augmented_rows, torch.eye(3), k=0), "k must"),
        (partial(augmented_rows, torch.eye(3), out=torch.eye(2)), "(3, 3)"),
        (partial(augmented_rows, torch.eye(3) / 0), "query 0 and database row 0"),
    ],
)
def test_invalid_settings_are_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        make()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("reranker", DEFAULTS, ids=repr)
def test_the_row_that_is_not_finite_is_named(reranker):
    q, x = problem("random", 20)
    x[1, 17, 3] = torch.nan
    with pytest.raises(ValueError, match=r"^candidate 17 of query 1 has NaN or infinity, got"):
        reranker(q, x)
    with pytest.raises(ValueError, match=r"^the row with id 37, a candidate of query 1 has NaN or infinity, got"):
        reranker.rerank(q, torch.arange(60).view(3, 20), x.flatten(0, 1).__getitem__)
    q[2] = torch.nan
    with pytest.raises(ValueError, match=r"^query 2 has NaN or infinity, got"):
        reranker(q, x.nan_to_num())


def test_expanded_queries_are_the_textbooks():
    q, x = problem("clustered", 30)
    ids = torch.arange(90).view(3, 30)
    ids[0, 0::2], ids[1] = -1, -1
    found = QueryExpansion(n=5, alpha=2).expand(q.numpy(), ids.numpy(), x.flatten(0, 1).numpy().__getitem__)
    for query, vector, row in zip(q.numpy(), found, ids, strict=True):
        own = x.flatten(0, 1)[row[row >= 0]].numpy()
        np.testing.assert_allclose(vector, query_expansion(query, own, 5, 2), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["random", "clustered", "ties"])
@pytest.mark.parametrize(("k", "alpha"), [(1, None), (10, None), (10, 3), (4, 0), (500, None), (500, 1)])
def test_augmented_rows_are_the_textbooks(kind, k, alpha, monkeypatch, tmp_path):
    monkeypatch.setattr(expansion, "_ROWS", 32)
    monkeypatch.setattr(expansion, "_GATHER_BYTES", 4 * 64 * 11 * 7)
    rows = problem(kind, 80, queries=1)[1][0]
    expected = database_augmentation(rows.numpy(), k, alpha)
    database = Database(list(rows.float().split([30, 1, 49])))
    np.testing.assert_allclose(augmented_rows(rows, k, alpha), expected, atol=1e-6, rtol=0)
    file = np.lib.format.open_memmap(tmp_path / "rows.npy", "w+", np.float32, (80, 64))
    out = torch.from_numpy(file)
    assert augmented_rows(database, k, alpha, out=out) is out
    file.flush()
    np.testing.assert_allclose(np.load(tmp_path / "rows.npy"), expected, atol=1e-6, rtol=0)


def test_the_memory_of_the_database_is_not_overwritten():
    rows = torch.eye(6)
    with pytest.raises(ValueError, match="shares memory with the database"):
        augmented_rows(Database([rows[:2], rows[2:]]), out=rows)
    assert torch.equal(rows, torch.eye(6))


def test_an_image_that_was_skipped_is_last_and_has_no_effect_on_k_reciprocal():
    """With rows of both signs, its row of zeros is nearer to a query than half of the others."""
    q, x = problem("random", 90)
    x[0, :60] *= -(x[0, :60] @ q[0]).sign()[:, None]  # all but the last are unlike the query
    with_zeros, zeros = x.clone(), torch.tensor([0, 1, 7, 30, 64])
    with_zeros[:, zeros] = 0
    others = torch.tensor([place for place in range(90) if place not in zeros])
    reranker = KReciprocalReranker()
    found, expected = reranker(q, with_zeros), reranker(q, x[:, others])
    assert torch.equal(found.order[:, :85], others[expected.order])
    assert (found.order[:, 85:].sort().values == zeros).all()
    torch.testing.assert_close(found.scores[:, :85], expected.scores, atol=1e-12, rtol=0)


@pytest.mark.parametrize("reranker", DEFAULTS, ids=repr)
def test_an_image_that_was_skipped_is_last(reranker):
    """Its row is zero."""
    q, x = (each.abs() for each in problem("random", 90))
    x[:, [0, 1, 7, 30, 64]] = 0
    assert (reranker(q, x).order[:, 85:].sort().values == torch.tensor([0, 1, 7, 30, 64])).all()
