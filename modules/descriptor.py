"""SuperGlobal's descriptor: the feature maps of an image at several scales -> one unit vector.

Shapes: N images, S scales, C channels of the feature map, D dimensions of the descriptor.

Shao et al., "Global Features are All You Need for Image Retrieval and Reranking", ICCV 2023, sec. 3.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_tensor, values_can_be_seen

SCALES = (0.7071, 1.0, 1.4142)
SCALE_SETS = {1: (1.0,), 3: SCALES, 5: (0.5, *SCALES, 2.0)}  # the paper's, by the number of scales

Step = Callable[[Tensor], Tensor]


def multi_scale_descriptor(
    x: Tensor,
    feature_map: Step,
    pooling: Step,
    rgem: Step | None = None,
    project: Step | None = None,
    sgem: Step | None = None,
    scales: Sequence[float] = SCALES,
) -> Tensor:
    """Returns the unit descriptors of normalised images. (N, 3, H, W) -> (N, D).

    For each scale: resize the images, compute the feature map, refine it (Regional-GeM), pool it
    (GeM+), L2-normalise, project. Then combine the vectors of the scales (Scale-GeM) and L2-normalise.

    Args:
        x: images, normalised as the network was trained.
        feature_map: the network. (N, 3, h, w) -> (N, C, h', w').
        pooling: (N, C, h', w') -> (N, C).
        rgem: (N, C, h', w') -> (N, C, h', w'); None leaves the feature map as it is.
        project: (S * N, C) -> (S * N, D), applied to the unit vectors of all scales at once; None for C = D.
        sgem: (S, N, D) -> (N, D); None takes the mean over the scales.
        scales: factors by which the images are resized.

    Raises:
        ValueError: if x is not a floating-point tensor (N, C, H, W) without NaN, or a descriptor is not finite.
    """
    check_tensor(x, "multi_scale_descriptor", "N, C, H, W")
    identity = nn.Identity()
    pooled = [pooling((rgem or identity)(feature_map(rescale(x, factor)))) for factor in scales]
    vectors = F.normalize(torch.stack(pooled), dim=-1)  # (S, N, C)
    if project is not None:
        vectors = project(vectors.flatten(0, 1)).unflatten(0, vectors.shape[:2])  # (S, N, D)
    descriptors = F.normalize(vectors.mean(dim=0) if sgem is None else sgem(vectors), dim=-1)
    if values_can_be_seen(descriptors) and not descriptors.isfinite().all():
        raise ValueError(f"the descriptor of images {tuple(x.shape)} is not finite; a power is too large")
    return descriptors


def rescale(x: Tensor, factor: float) -> Tensor:
    """Returns the images resized by a factor. (N, C, H, W) -> (N, C, max(1, floor(H f)), max(1, floor(W f))).

    Bilinear and without antialiasing, as for the paper's results. (torchvision antialiases by default
    since 0.17.)
    """
    if factor == 1:
        return x
    # int() would turn the side into a constant in torch.export.
    size: list[Any] = [torch.sym_max(1, math.floor(side * factor)) for side in x.shape[-2:]]
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=False)
