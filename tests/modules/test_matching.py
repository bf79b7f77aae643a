"""The match maps of two images sum to the cosine of their descriptors, for every combination of modules."""

from itertools import product

import pytest
import torch
from torch import nn

from modules.attach import attach
from modules.matching import match_maps
from modules.pooling import GeM, GeMPlus, RegionalGeM, ScaleGeM
from modules.whitening import Whitening

generator = torch.Generator().manual_seed(0)
IMAGES = [torch.randn(1, 3, *sides, generator=generator, dtype=torch.float64) for sides in ((48, 64), (70, 40))]
MATRIX = torch.randn(7, 12, generator=generator, dtype=torch.float64)
MEAN = torch.rand(12, generator=generator, dtype=torch.float64) / 10
SCALES = (0.5, 1.0, 1.4142)


def network(*more: nn.Module) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 12, 5, 4), *more).double().eval()


def check(extract, first=IMAGES[0], second=IMAGES[1], whitening=None):
    """Compares the sums with the cosine of the descriptors, and returns the match."""
    match = match_maps(extract, first, second, whitening)
    with torch.inference_mode():
        vectors = [(whitening or torch.nn.Identity())(extract(image))[0] for image in (first, second)]
    cosine = float(vectors[0] @ vectors[1])
    assert match.cosine == pytest.approx(cosine, abs=1e-12)
    for positions, constant in zip(match.maps, match.constants, strict=True):
        assert float(positions.sum()) + constant == pytest.approx(cosine, abs=1e-11)
    return match


POOLINGS = [GeM(3.0), GeMPlus(), GeM(12.0), nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)]


@pytest.mark.parametrize("pooling", POOLINGS, ids=str)
@pytest.mark.parametrize("sgem", [None, ScaleGeM(), ScaleGeM(4.0), ScaleGeM(1.0), ScaleGeM(0.5)], ids=str)
def test_the_maps_sum_to_the_cosine(pooling, sgem):
    rgems, projections = (None, RegionalGeM()), (None, MATRIX, (MATRIX, MEAN))
    for rgem, projection, scales in product(rgems, projections, ((1.0,), SCALES)):
        extract = attach(network(nn.ReLU()), None, pooling, rgem, sgem, scales, projection)
        match = check(extract)
        assert match.constants == (0, 0) or isinstance(projection, tuple)
        assert [positions.ndim for positions in match.maps] == [2, 2]


def test_maps_of_both_signs_and_silent_channels_are_covered():
    silent = network(nn.ReLU())
    silent[0].bias.data[:3] = -1e3  # these channels are 0 everywhere
    for pooling in (GeMPlus(), nn.AdaptiveAvgPool2d(1)):
        check(attach(network(), None, pooling, None))
        check(attach(silent, None, pooling))


def test_a_whitening_after_the_descriptor_is_covered():
    extract = attach(network(nn.ReLU()), scales=SCALES, projection=(MATRIX, MEAN))
    match = check(extract, whitening=Whitening(MEAN[:7], MATRIX[:5, :7]))
    assert match.constants[0] != 0


def test_a_position_adds_its_share_of_each_channel():
    """The formula of the docstring, written out for one scale."""
    extract = attach(network(nn.ReLU()), None, GeM(3.0), RegionalGeM(), ScaleGeM(), (1.0,), (MATRIX, MEAN))
    with torch.no_grad():
        x = RegionalGeM()(extract.feature_map(IMAGES[0]))[0].clamp(min=1e-6)
        v = extract(IMAGES[1])[0]
    powers = x**3
    g = powers.mean(dim=(1, 2)) ** (1 / 3)
    y = MATRIX @ (g / g.norm() - MEAN)
    slopes = MATRIX.T @ v * g / (y.norm() * g.norm())
    expected = (powers / powers.sum(dim=(1, 2), keepdim=True) * slopes[:, None, None]).sum(dim=0)
    match = match_maps(extract, *IMAGES)
    torch.testing.assert_close(match.maps[0], expected, atol=1e-12, rtol=1e-9)
    assert match.constants[0] == pytest.approx(float(-(MATRIX @ MEAN) @ v / y.norm()), abs=1e-12)


def test_what_is_seen_in_one_half_is_found_there():
    """The same patch lies on the left of one image and on the right of the other; the rest of both is empty."""
    left, right = torch.zeros(2, 1, 3, 64, 96, dtype=torch.float64)
    patch = torch.rand(3, 64, 32, generator=generator, dtype=torch.float64)
    left[0, :, :, :32] = right[0, :, :, 64:] = patch
    match = check(attach(network(nn.ReLU()), scales=SCALES), left, right)
    halves = [positions.tensor_split(2, dim=1) for positions in match.maps]
    assert halves[0][0].sum() > 0.9 * match.cosine < halves[1][1].sum() + 0.2 * match.cosine


def test_equal_scales_share_the_map():
    twice, once = (
        match_maps(attach(network(nn.ReLU()), sgem=sgem, scales=scales), *IMAGES)
        for sgem, scales in ((ScaleGeM(), (1.0, 1.0)), (None, (1.0,)))
    )
    torch.testing.assert_close(twice.maps, once.maps)


class Attention(nn.Module):
    """A pooling by weights that depend on the map itself."""

    def forward(self, x):
        return (x * x.mean(dim=1, keepdim=True).flatten(2).softmax(dim=2).unflatten(2, x.shape[2:])).sum(dim=(2, 3))


@pytest.mark.parametrize(
    ("settings", "noun"),
    [
        ({"pooling": Attention(), "rgem": None}, "Attention"),
        ({"projection": nn.Sequential(nn.Linear(12, 5), nn.Tanh()).double()}, "Tanh"),
        ({"sgem": nn.Identity()}, "scales"),
        ({"pooling": nn.AdaptiveAvgPool2d(1), "features": lambda x: x[:, :, :1, :1], "rgem": None}, "position"),
    ],
)
def test_other_poolings_and_projections_are_refused(settings, noun):
    function = settings.pop("features", network(nn.ReLU()))
    with pytest.raises(ValueError, match=noun):
        match_maps(attach(function, **settings), *IMAGES)


def test_invalid_input_is_refused():
    extract = attach(network(nn.ReLU()))
    with pytest.raises(ValueError, match="one image"):
        match_maps(extract, torch.cat([IMAGES[0]] * 2), IMAGES[1])
    with pytest.raises(ValueError, match="attach"):
        match_maps(network(), *IMAGES)
    extract.detach()
    with pytest.raises(RuntimeError, match="detached"):
        match_maps(extract, *IMAGES)
