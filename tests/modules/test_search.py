import warnings

import numpy as np
import pytest
import torch
from oracles import full_ranking

from modules.search import GRID, Database, NotFiniteError, SearchResult, merged, search

NONE = torch.empty(0, dtype=torch.int64)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=-1, keepdim=True)


def coarse(*shape: int, seed: int = 0) -> torch.Tensor:
    """Returns rows whose products are exact in every dtype, so that many tie."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)) / 4


def random_problem(seed: int) -> tuple[torch.Tensor, Database, int, list[torch.Tensor]]:
    """Returns queries, a database of two parts (with equal rows in every third problem), m, and listed rows."""
    random = torch.Generator().manual_seed(seed)
    n, d, q, m = (int(torch.randint(*span, (1,), generator=random)) for span in ((2, 9000), (2, 64), (1, 80), (1, 600)))
    rows = unit(n, d, seed=seed + 1)
    rows = rows[torch.randint(0, max(1, n // 5), (n,), generator=random)] if seed % 3 == 0 else rows
    rows = rows.half() if seed % 4 == 0 else rows
    listed = [torch.randperm(n, generator=random)[: seed % 40] for _ in range(q)]
    return unit(q, d, seed=seed), Database([rows[: n // 2], rows[n // 2 :]]), m, listed


def assert_equal(found: SearchResult, expected: SearchResult) -> None:
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.scores, expected.scores)
    assert all(map(torch.equal, found.positions, expected.positions))


def test_search_gives_the_papers_ranking(reference):
    queries, database = reference["rerank_Q"], reference["rerank_X"]
    np.testing.assert_array_equal(search(queries, database, m=len(database)).ids.T, reference["retrieval_ranks"])


@pytest.mark.parametrize("seed", range(12))
def test_the_ranking_is_that_of_float64_but_for_scores_closer_than_1e_6(seed):
    queries, database, m, listed = random_problem(seed)
    n = len(database)
    exact = queries.double() @ database.rows(torch.arange(n)).double().T
    found = search(queries, database, m, listed)
    torch.testing.assert_close(found.scores.double(), exact.gather(1, found.ids), atol=1e-6, rtol=0)
    best = exact.sort(dim=1, descending=True).values
    torch.testing.assert_close(found.scores.double(), best[:, :m], atol=1e-6, rtol=0)
    for ids, row, numbers, positions in zip(found.ids, exact, listed, found.positions, strict=True):
        assert len(ids.unique()) == min(m, n)
        scores = row[numbers][:, None]
        assert (positions >= (row > scores + 1e-6).sum(dim=1)).all()
        assert (positions < (row > scores - 1e-6).sum(dim=1)).all()


@pytest.mark.parametrize("queries", [1, 3, 70])
@pytest.mark.parametrize("n", [1, 2047, 2048, 2049, 16385, GRID + 1])
def test_ties_and_edges_of_chunks_are_the_oracles(queries, n):
    queries, rows = coarse(queries, 4), coarse(n, 4, seed=1)
    listed = [torch.tensor([0, n - 1, n // 2]), NONE, torch.arange(min(n, 300)).flip(0)] * len(queries)
    found = search(queries, rows, 40, listed[: len(queries)])
    ranking = torch.from_numpy(full_ranking(queries.numpy(), rows.numpy()))
    assert torch.equal(found.ids, ranking[:, :40])
    for places, numbers, positions in zip(ranking.argsort(dim=1), listed, found.positions, strict=False):
        assert torch.equal(positions, places[numbers])


@pytest.fixture
def threads():
    """Sets the number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dim", [3, 777, 2048])
@pytest.mark.parametrize("queries", [1, 5, 16, 40, 70, 129])
def test_equal_rows_tie_wherever_they_are_for_any_number_of_threads(queries, dim, threads):
    n, listed, found = 2100, torch.tensor([2099, 0, 255, 256, 1000]), []
    for count in (1, 2, 3):
        threads(count)
        found.append(search(unit(queries, dim), unit(1, dim, seed=1).repeat(n, 1), n, [listed] * queries))
    assert torch.equal(found[0].ids, torch.arange(n).repeat(queries, 1))
    assert all(torch.equal(positions, listed) for positions in found[0].positions)
    assert_equal(found[0], found[1])
    assert_equal(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [9, 2048])
def test_the_ranks_of_listed_rows_are_those_of_the_results(dtype, dim):
    rows = unit(700, dim)[torch.randint(0, 500, (700,), generator=torch.Generator().manual_seed(0))]
    rows = rows.double() * (1 + 1e-9) if dtype == torch.float64 else rows.to(dtype)
    found = search(rows[:5].float(), rows, 700, [torch.arange(700)] * 5)
    for ids, positions in zip(found.ids, found.positions, strict=True):
        assert torch.equal(positions[ids], torch.arange(700))
    assert_equal(search(rows[:5], rows.float(), 700, [torch.arange(700)] * 5), found)


@pytest.mark.parametrize("seed", range(12))
def test_merged_searches_of_ranges_are_the_search_of_all_rows_to_the_bit(seed):
    queries, database, m, listed = random_problem(seed)
    n, count = len(database), 1 + seed % 7
    found = [search(queries, database, m, listed, rows=(n * i // count, n * (i + 1) // count)) for i in range(count)]
    assert_equal(merged(found, m), search(queries, database, m, listed))


@pytest.mark.parametrize("places", [[700], [0, 3, 2048], list(range(0, 2500, 100))])
def test_parts_are_searched_as_if_concatenated(places):
    queries, rows = unit(3, 16), unit(2500, 16, seed=1)
    parts, listed = Database(list(rows.tensor_split(places))), [torch.tensor([0, 700, 2499])] * 3
    assert_equal(search(queries, parts, 50, listed), search(queries, rows, 50, listed))
    ids = torch.tensor([[2499, 0], [700, 699]])
    assert torch.equal(parts.rows(ids), rows[ids])
    np.testing.assert_array_equal(parts.rows(ids.numpy()), rows[ids].numpy())


def test_read_only_memory_maps_are_searched_in_place_and_arrays_give_arrays(tmp_path):
    queries, rows = unit(3, 16), unit(100, 16, seed=1)
    np.save(tmp_path / "rows.npy", rows.numpy())
    array = np.load(tmp_path / "rows.npy", mmap_mode="r")
    database = Database([array, rows])
    assert database.parts[0].data_ptr() == array.ctypes.data
    listed = [np.array([150, 7])] * 3
    found, expected = search(queries.numpy(), database, 9, listed), search(queries, torch.cat([rows, rows]), 9, listed)
    assert isinstance(found.ids, np.ndarray)
    for ours, other in zip([*found[:2], *found[2]], [*expected[:2], *expected[2]], strict=True):
        np.testing.assert_array_equal(ours, other.numpy())


@pytest.mark.parametrize(("queries", "n", "m", "shape"), [(2, 5, 400, (2, 5)), (0, 5, 3, (0, 3)), (2, 0, 3, (2, 0))])
def test_all_rows_are_found_if_there_are_fewer_than_m_even_none(queries, n, m, shape):
    found = search(unit(queries, 8), unit(n, 8), m, [NONE] * queries)
    assert found.ids.shape == found.scores.shape == shape
    assert [len(positions) for positions in found.positions] == [0] * queries


def test_each_row_is_reported_once():
    counts = []
    search(unit(1, 8), unit(2 * GRID + 5, 8), 3, on_chunk=counts.append, rows=(7, 2 * GRID + 1))
    assert sum(counts) == 2 * GRID - 6


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("row", [0, GRID + 3])
def test_a_row_that_is_not_finite_is_named(value, row):
    rows = unit(GRID + 9, 4)
    rows[row, 2] = value
    with pytest.raises(NotFiniteError) as error:
        search(torch.ones(2, 4), rows, 3)
    assert (error.value.query, error.value.row) == (0, row)


def test_a_query_that_is_not_finite_is_named():
    queries = unit(3, 4)
    queries[1, 0] = torch.nan
    with pytest.raises(NotFiniteError) as error:
        search(queries, unit(9, 4), 3)
    assert (error.value.query, error.value.row) == (1, 0)


@pytest.mark.parametrize(
    ("queries", "database", "message"),
    [
        (unit(2, 8), unit(5, 9), r"\(Q, 9\)"),
        (unit(2, 8), torch.zeros(5, 8, dtype=torch.int64), "floating-point"),
        (unit(2, 8), unit(5), r"\(N, D\)"),
        (unit(2, 8), [unit(5, 8), unit(5, 9)], "equal D"),
        (unit(2, 8), [], r"\(N, D\)"),
    ],
)
def test_bad_input_is_rejected(queries, database, message):
    with pytest.raises(ValueError, match=message):
        search(queries, database, m=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"m": 0}, "m"),
        ({"rows": (4, 11)}, "rows"),
        ({"listed": [torch.tensor([10])]}, "outside"),
        ({"listed": [torch.tensor([-1])]}, "outside"),
        ({"listed": []}, "1 lists"),
    ],
)
def test_numbers_outside_the_database_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        search(unit(1, 4), unit(10, 4), **{"m": 3, **options})


@pytest.mark.parametrize(
    ("ids", "message"), [([-1], "no row -1"), ([10], "no row 10"), ([1.0], "integers"), ([True], "integers")]
)
def test_numbers_that_are_no_rows_are_rejected(ids, message):
    for numbers in (torch.tensor(ids), np.array(ids)):
        with pytest.raises(ValueError, match=message):
            Database([unit(4, 8), unit(6, 8)]).rows(numbers)


def test_rows_that_are_not_of_unit_length_are_warned_of():
    rows = unit(100, 8)
    with pytest.warns(UserWarning, match="length"):
        search(rows[:2], 2 * rows, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search(rows[:2], rows, 5)
        search(2 * rows[:2], 0.5 * rows, 5)  # a lossy index shortens rows; the length of a query changes no order
