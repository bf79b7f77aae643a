"""SuperGlobal's pooling modules: GeM, GeM+, Regional-GeM and Scale-GeM.

Each is a pure function, and a small module that holds its arguments. The modules have no trained
state, so that adding one to a network never prevents the loading of a checkpoint; a power that is given
as an nn.Parameter is trained with the network, and is part of its state.
Shapes: N images, C channels, H x W positions, S scales.
"""

import math
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_tensor, refuse_tracing

# New in PyTorch 2.7; with older versions, compiling also takes the path for export.
_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)

GEMP_P = 4.6
GEMP_EPS = 1e-8
RGEM_P = 2.5
RGEM_WINDOW = 5
SGEM_P = math.inf

# The largest power for which relevant values of feature maps, 1e-8 to about 1e3, stay within float32.
SAFE_POWER = 8.0


def generalized_mean(x: Tensor, p: float | Tensor, eps: float = 1e-6) -> Tensor:
    """Returns the GeM over the last two axes: (mean of max(x, eps)^p)^(1/p). (N, C, H, W) -> (N, C).

    Radenović et al., "Fine-tuning CNN Image Retrieval with No Human Annotation", TPAMI 2018, eq. 3.
    """
    values = _wide(x).clamp(min=eps)
    if not _overflows(p):
        return values.pow(p).mean(dim=(-2, -1)).pow(1 / p).to(x.dtype)
    top = values.amax(dim=(-2, -1))
    return ((values / top[..., None, None]).pow(p).mean(dim=(-2, -1)).pow(1 / p) * top).to(x.dtype)


def regional_generalized_mean(
    x: Tensor, p: float | Tensor = RGEM_P, window: int = RGEM_WINDOW, eps: float = GEMP_EPS
) -> Tensor:
    """Returns Regional-GeM: (x + L) / 2, where L is the generalised mean of the window around each position.

    (N, C, H, W) -> (N, C, H, W). L = (mean over window x window of max(x, eps)^p)^(1/p), stride 1,
    reflect-padded by window // 2. If a side of the feature map is not longer than the padding, reflection
    is undefined and the whole map is padded by replication, so that no image is too small.

    Shao et al., "Global Features are All You Need for Image Retrieval and Reranking", ICCV 2023, sec. 3.
    """
    values = _wide(x).clamp(min=eps)
    if not _overflows(p):
        local = F.avg_pool2d(_padded(values.pow(p), window // 2), window, stride=1).pow(1 / p)
    else:
        values, (h, w) = _padded(values, window // 2), x.shape[-2:]
        top = F.max_pool2d(values, window, stride=1)
        shifted = (values[..., i : i + h, j : j + w] for i in range(window) for j in range(window))
        local = (reduce(torch.add, ((each / top).pow(p) for each in shifted)) / window**2).pow(1 / p) * top
    return x.lerp(local.to(x.dtype), 0.5)


def _overflows(p: float | Tensor) -> bool:
    """Returns whether x^p may exceed float32; then x is divided by its largest value, and the mean multiplied by it.

    A trained power may become that large.
    """
    return isinstance(p, Tensor) or p > SAFE_POWER


def _wide(x: Tensor) -> Tensor:
    """Returns float32 for half precision, in which powers such as 4.6 overflow and underflow."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _padded(x: Tensor, pad: int) -> Tensor:
    """Pads by reflection on each side, or by replication if a side of the map is not longer than pad."""
    refuse_tracing()
    if not _exporting():
        return F.pad(x, (pad, pad, pad, pad), mode="reflect" if min(x.shape[-2:]) > pad else "replicate")
    # An exported graph has no branches and symbolic sides, so that indices are used, ten times slower.
    sides = [torch.full((), side, device=x.device) for side in x.shape[-2:]]
    reflects = torch.minimum(*sides) > pad
    for axis, side in zip((-2, -1), sides, strict=True):
        place, last = torch.arange(-pad, x.shape[axis] + pad, device=x.device), side - 1
        reflected, replicated = last - (last - place.abs()).abs(), torch.minimum(place.clamp(min=0), last)
        x = x.index_select(axis, torch.where(reflects, reflected, replicated))
    return x


def scale_generalized_mean(v: Tensor, p: float | Tensor = SGEM_P) -> Tensor:
    """Returns Scale-GeM over the first axis. (S, N, C) -> (N, C), not normalised.

    For p = inf, the elementwise maximum of the L2-normalised vectors of the scales. For finite p,
    (mean over scales of (v - g)^p)^(1/p) + g on the vectors without normalisation, where g is the minimum
    over the image's own scales and channels, so that the powers are defined for negative values.

    Shao et al., "Global Features are All You Need for Image Retrieval and Reranking", ICCV 2023, sec. 3.
    """
    if not isinstance(p, Tensor) and math.isinf(p):
        return F.normalize(v, dim=-1).amax(dim=0)
    floor = v.amin(dim=(0, 2), keepdim=True)
    above = v - floor
    top = above.amax(dim=0)  # divided out before the power, which could overflow or vanish
    tiny = torch.finfo(v.dtype).tiny
    share = torch.where(top > 0, above / top.clamp(min=tiny), 1.0)  # without variation, 1 keeps gradients finite
    powers = torch.where(share > 0, share.clamp(min=tiny).pow(p), 0.0)  # at 0, powers below 1 have no finite gradient
    return powers.mean(dim=0).pow(1 / p) * top + floor[0]


def _power(p: float | nn.Parameter, infinite: bool = False) -> float | nn.Parameter:
    if isinstance(p, Tensor) and p.numel() != 1:
        raise ValueError(f"the power p must be a single number, got shape {tuple(p.shape)}")
    value = p.item() if isinstance(p, Tensor) else p
    if not value > 0 or (math.isinf(value) and not infinite):
        raise ValueError(f"the power p must be a positive{'' if infinite else ', finite'} number, got {value}")
    return p if isinstance(p, nn.Parameter) else float(value)


def _shown(p: float | nn.Parameter) -> str:
    return f"p={p.item():g}, trained" if isinstance(p, nn.Parameter) else f"p={p}"


class GeM(nn.Module):
    """Generalised-mean pooling, see :func:`generalized_mean`. (N, C, H, W) -> (N, C).

    Args:
        p: the power; 1 is the average, larger values approach the maximum. An nn.Parameter is trained.
        eps: lower bound of the values, so that the power is defined.

    >>> import torch
    >>> GeM(p=3.0)(torch.ones(2, 8, 7, 9)).shape
    torch.Size([2, 8])
    """

    def __init__(self, p: float | nn.Parameter = 3.0, eps: float = 1e-6):
        super().__init__()
        self.p = _power(p)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        check_tensor(x, type(self).__name__, "N, C, H, W")
        return generalized_mean(x, self.p, self.eps)

    def extra_repr(self) -> str:
        return f"{_shown(self.p)}, eps={self.eps}"


class GeMPlus(GeM):
    """GeM+: GeM with the power that the paper found best for trained networks, and a smaller lower bound.

    Args:
        p: the power, 4.6 in the paper. An nn.Parameter is trained.
        eps: lower bound of the values.

    >>> import torch
    >>> GeMPlus()(torch.ones(2, 8, 7, 9)).shape
    torch.Size([2, 8])
    """

    def __init__(self, p: float | nn.Parameter = GEMP_P, eps: float = GEMP_EPS):
        super().__init__(p, eps)


class RegionalGeM(nn.Module):
    """Regional-GeM, see :func:`regional_generalized_mean`. (N, C, H, W) -> (N, C, H, W), before the pooling.

    Args:
        p: the power inside the window, 2.5 in the paper. An nn.Parameter is trained.
        window: side of the window in positions, odd.

    >>> import torch
    >>> RegionalGeM()(torch.ones(2, 8, 1, 9)).shape
    torch.Size([2, 8, 1, 9])
    """

    def __init__(self, p: float | nn.Parameter = RGEM_P, window: int = RGEM_WINDOW):
        super().__init__()
        if window < 1 or window % 2 == 0:
            raise ValueError(f"the window of Regional-GeM must be odd and positive, got {window}")
        self.p = _power(p)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        check_tensor(x, "RegionalGeM", "N, C, H, W")
        return regional_generalized_mean(x, self.p, self.window)

    def extra_repr(self) -> str:
        return f"{_shown(self.p)}, window={self.window}"


class ScaleGeM(nn.Module):
    """Scale-GeM over the vectors of one image's scales, see :func:`scale_generalized_mean`. (S, N, C) -> (N, C).

    Args:
        p: the power over scales, infinity (the maximum) in the paper. An nn.Parameter, finite, is trained.

    >>> import torch
    >>> ScaleGeM()(torch.ones(3, 2, 8)).shape
    torch.Size([2, 8])
    """

    def __init__(self, p: float | nn.Parameter = SGEM_P):
        super().__init__()
        self.p = _power(p, infinite=not isinstance(p, nn.Parameter))

    def forward(self, v: Tensor) -> Tensor:
        check_tensor(v, "ScaleGeM", "S, N, C")
        return scale_generalized_mean(v, self.p)

    def extra_repr(self) -> str:
        return _shown(self.p)
