"""Fusion of descriptors: concatenated, so that a cosine is the weighted mean of the cosines of the parts."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from extraction.files import scratch_rows
from model.errors import InputError

_ROWS = 8192


def fused(parts: Sequence[Tensor], weights: Sequence[float], folder: Path | None = None) -> Tensor:
    """Returns the rows of the parts side by side, each times sqrt(w_k). K times (N, D_k) -> (N, D_1 + ... + D_K).

    For unit rows and weights that add to 1, q . x = sum of w_k (q_k . x_k), and the rows have length 1.

    Args:
        parts: rows of the same images, memory-mapped or not.
        weights: the weight of each part.
        folder: the folder of the temporary file that has the result; by default the system's.

    Raises:
        InputError: if the numbers of rows differ, or there is no room for the result.
    """
    if len(parts) == 1:
        return parts[0]
    if len({len(part) for part in parts}) > 1:
        raise InputError(f"descriptors of {', '.join(str(len(part)) for part in parts)} images cannot be fused")
    rows = scratch_rows(len(parts[0]), sum(part.shape[1] for part in parts), folder)
    for start in range(0, len(rows), _ROWS):
        some = slice(start, start + _ROWS)
        pieces = [part[some].float() * weight**0.5 for part, weight in zip(parts, weights, strict=True)]
        torch.cat(pieces, dim=1, out=rows[some])
    return rows
