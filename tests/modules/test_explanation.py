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


QUERY = rows(1, seed=3)[0]


def check(candidates, reranker, mask=None):
    """Compares the explanation of every present candidate with its sums, and with the reranker's order and scores."""
    reranked = reranker(QUERY[None], candidates[None], None if mask is None else mask[None])
    order, scores = reranked.order[0], reranked.scores[0]
    present = set(range(len(candidates)) if mask is None else mask.nonzero().flatten().tolist())
    every = {place: explain(QUERY, candidates, place, reranker, mask) for place in present}
    count = min(reranker.k + 1, len(present))
    expansion = tuple(sorted(present, key=lambda place: (-every[place].s1, place))[:count])
    refined = {i: sum(each.weight * candidates[each.place] for each in every[i].neighbours) for i in present}
    expanded = torch.stack([refined[place] for place in expansion]).amax(dim=0)
    for after, before in enumerate(order.tolist()[: len(present)]):
        why, x = every[before], candidates[before]
        s2 = refined[before] @ expanded if reranker.s2 == "refined" else x @ expanded
        assert (why.before, why.after, why.expansion, why.s2_descriptors) == (before, after, expansion, reranker.s2)
        expected = [float(value) for value in (x @ QUERY, refined[before] @ QUERY, s2, scores[after])]
        assert [why.cosine, why.s1, why.s2, why.score] == pytest.approx(expected, abs=1e-5)
        assert (why.s1 + why.s2) / 2 == pytest.approx(why.score, abs=1e-6)
        assert sum(each.weight for each in why.neighbours) == pytest.approx(1, abs=1e-6)
        assert why.neighbours[0].place == before
        assert len(why.neighbours) == len({each.place for each in why.neighbours} & present) == count
        for each in why.neighbours:
            expected = [float(candidates[each.place] @ q) for q in (QUERY, expanded)]
            assert [each.to_query, each.to_expanded] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("s2", ["refined", "original"])
@pytest.mark.parametrize("m", [1, 2, 9, 10, 60])  # some below K + 1
def test_the_sums_are_the_rerankers_scores(m, s2):
    check(rows(m), SuperGlobalReranker(m=60, s2=s2))


@pytest.mark.parametrize("count", [3, 30])
def test_absent_candidates_have_no_effect(count):
    mask, candidates = torch.zeros(40, dtype=torch.bool), rows(40)
    mask[torch.randperm(40, generator=torch.Generator().manual_seed(1))[:count]] = True
    candidates[~mask] = torch.nan
    check(candidates, SuperGlobalReranker(m=40, k=5), mask)


def test_only_present_candidates_among_the_first_m_are_explained():
    candidates, reranker = rows(60), SuperGlobalReranker(m=20)
    assert explain(QUERY, candidates, 19, reranker) == explain(QUERY, candidates[:20], 19, reranker)
    for place, mask in ((20, None), (-1, None), (1, torch.arange(60) != 1)):
        with pytest.raises(ValueError, match="place"):
            explain(QUERY, candidates, place, reranker, mask)


def test_arrays_are_accepted_and_the_input_is_not_modified():
    candidates = rows(30)
    copy = candidates.clone()
    why = explain(QUERY.numpy(), candidates.numpy(), 7)
    assert why == explain(QUERY, candidates, 7)
    assert type(why.s1) is type(why.neighbours[0].weight) is float
    np.testing.assert_array_equal(copy, candidates)
