"""Whitening: descriptors of fewer dimensions, in which they vary equally."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_tensor, values_can_be_seen


def whiten(x: Tensor, mean: Tensor, projection: Tensor) -> Tensor:
    """Returns P (x - mean), L2-normalised, for each descriptor x. (N, D), (D,), (dim, D) -> (N, dim).

    It is computed in float32, also under autocast, or in the dtype of x if that is wider; the result has the
    dtype of x. A descriptor equal to the mean becomes all zeros.

    Jégou and Chum, "Negative Evidences and Co-occurrences in Image Retrieval: the Benefit of PCA and Whitening",
    ECCV 2012.
    """
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return whiten(x, mean, projection)
    work = torch.promote_types(x.dtype, torch.float32)  # a length may overflow half precision
    centred = (x.to(work) - mean).to(work)  # a float64 mean is subtracted in float64
    return F.normalize(F.linear(centred, projection.to(work)), dim=-1).to(x.dtype)


class Whitening(nn.Module):
    """Maps descriptors to P (x - mean), L2-normalised, see :func:`whiten`. (N, D) -> (N, dim).

    The tensors keep their dtype; ``.float()`` halves the memory of float64.

    Args:
        mean: (D,), subtracted from each descriptor.
        projection: P, (dim, D), one axis per row.

    Raises:
        ValueError: if the shapes do not fit, or the values are not finite floating-point numbers.

    >>> import torch
    >>> Whitening(torch.zeros(3), torch.eye(3)[:2])(torch.tensor([[3.0, 4.0, 5.0]]))
    tensor([[0.6000, 0.8000]])
    """

    mean: Tensor
    projection: Tensor

    def __init__(self, mean: Tensor, projection: Tensor):
        super().__init__()
        for name, value, letters in (("mean", mean, "D"), ("projection", projection, "dim, D")):
            check_tensor(value, f"the {name} of a whitening", letters)
            if values_can_be_seen(value) and not value.isfinite().all():
                raise ValueError(f"the {name} of a whitening has values that are not finite")
            self.register_buffer(name, value.detach().clone())
        if projection.shape[1] != len(mean):
            raise ValueError(f"a mean of {len(mean)} dimensions does not fit a projection of {tuple(projection.shape)}")

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "Whitening":
        """Returns the whitening of a state dict, or of a file of tools.whiten: ``torch.load(file, weights_only=True)``.

        Args:
            state: a dict of exactly the tensors "mean" (D,) and "projection" (dim, D), and anything but tensors.

        Raises:
            ValueError: if there are other tensors, or these do not form a whitening.
        """
        names = [*state] if isinstance(state, Mapping) else []
        tensors = {"mean", "projection"} | {name for name in names if isinstance(state[name], Tensor)}
        if tensors != {"mean", "projection"} & {*names}:
            given = sorted(map(str, names)) or type(state).__name__
            raise ValueError(f"the state of a whitening must be a dict of mean and projection, got {given}")
        return cls(state["mean"], state["projection"])

    @property
    def dim(self) -> int:
        """The number of dimensions of a whitened descriptor."""
        return self.projection.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        check_tensor(x, "Whitening", "N, D")
        if x.shape[1] != len(self.mean):
            raise ValueError(f"Whitening takes descriptors of {len(self.mean)} dimensions, got {x.shape[1]}")
        return whiten(x, self.mean, self.projection)

    def extra_repr(self) -> str:
        return f"{len(self.mean)} -> {self.dim}"
