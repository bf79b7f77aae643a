import numpy as np
import pytest
import torch
from oracles import full_ranking

from modules.search import Database, _search_without_waiting, merged, search


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=-1, keepdim=True)


def test_search_gives_the_papers_ranking(reference):
    queries, database = (torch.from_numpy(reference[name]) for name in ("rerank_Q", "rerank_X"))
    found = search(queries, database, m=len(database))
    np.testing.assert_array_equal(found.ids.T, reference["retrieval_ranks"])


@pytest.mark.parametrize("chunk_size", [1, 7, 100, 1000])
def test_results_do_not_depend_on_the_chunk_size(chunk_size):
    queries, database = unit(5, 64), unit(300, 64, seed=1)
    database[[17, 120, 250]] = database[3].clone()  # ties, across the borders of chunks
    database[200] = 0
    listed = [torch.tensor([250, 3, 120, 17, 200]), torch.arange(300), torch.tensor([], dtype=torch.int64)] * 2
    ranking = torch.from_numpy(full_ranking(queries.numpy(), database.numpy()))

    found = search(queries, database, m=40, listed=listed[:5], chunk_size=chunk_size)

    assert torch.equal(found.ids, ranking[:, :40])
    places = ranking.argsort(dim=1)
    for row, numbers, positions in zip(places, listed, found.positions, strict=False):
        assert torch.equal(positions, row[numbers])


def random_problem(seed: int) -> tuple[torch.Tensor, Database, int, list[torch.Tensor]]:
    """Returns queries, a database of two parts (with ties in every third problem), m, and listed rows."""
    random = torch.Generator().manual_seed(seed)
    n, d, q, m = (int(torch.randint(*span, (1,), generator=random)) for span in ((1, 900), (2, 64), (1, 9), (1, 600)))
    rows = unit(n, d, seed=seed + 1)
    rows = rows[torch.randint(0, max(1, n // 5), (n,), generator=random)] if seed % 3 == 0 else rows
    rows = rows.half() if seed % 4 == 0 else rows
    listed = [torch.randperm(n, generator=random)[: seed % 40] for _ in range(q)]
    return unit(q, d, seed=seed), Database([rows[: n // 2], rows[n // 2 :]]), m, listed


def assert_equal(found, expected) -> None:
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.scores, expected.scores)
    assert all(torch.equal(*pair) for pair in zip(found.positions, expected.positions, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_merged_searches_of_parts_equal_the_search_of_all_rows(seed):
    queries, database, m, listed = random_problem(seed)
    n, count = len(database), 1 + seed % 7
    parts = [(n * i // count, n * (i + 1) // count) for i in range(count)]
    found = [search(queries, database, m, listed, chunk_size=50, rows=part) for part in parts]
    assert_equal(merged(found, m), search(queries, database, m, listed))


def test_invalid_ranges_of_rows_are_rejected():
    with pytest.raises(ValueError, match="rows must be ascending numbers from 0 to 10"):
        search(unit(1, 4), unit(10, 4), m=3, rows=(4, 11))


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_work_on_a_gpu_gives_the_same_result_to_the_bit(seed):
    queries, database, m, listed = random_problem(seed)
    n = len(database)
    found = _search_without_waiting(queries.double(), database, min(m, n), listed, 200, None, (0, n))
    assert_equal(found, search(queries, database, m, listed))


def test_more_near_ties_than_a_gpu_keeps_are_noticed():
    queries, database = unit(1, 32), Database(unit(1, 32, seed=1).repeat(3000, 1))
    assert _search_without_waiting(queries.double(), database, 20, [torch.arange(0)], 1000, None, (0, 3000)) is None


def test_equal_rows_keep_the_lower_number_first():
    database = unit(1, 2048).repeat(500, 1)
    found = search(unit(3, 2048, seed=1), database, m=100, listed=[torch.tensor([499, 0])] * 3, chunk_size=64)
    assert torch.equal(found.ids, torch.arange(100).repeat(3, 1))
    assert [where.tolist() for where in found.positions] == [[499, 0]] * 3


def test_more_ties_than_are_kept_still_give_the_lowest_numbers():
    query = unit(1, 32)
    database = unit(1, 32, seed=1).repeat(6000, 1)
    database[5990] = query[0]
    found = search(query, database, m=20, listed=[torch.tensor([5999])], chunk_size=1000)
    assert found.ids[0].tolist() == [5990, *range(19)]
    assert found.positions[0].item() == 5999


def test_scores_descend_and_are_cosines():
    queries, database = unit(4, 32), unit(50, 32, seed=1)
    found = search(queries, database, m=50)
    assert (found.scores.diff(dim=1) <= 0).all()
    torch.testing.assert_close(found.scores, (queries @ database.T).gather(1, found.ids))


def test_parts_are_numbered_as_if_concatenated():
    queries, database = unit(2, 16), unit(30, 16, seed=1)
    parts = Database([database[:11], database[11:12], database[12:]])
    assert torch.equal(search(queries, parts, m=30).ids, search(queries, database, m=30).ids)
    ids = torch.tensor([[29, 0], [11, 12]])
    assert torch.equal(parts.rows(ids), database[ids])


def test_half_precision_rows_are_searched_as_they_are():
    queries, database = unit(2, 16), unit(30, 16, seed=1).half()
    assert torch.equal(search(queries, database, m=30).ids, search(queries, database.float(), m=30).ids)


def test_m_above_the_size_of_the_database_gives_all():
    assert search(unit(2, 8), unit(5, 8, seed=1), m=400).ids.shape == (2, 5)


@pytest.mark.parametrize(
    ("queries", "database", "message"),
    [
        (unit(2, 8), unit(5, 9), r"queries must be \(Q, 9\)"),
        (unit(2, 8), torch.full((5, 8), float("nan")), "database row 0 .* not finite"),
        (unit(2, 8), torch.zeros(5, 8, dtype=torch.int64), "floating-point"),
        (unit(2, 8), unit(5), r"\(N, D\) tensors"),
    ],
)
def test_bad_input_is_rejected(queries, database, message):
    with pytest.raises(ValueError, match=message):
        search(queries, database, m=3)


def test_a_listed_row_outside_the_database_is_rejected():
    with pytest.raises(ValueError, match="outside the database of 5 rows"):
        search(unit(1, 8), unit(5, 8, seed=1), m=3, listed=[torch.tensor([5])])


@pytest.mark.parametrize("number", [-1, 10])
def test_a_missing_row_is_rejected(number):
    with pytest.raises(ValueError, match=f"there is no row {number}; the database has 10 rows"):
        Database([unit(4, 8), unit(6, 8)]).rows(torch.tensor([[3, number]]))


def test_rows_of_numpy_ids_are_numpy():
    database = Database([unit(4, 8), unit(6, 8)])
    ids = np.array([[1, 9], [4, 0]])
    np.testing.assert_array_equal(database.rows(ids), database.rows(torch.from_numpy(ids)).numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_ranks_of_listed_rows_are_those_of_the_results_in_every_dtype(dtype):
    rows = torch.nn.functional.normalize(torch.randn(300, 9, generator=torch.Generator().manual_seed(0)), dim=1)
    rows = rows.double() * (1 + 1e-9) if dtype == torch.float64 else rows.to(dtype)
    found = search(rows[:5].float(), Database(rows), 300, [torch.arange(300)] * 5)
    for ids, positions in zip(found.ids, found.positions, strict=True):
        assert torch.equal(positions[ids], torch.arange(300))
