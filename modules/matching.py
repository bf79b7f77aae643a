"""Where two images match: what each position of their feature maps adds to the cosine of their descriptors.

A descriptor is a sum over positions once the numbers by which it divides are given: GeM of power p shares a channel's
value g among the positions in the ratio x^p, as its derivatives do (Euler: g = sum of x dg/dx), and the projection and
the combination of the scales add up. Nothing is estimated: the parts sum to the cosine.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_tensor
from .descriptor import SuperGlobal, rescale
from .pooling import ScaleGeM
from .whitening import Whitening

_TOLERANCE = 1e-4  # of the sum of all parts


class Match(NamedTuple):
    """What the positions of two images add to their cosine.

    Attributes:
        cosine: the cosine of the two descriptors.
        maps: for each image, what each position adds, (h, w), negative if it speaks against the match. The scales are
            added up on the grid of the largest one.
        constants: for each image, what no position adds: the biases of the projection and of the whitening. The sum of
            a map and its constant is the cosine.
    """

    cosine: float
    maps: tuple[Tensor, Tensor]
    constants: tuple[float, float]


def match_maps(network: SuperGlobal, first: Tensor, second: Tensor, whitening: Whitening | None = None) -> Match:
    """Returns what each position of two images adds to the cosine of their descriptors.

    With u_s = g_s / |g_s| the pooled vector of scale s, y_s = W u_s + b its projection, d = max over s of y_s / |y_s|
    (Scale-GeM), m_s the dimensions that scale s won, and v the unit descriptor of the other image, position i adds ::

        1 / (|d| |y_s| |g_s|) * sum over c of x_c(i)^p / (sum over j of x_c(j)^p) * g_sc (W^T (m_s * v))_c

    where x is the feature map after Regional-GeM. Average pooling is p = 1, maximum pooling p = infinity; the mean over
    the scales weighs all of them by 1 / S.

    Args:
        network: a network with SuperGlobal's modules, the result of attach.
        first: a normalised image, (1, 3, H, W).
        second: another one, of any size.
        whitening: the whitening that the descriptors went through, if any.

    Raises:
        ValueError: if the input is invalid, the pooling or the projection is of another kind, so that the parts do not
            sum to the cosine, or a feature map has no positions.

    >>> from .attach import attach
    >>> extract = attach(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()))
    >>> match = match_maps(extract, torch.rand(1, 3, 32, 48), torch.rand(1, 3, 40, 40))
    >>> abs(match.maps[0].sum().item() - match.cosine) < 1e-5
    True
    """
    if not isinstance(network, SuperGlobal):
        raise ValueError(f"match_maps takes a network that attach of this package returned, got {type(network)}")
    if not isinstance(whitening, Whitening | None):
        raise ValueError(f"match_maps takes a Whitening, got {type(whitening)}")
    for image in (first, second):
        check_tensor(image, "match_maps", "1, 3, H, W")
        if len(image) != 1:
            raise ValueError(f"match_maps takes one image (1, 3, H, W) at a time, got {tuple(image.shape)}")
    with torch.inference_mode(False), torch.enable_grad():
        sides = [_Side(network, image.clone(), whitening) for image in (first, second)]
        vectors = [side.descriptor.detach() for side in sides]
        parts = [side.parts(other) for side, other in zip(sides, vectors[::-1], strict=True)]
    cosine = float(vectors[0] @ vectors[1])
    for positions, constant in parts:
        if not abs(float(positions.sum()) + constant - cosine) <= _TOLERANCE:
            raise ValueError(
                "places sum to the cosine with GeM, average or maximum pooling and a linear projection, but not with "
                f"{network.pooling} and {network.projection}; a Whitening is given as whitening=, not as projection"
            )
    (first_map, first_constant), (second_map, second_constant) = parts
    return Match(cosine, (first_map, second_map), (first_constant, second_constant))


class _Side:
    """One image of the two, and its descriptor as a function of its feature maps.

    The norms, and the choice of Scale-GeM, are constants of this function, so that it is of degree 1 in the maps and
    the biases together: the sum of each times its derivative is the value of the function.
    """

    def __init__(self, network: SuperGlobal, image: Tensor, whitening: Whitening | None):
        self.maps = [_refined_map(network, rescale(image, factor)) for factor in network.scales]
        if all(x.shape[2:].numel() == 1 for x in self.maps):
            raise ValueError("the feature map has a single position, so that nothing can be told about places")
        units = _unit(torch.cat([network.pool_refined(x) for x in self.maps]))  # (S, C)
        bias = _leaf(network.project(torch.zeros_like(units)))
        self.constants = [bias]
        vectors = network.project(units) - bias.detach() + bias  # (S, D)
        descriptor = _unit(_combined(vectors, network.sgem))
        if whitening is not None:
            projection = whitening.projection.to(descriptor)
            offset = _leaf(projection @ whitening.mean.to(descriptor))
            self.constants.append(offset)
            descriptor = _unit(projection @ descriptor - offset)
        self.descriptor = descriptor

    def parts(self, other: Tensor) -> tuple[Tensor, float]:
        """Returns what each position adds to the dot product with a vector, (h, w), and what the constants add."""
        leaves = [*self.maps, *self.constants]
        slopes = torch.autograd.grad(self.descriptor @ other, leaves, materialize_grads=True)
        parts = [(leaf * slope).detach() for leaf, slope in zip(leaves, slopes, strict=True)]
        positions = [part[0].sum(dim=0) for part in parts[: len(self.maps)]]
        return _on_one_grid(positions), sum(float(part.sum()) for part in parts[len(self.maps) :])


def _refined_map(network: SuperGlobal, image: Tensor) -> Tensor:
    """Returns the map that is pooled, raised to the lower bound of GeM, (1, C, h, w)."""
    with torch.no_grad():
        x = network.feature_map(image)
        x = x if network.rgem is None else network.rgem(x)
        floor = getattr(network.pooling_module, "eps", None)
    return _leaf(x if floor is None else x.clamp(min=floor))


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def _unit(x: Tensor) -> Tensor:
    """Returns vectors divided by their lengths, which count as constants."""
    return x / x.detach().norm(dim=-1, keepdim=True).clamp(min=1e-12)


def _combined(vectors: Tensor, sgem: nn.Module | None) -> Tensor:
    """Returns the value of Scale-GeM, or the mean, as a linear function of the vectors. (S, D) -> (D)."""
    if sgem is None:
        return vectors.mean(dim=0)
    if not isinstance(sgem, ScaleGeM):
        raise ValueError(f"match_maps does not know how {sgem} combines the scales")
    if math.isinf(sgem.p):
        return _unit(vectors).amax(dim=0)
    # The generalised mean of v - g is the sum of w (v - g) with these weights, its derivatives.
    floor = vectors.amin()
    above = vectors.detach() - floor.detach()
    share = above / above.amax(dim=0).clamp(min=torch.finfo(above.dtype).tiny)
    weights = (share / share.pow(sgem.p).mean(dim=0).pow(1 / sgem.p)).pow(sgem.p - 1) / len(vectors)
    return floor + (weights.where(above > 0, 0) * (vectors - floor)).sum(dim=0)


def _on_one_grid(parts: list[Tensor]) -> Tensor:
    """Returns the sum of maps of several sizes on the largest one; each keeps its own sum."""
    h, w = (max(part.shape[axis] for part in parts) for axis in (0, 1))
    spread = [_spread(part.shape[0], h, part).T @ part @ _spread(part.shape[1], w, part) for part in parts]
    return torch.stack(spread).sum(dim=0)


def _spread(size: int, target: int, like: Tensor) -> Tensor:
    """Returns the shares in which positions are spread over a finer grid, linearly. (size, target), rows sum to 1."""
    weights = F.interpolate(torch.eye(size).to(like)[None], size=target, mode="linear", align_corners=False)[0]
    return weights / weights.sum(dim=1, keepdim=True)
