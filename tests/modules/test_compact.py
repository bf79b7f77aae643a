import pytest
import torch

from modules.compact import Int8Rows
from modules.expansion import augmented_rows
from modules.search import Database, search


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_int8_rows_keep_their_length_and_almost_their_direction():
    rows = torch.cat([unit(50, 256), torch.zeros(1, 256), 3 * unit(1, 256, seed=1)])
    compact = Int8Rows.of(rows)
    assert (compact.values.dtype, compact.scales.dtype) == (torch.int8, torch.float32)
    torch.testing.assert_close(compact[:].norm(dim=1), rows.norm(dim=1))
    assert not compact[50:51].any()
    assert ((compact[:50] * rows[:50]).sum(dim=1) > 0.9999).all()
    steps = rows.abs().amax(dim=1, keepdim=True) / 127
    assert ((compact[:] - rows).abs() <= 0.6 * steps).all()


def test_a_database_of_int8_rows_is_searched_as_their_values_are():
    compact, plain = Int8Rows.of(unit(300, 32)), unit(20, 32, seed=1)
    stacked, queries = torch.cat([plain, compact[:]]), unit(5, 32, seed=2)
    database = Database([plain, compact])
    listed = [torch.tensor([3, 100, 319])] * 5
    ours, expected = (search(queries, each, 50, listed, chunk_size=64) for each in (database, stacked))
    assert torch.equal(ours.ids, expected.ids)
    assert torch.equal(ours.scores, expected.scores)
    assert all(torch.equal(a, b) for a, b in zip(ours.positions, expected.positions, strict=True))
    ids = torch.tensor([[0, 319], [25, 20]])
    assert torch.equal(database.rows(ids), stacked[ids])


def test_a_database_of_int8_rows_is_augmented_as_their_values_are():
    compact = Int8Rows.of(unit(40, 16))
    assert torch.equal(augmented_rows(Database(compact), k=3), augmented_rows(compact[:], k=3))


@pytest.mark.parametrize(
    ("values", "scales", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(3), "int8"),
        (torch.zeros(3, 4, dtype=torch.int8), torch.zeros(4), "3 rows need as many scales"),
        (torch.zeros(3, dtype=torch.int8), torch.zeros(3), "int8"),
    ],
)
def test_parts_that_do_not_fit_are_rejected(values, scales, message):
    with pytest.raises(ValueError, match=message):
        Int8Rows(values, scales)
