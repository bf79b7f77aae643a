import pytest
import torch
from torch.nn.functional import normalize

from modules.whitening import Whitening

D = 12


def some_rows(n: int = 6) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.3


@pytest.fixture
def whitening() -> Whitening:
    random = torch.Generator().manual_seed(0)
    mean, projection = (torch.randn(*shape, D, generator=random, dtype=torch.float64) for shape in ((), (4,)))
    return Whitening(mean, projection)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_whitened_descriptors_are_p_times_x_minus_m_of_unit_length_in_their_dtype(whitening, dtype):
    x = some_rows().to(dtype)
    out = whitening(x)
    assert (out.shape, out.dtype) == ((6, 4), dtype)
    expected = normalize((x.double() - whitening.mean) @ whitening.projection.T, dim=1)
    torch.testing.assert_close(out, expected.to(dtype), atol=2e-6, rtol=torch.finfo(dtype).eps)
    torch.testing.assert_close(whitening.float()(x), out, atol=2e-5, rtol=torch.finfo(dtype).eps)


def test_half_precision_does_not_overflow():
    whitening = Whitening(torch.zeros(2), torch.tensor([[1e4, 0.0], [0.0, 1e4]]))
    out = whitening(torch.tensor([[300.0, 400.0]], dtype=torch.float16))
    torch.testing.assert_close(out.float(), torch.tensor([[0.6, 0.8]]), atol=1e-3, rtol=0)


def test_autocast_changes_nothing(whitening):
    x = some_rows().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = whitening.float()(x)
    assert torch.equal(inside, whitening(x))


def test_a_descriptor_does_not_depend_on_its_batch_which_may_be_empty(whitening):
    x = some_rows()
    torch.testing.assert_close(torch.cat([whitening(row[None]) for row in x]), whitening(x))
    assert whitening(x[:0]).shape == (0, 4)


def test_the_mean_becomes_zeros(whitening):
    assert torch.equal(whitening(whitening.mean[None]), torch.zeros(1, 4, dtype=torch.float64))


def test_a_whitening_says_its_widths(whitening):
    assert repr(whitening) == "Whitening(12 -> 4)"
    with pytest.raises(ValueError, match="13"):
        whitening(torch.ones(2, 13))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([torch.zeros(3)], "list"),
        ({"mean": torch.zeros(3)}, r"\['mean'\]"),
        ({"mean": torch.zeros(3), "projection": torch.zeros(2, 3), "P": torch.ones(1)}, "'P'"),
        ({"mean": torch.zeros(3), "projection": [[1.0]]}, "projection .* list"),
        ({"mean": torch.zeros(1, 3), "projection": torch.zeros(2, 3)}, r"mean .* \(1, 3\)"),
        ({"mean": torch.zeros(3), "projection": torch.zeros(0, 3)}, r"projection .* \(0, 3\)"),
        ({"mean": torch.zeros(3), "projection": torch.ones(3, 2)}, r"3 dimensions .* \(3, 2\)"),
        ({"mean": torch.zeros(3), "projection": torch.zeros(2, 3).long()}, "int64"),
        ({"mean": torch.full((3,), torch.inf), "projection": torch.zeros(2, 3)}, "mean .* finite"),
    ],
)
def test_an_invalid_state_of_a_whitening_is_rejected(state, message):
    with pytest.raises(ValueError, match=message):
        Whitening.from_state(state)


def test_a_file_of_a_whitening_may_say_what_it_was_learnt_from():
    state = {"mean": torch.zeros(3), "projection": torch.ones(2, 3), "learnt_from": {"dim": 2}}
    assert Whitening.from_state(state).dim == 2
