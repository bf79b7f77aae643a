import math
import re

import numpy as np
import pytest
import torch

from modules.activation import ReLUPlus
from modules.pooling import GeM, GeMPlus, RegionalGeM, ScaleGeM


@pytest.mark.parametrize(
    ("layer", "given", "expected"),
    [
        (RegionalGeM(), "pool_in", "rgem_out"),
        (GeMPlus(), "pool_in", "gemp_out"),
        (GeM(p=3.0), "pool_in", "gem3_out"),
        (ScaleGeM(), "sgem_in", "sgem_max_out"),
        (ScaleGeM(p=10), "sgem_in", "sgem_p10_out"),
        (ReLUPlus(), "relup_in", "relup_out"),
    ],
)
def test_layer_computes_the_papers_values(reference, layer, given, expected):
    out = layer(torch.from_numpy(reference[given]))
    np.testing.assert_allclose(out.numpy(), reference[expected], atol=2e-6, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 2), (2, 2), (3, 3), (40, 3)])
def test_regional_gem_takes_maps_of_any_size(size):
    x = torch.rand(2, 4, *size)
    out = RegionalGeM()(x)
    assert out.shape == x.shape
    assert torch.isfinite(out).all()


def test_regional_gem_pads_a_small_map_by_replication():
    x = torch.rand(1, 1, 2, 6)
    replicated = torch.nn.functional.pad(x, (2, 2, 2, 2), mode="replicate")
    window = replicated[0, 0, 0:5, 1:6]  # around position (0, 1)
    local = window.pow(2.5).mean().pow(1 / 2.5)
    torch.testing.assert_close(RegionalGeM()(x)[0, 0, 0, 1], (x[0, 0, 0, 1] + local) / 2)


@pytest.mark.parametrize("layer", [GeM(), GeMPlus(), RegionalGeM(), ScaleGeM(), ReLUPlus()])
def test_layers_have_no_state_to_load(layer):
    assert layer.state_dict() == {}


@pytest.mark.parametrize("p", [0, -1, math.nan, math.inf])
def test_an_invalid_power_is_rejected(p):
    with pytest.raises(ValueError, match="p must be a positive, finite number"):
        GeM(p)


def test_an_even_window_is_refused():
    with pytest.raises(ValueError, match="odd and positive, got 4"):
        RegionalGeM(window=4)


@pytest.mark.parametrize("layer", [GeM(), GeMPlus(), RegionalGeM()])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.rand(2, 8, 7), r"takes a tensor \(N, C, H, W\), got shape \(2, 8, 7\)"),
        (torch.rand(2, 8, 0, 7), r"non-empty tensor .*got shape \(2, 8, 0, 7\)"),
        (torch.ones(2, 8, 7, 7, dtype=torch.long), r"a floating-point tensor, got torch.int64 of shape \(2, 8, 7, 7\)"),
        (torch.full((1, 2, 3, 4), math.nan), r"NaN: 24 of the values of shape \(1, 2, 3, 4\)"),
        ([1.0], "got list"),
    ],
)
def test_an_invalid_map_is_rejected(layer, x, message):
    with pytest.raises(ValueError, match=f"{type(layer).__name__} .*{message}"):
        layer(x)


@pytest.mark.parametrize("x", [torch.rand(2, 8), torch.rand(0, 2, 8), torch.full((1, 2, 3), math.nan)])
def test_scale_gem_rejects_invalid_input(x):
    with pytest.raises(ValueError, match=re.escape(f"{tuple(x.shape)}")):
        ScaleGeM()(x)


def test_infinities_are_not_mistaken_for_nan():
    x = torch.rand(1, 2, 3, 3)
    x[0, 0, 0, 0], x[0, 0, 1, 1] = math.inf, -math.inf
    assert GeM()(x)[0, 0] == math.inf


def test_integers_are_rejected_as_activations():
    with pytest.raises(ValueError, match=r"torch.int64 of shape \(3,\)"):
        ReLUPlus()(torch.arange(3))


@pytest.mark.parametrize("threshold", [-0.1, math.nan, math.inf])
def test_an_invalid_threshold_is_rejected(threshold):
    with pytest.raises(ValueError, match="threshold of ReLU"):
        ReLUPlus(threshold)


@pytest.mark.parametrize("layer", [GeM(), GeMPlus(), RegionalGeM()])
@pytest.mark.parametrize("scale", [0.03, 20])
def test_half_precision_neither_overflows_nor_underflows(layer, scale):
    x = scale * torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    out = layer(x.half())
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), layer(x), rtol=2e-3, atol=0)


POWERS = [0.5, 2.5, 4.6, 8, 9, 30, 60, 300, 1e4]


def in_float64(values: torch.Tensor, p: float, axis: int) -> torch.Tensor:
    """Returns (mean of values^p)^(1/p), computed in logarithms."""
    logarithms = p * values.double().log()
    return ((torch.logsumexp(logarithms, dim=axis) - math.log(values.shape[axis])) / p).exp()


@pytest.mark.parametrize("p", POWERS)
def test_every_power_is_computed_as_in_float64(p):
    random = torch.Generator().manual_seed(1)
    x = 3 * torch.rand(2, 4, 7, 9, generator=random)
    close = {"rtol": 2e-5, "atol": 1e-6, "check_dtype": False}
    torch.testing.assert_close(GeM(p)(x), in_float64(x.flatten(2).clamp(min=1e-6), p, 2), **close)
    windows = torch.nn.functional.pad(x, (2, 2, 2, 2), mode="reflect").unfold(2, 5, 1).unfold(3, 5, 1)
    local = in_float64(windows.flatten(4).clamp(min=1e-8), p, 4)
    torch.testing.assert_close(RegionalGeM(p)(x), (x + local) / 2, **close)
    v = torch.randn(3, 5, 16, generator=random)
    floor = v.amin(dim=(0, 2), keepdim=True)
    expected = in_float64((v - floor).clamp(min=1e-30), p, 0) + floor[0]
    torch.testing.assert_close(ScaleGeM(p)(v), expected, rtol=2e-5, atol=2e-5, check_dtype=False)
