"""ReLU+: the rectifier of SuperGlobal."""

import math

from torch import Tensor, nn

RELUP_THRESHOLD = 0.014


def relu_plus(x: Tensor, threshold: float = RELUP_THRESHOLD) -> Tensor:
    """Returns max(x, threshold) elementwise, for any shape.

    Shao et al., "Global Features are All You Need for Image Retrieval and Reranking", ICCV 2023, sec. 3.
    """
    return x.clamp(min=threshold)


class ReLUPlus(nn.Module):
    """ReLU+, see :func:`relu_plus`: values below the threshold are set to the threshold instead of 0.

    Args:
        threshold: the lower bound, 0.014 in the paper; 0 gives the plain ReLU.

    >>> import torch
    >>> ReLUPlus()(torch.tensor([-1.0, 0.01, 0.5]))
    tensor([0.0140, 0.0140, 0.5000])
    """

    def __init__(self, threshold: float = RELUP_THRESHOLD):
        super().__init__()
        if not 0 <= threshold < math.inf:
            raise ValueError(f"the threshold of ReLU+ must be 0 or more and finite, got {threshold}")
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise ValueError(f"ReLUPlus takes a floating-point tensor, got {x.dtype} of shape {tuple(x.shape)}")
        return relu_plus(x, self.threshold)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"
