"""Descriptors in a quarter of the memory: int8 with a scale per descriptor."""

from __future__ import annotations

import torch
from torch import Tensor


class Int8Rows:
    """Descriptors (N, D), each stored as int8 values and a float32 scale: x = scale * values.

    Slices and ``index_select`` return float32 tensors, so that it can be a part of a :class:`Database`.
    Both tensors may be memory-mapped.

    Args:
        values: (N, D) int8.
        scales: (N,) float32.

    Raises:
        ValueError: if these have other dtypes or do not fit each other.

    >>> import torch
    >>> len(Int8Rows.of(torch.eye(3)))
    3
    """

    dtype = torch.float32  # of the descriptors that indexing returns

    def __init__(self, values: Tensor, scales: Tensor):
        if values.ndim != 2 or values.dtype != torch.int8 or scales.dtype != torch.float32:
            raise ValueError(f"Int8Rows takes int8 (N, D) and float32 (N,), got {values.dtype} and {scales.dtype}")
        if scales.shape != values.shape[:1]:
            raise ValueError(f"{len(values)} rows need as many scales, got shape {tuple(scales.shape)}")
        self.values, self.scales = values, scales
        self.shape, self.device = values.shape, values.device

    @classmethod
    def of(cls, rows: Tensor) -> Int8Rows:
        """Quantizes descriptors (N, D) to int8, in steps of 1/127 of their largest value; each keeps its length."""
        rows = rows.float()
        values = (rows * (127 / rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-30))).round()
        scales = rows.norm(dim=1) / values.norm(dim=1).clamp(min=1)
        return cls(values.to(torch.int8), scales)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def to(self, device: torch.device | str) -> Int8Rows:
        """Returns the same descriptors on another device."""
        return Int8Rows(self.values.to(device), self.scales.to(device))

    def __getitem__(self, part: slice) -> Tensor:
        return self.values[part].float() * self.scales[part, None]

    def index_select(self, dim: int, ids: Tensor) -> Tensor:
        """Returns the descriptors with these numbers, (n,) -> (n, D) float32; dim must be 0."""
        return self.values.index_select(dim, ids).float() * self.scales.index_select(dim, ids)[:, None]

    def is_floating_point(self) -> bool:
        """Returns True: indexing returns floating-point descriptors."""
        return True

    def __repr__(self) -> str:
        return f"Int8Rows({self.shape[0]} rows of {self.shape[1]})"
