"""Regional-GeM and the pooling after it in one pass over the feature map, by a Triton kernel.

PyTorch's own operators take 37 launches for three scales and write the map five times. Importing this file needs
Triton, a part of PyTorch's builds for NVIDIA's GPUs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pooling import GEMP_EPS, generalized_mean, regional_generalized_mean

_CHANNELS = 128  # per program, which reads 512 bytes of a channels-last map at once


@torch.library.custom_op("superglobal::regional_gem", mutates_args=(), device_types="cpu")
def regional_gem(x: Tensor, region_p: float, window: int, p: float, eps: float) -> Tensor:
    """Returns the generalised mean of a map refined by Regional-GeM. (N, C, H, W) -> (N, C), in any layout.

    Equal to ``generalized_mean(regional_generalized_mean(x, region_p, window), p, eps)``, on a GPU within rounding.

    Args:
        x: the feature map, floating-point; sums are computed in float32.
        region_p, window: power and window side of Regional-GeM.
        p, eps: power and lower bound of the pooling after it. Both powers must be at most modules.pooling.SAFE_POWER.
    """
    return generalized_mean(regional_generalized_mean(x, region_p, window), p, eps)


@regional_gem.register_kernel("cuda")
def regional_gem_by_triton(x: Tensor, region_p: float, window: int, p: float, eps: float) -> Tensor:
    """Computes `regional_gem` on a GPU."""
    (n, c, h, w), dtype = x.shape, x.dtype
    x = x.float()
    powers = x.clamp(min=GEMP_EPS).pow_(region_p)  # once per value instead of once per window
    sums = x.new_empty((n, h, c))
    with torch.cuda.device_of(x):
        _row_sums[n * h, triton.cdiv(c, _CHANNELS)](
            x, powers, sums, c, h, w, 1 / region_p, p, eps, *x.stride(), *powers.stride(),
            PAD=window // 2, REFLECTED=min(h, w) > window // 2, CHANNELS=_CHANNELS,
        )  # fmt: skip
    return (sums.sum(dim=1) / (h * w)).pow(1 / p).to(dtype)


@regional_gem.register_fake
def _shape(x: Tensor, region_p: float, window: int, p: float, eps: float) -> Tensor:
    return x.new_empty(x.shape[:2])


@triton.jit
def _inside(place, side, REFLECTED: tl.constexpr):  # noqa: N803 - compile-time constants, as Triton writes them
    """Returns the position inside the map for one in the padding, see modules.pooling."""
    if REFLECTED:  # noqa: SIM108 - a branch at compile time
        inside = side - 1 - tl.abs(side - 1 - tl.abs(place))
    else:
        inside = tl.minimum(tl.maximum(place, 0), side - 1)
    return inside


@triton.jit
def _row_sums(
    x, powers, sums, c, h, w, region_root, p, floor,
    x_n, x_c, x_h, x_w, powers_n, powers_c, powers_h, powers_w,
    PAD: tl.constexpr, REFLECTED: tl.constexpr, CHANNELS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Sums (x refined by Regional-GeM)^p over a row of the map, for a block of channels. -> sums (N, H, C).

    `powers` is x to the power of Regional-GeM, whose reciprocal is `region_root`. The strides of x and of
    `powers` follow.
    """
    row = tl.program_id(0).to(tl.int64)
    n, i = row // h, row % h
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    there = channels < c
    x += n * x_n + i * x_h + channels.to(tl.int64) * x_c
    powers += n * powers_n + channels.to(tl.int64) * powers_c
    total = tl.zeros((CHANNELS,), tl.float32)
    for j in range(w):
        local = tl.zeros((CHANNELS,), tl.float32)
        for di in tl.static_range(-PAD, PAD + 1):
            line = powers + _inside(i + di, h, REFLECTED) * powers_h
            for dj in tl.static_range(-PAD, PAD + 1):
                local += tl.load(line + _inside(j + dj, w, REFLECTED) * powers_w, mask=there, other=1.0)
        local = tl.exp2(tl.log2(local / ((2 * PAD + 1) * (2 * PAD + 1))) * region_root)
        refined = 0.5 * (tl.load(x + j * x_w, mask=there, other=1.0) + local)
        refined = tl.where(refined < floor, floor, refined)  # keeps NaN, unlike maximum()
        total += tl.exp2(tl.log2(refined) * p)
    tl.store(sums + row * c + channels, total, mask=there)
