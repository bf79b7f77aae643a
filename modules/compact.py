"""Rows in a quarter of the memory: int8 with a scale per row."""

from __future__ import annotations

import torch
from torch import Tensor


class Int8Rows:
    """(N, D) rows that are kept as int8 and a float32 scale each; x = scale * values.

    Wherever rows are taken from it (slices, ``index_select``) they come as a float32 tensor, so that a
    :class:`Database` takes it as a part. Both tensors may be memory-mapped.

    Args:
        values: (N, D) int8.
        scales: (N,) float32.

    Raises:
        ValueError: where these are of other types or do not fit each other.

    >>> import torch
    >>> len(Int8Rows.of(torch.eye(3)))
    3
    """

    dtype = torch.float32  # of the rows that are taken from it

    def __init__(self, values: Tensor, scales: Tensor):
        if values.ndim != 2 or values.dtype != torch.int8 or scales.dtype != torch.float32:
            raise ValueError(f"int8 (N, D) and float32 (N,) are needed, got {values.dtype} and {scales.dtype}")
        if scales.shape != values.shape[:1]:
            raise ValueError(f"{len(values)} rows need a scale each, got {tuple(scales.shape)}")
        self.values, self.scales = values, scales
        self.shape, self.device = values.shape, values.device

    @classmethod
    def of(cls, rows: Tensor) -> Int8Rows:
        """Returns floating rows (N, D) in int8, rounded to 127ths of their largest number; each keeps its length."""
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
        """The same rows on another device."""
        return Int8Rows(self.values.to(device), self.scales.to(device))

    def __getitem__(self, part: slice) -> Tensor:
        return self.values[part].float() * self.scales[part, None]

    def index_select(self, dim: int, ids: Tensor) -> Tensor:
        """The rows with these numbers, (n,) -> (n, D) float32; dim is 0."""
        return self.values.index_select(dim, ids).float() * self.scales.index_select(dim, ids)[:, None]

    def is_floating_point(self) -> bool:
        """True: the rows that are taken from it are."""
        return True

    def __repr__(self) -> str:
        return f"Int8Rows({self.shape[0]} rows of {self.shape[1]})"
