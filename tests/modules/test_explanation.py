"""The explanation of a candidate's place adds up to the score of the reranker."""

import numpy as np
import pytest
import torch

from modules.explanation import explain
from modules.reranking import SuperGlobalReranker


def rows(n: int, d: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, d, generator=generator)
    values = centres[torch.arange(n) % 5] + torch.randn(n, d, generator=generator)
    return torch.nn.functional.normalize(values, dim=1)


def check(query, candidates, reranker, mask=None):
    """Compares the explanation of every present candidate with the order and scores of the reranker."""
    batch = None if mask is None else mask[None]
    order, scores = (each[0] for each in reranker(query[None], candidates[None], batch))
    for after, (before, score) in enumerate(zip(order.tolist(), scores.tolist(), strict=True)):
        if score == -torch.inf:
            continue
        why = explain(query, candidates, before, reranker, mask)
        assert (why.before, why.after) == (before, after)
        assert why.score == pytest.approx(score, abs=1e-6)
        assert (why.s1 + why.s2) / 2 == pytest.approx(score, abs=1e-6)
        assert why.cosine == pytest.approx(float(candidates[before] @ query), abs=1e-6)
        assert sum(each.weight for each in why.neighbours) == pytest.approx(1, abs=1e-6)
        assert why.s1 == pytest.approx(sum(each.weight * each.to_query for each in why.neighbours), abs=1e-6)
        refined = sum(each.weight * each.to_expanded for each in why.neighbours)
        s2 = refined if reranker.s2 == "refined" else why.neighbours[0].to_expanded
        assert why.s2 == pytest.approx(s2, abs=1e-6)
        assert why.neighbours[0].place == before
        there = range(len(candidates)) if mask is None else mask.nonzero().flatten().tolist()
        assert len(why.neighbours) == len({each.place for each in why.neighbours}) == min(reranker.k + 1, len(there))
        assert {each.place for each in why.neighbours} | set(why.expansion) <= set(there)
        assert len(why.expansion) == len(set(why.expansion)) == min(reranker.k + 1, len(there))


@pytest.mark.parametrize("s2", ["refined", "original"])
@pytest.mark.parametrize("m", [1, 2, 9, 10, 60])  # some below K + 1
def test_the_sums_are_the_rerankers_scores(m, s2):
    check(rows(1, seed=3)[0], rows(m), SuperGlobalReranker(m=60, s2=s2))


@pytest.mark.parametrize("present", [3, 30])
def test_absent_candidates_have_no_effect(present):
    mask = torch.zeros(40, dtype=torch.bool)
    mask[torch.randperm(40, generator=torch.Generator().manual_seed(1))[:present]] = True
    candidates = rows(40)
    candidates[~mask] = torch.nan
    check(rows(1, seed=3)[0], candidates, SuperGlobalReranker(m=40, k=5), mask)


def test_the_chosen_make_the_expanded_query():
    query, candidates = rows(1, seed=3)[0], rows(60)
    reranker = SuperGlobalReranker(m=60, k=4)
    every = [explain(query, candidates, place, reranker) for place in range(60)]
    chosen = every[0].expansion
    assert chosen == tuple(sorted(range(60), key=lambda place: -every[place].s1)[:5])
    refined = torch.stack(
        [sum(each.weight * candidates[each.place] for each in every[place].neighbours) for place in chosen]
    )
    expanded = refined.amax(dim=0)
    for why in every:
        assert why.neighbours[0].to_expanded == pytest.approx(float(expanded @ candidates[why.before]), abs=1e-5)


def test_only_the_first_m_are_explained():
    query, candidates = rows(1, seed=3)[0], rows(60)
    reranker = SuperGlobalReranker(m=20)
    assert explain(query, candidates, 19, reranker) == explain(query, candidates[:20], 19, reranker)
    for place in (20, -1):
        with pytest.raises(
            ValueError, match=f"there is no candidate at place {place}, counted from 0; 20 are reranked"
        ):
            explain(query, candidates, place, reranker)
    with pytest.raises(ValueError, match="there is no candidate at place 1"):
        explain(query, candidates, 1, reranker, torch.arange(60) != 1)


def test_arrays_are_accepted_and_the_input_is_not_modified():
    query, candidates = rows(1, seed=3)[0], rows(30)
    before = candidates.clone()
    why = explain(query.numpy(), candidates.numpy(), 7)
    assert why == explain(query, candidates, 7)
    assert type(why.s1) is type(why.neighbours[0].weight) is float
    np.testing.assert_array_equal(before, candidates)
