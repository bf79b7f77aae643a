"""Descriptors shortened by a learnt whitening: a recipe that wraps another one."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from extraction.files import jsonable, write_atomically
from model.checkpoint import load_tensors, sha256
from model.errors import InputError
from model.extractor import Extractor, NetworkExtractor
from modules.whitening import Whitening


class _Recipe(Protocol):
    dim: int
    scales: tuple[float, ...]
    checkpoint: Any
    checkpoint_sha256: str

    def extractor(self, device: torch.device | str) -> Extractor: ...
    def provenance(self) -> dict[str, Any]: ...
    def check(self) -> None: ...


@dataclass(frozen=True)
class WhitenedRecipe:
    """The whitened descriptors of another recipe: P (x - m), of unit length.

    Attributes:
        recipe: the recipe of the descriptors.
        path: the file of the whitening, as written by python -m tools.whiten.
    """

    recipe: _Recipe
    path: Path

    @property
    def checkpoint(self) -> Any:
        return self.recipe.checkpoint

    @property
    def checkpoint_sha256(self) -> str:
        return self.recipe.checkpoint_sha256

    @property
    def scales(self) -> tuple[float, ...]:
        return self.recipe.scales

    @property
    def dim(self) -> int:
        return self.whitening.dim

    @cached_property
    def whitening(self) -> Whitening:
        return load_whitening(self.path)[0]

    @cached_property
    def learnt_from(self) -> dict[str, Any]:
        """The provenance of the whitening, as recorded in its file."""
        return load_whitening(self.path)[1]

    def provenance(self) -> dict[str, Any]:
        return {**self.recipe.provenance(), "whitening_sha256": sha256(self.path), "dim": self.dim}

    def check(self) -> None:
        """Raises InputError if the recipe or the whitening cannot be used, or they do not fit each other."""
        self.recipe.check()
        width = self.whitening.projection.shape[1]
        if width != self.recipe.dim:
            raise InputError(f"{self.path} takes descriptors of {width} dimensions, but these have {self.recipe.dim}")
        made = {key: value for key, value in self.learnt_from.get("descriptors", {}).items() if key != "images"}
        now = self.recipe.provenance()
        if differing := [key for key in ("checkpoint_sha256", "network") if key in made and made[key] != now.get(key)]:
            raise InputError(
                f"{self.path} was learnt from descriptors of another network ({', '.join(differing)} differ)"
            )

    def extractor(self, device: torch.device | str = "cpu") -> NetworkExtractor:
        """Returns the extractor followed by the whitening. (N, H, W, 3) uint8 RGB -> (N, dim) unit descriptors."""
        extractor = self.recipe.extractor(device)
        whitening = load_whitening(self.path)[0].float().to(device)
        return NetworkExtractor(_Whitened(extractor, whitening), _as_they_are, self.dim, self.scales).eval()


class _Whitened(nn.Module):
    def __init__(self, extractor: Callable[[Tensor], Tensor], whitening: Whitening):
        super().__init__()
        self.extractor, self.whitening = extractor, whitening

    def forward(self, pixels: Tensor) -> Tensor:
        return self.whitening(self.extractor(pixels))


def _as_they_are(pixels: Tensor) -> Tensor:
    return pixels


def save_whitening(path: Path, whitening: Whitening, learnt_from: dict[str, Any]) -> None:
    """Saves a whitening and its provenance as a file of tensors."""
    content = {"mean": whitening.mean, "projection": whitening.projection, "learnt_from": jsonable(learnt_from)}
    write_atomically(path, lambda file: torch.save(content, file))


def load_whitening(path: Path) -> tuple[Whitening, dict[str, Any]]:
    """Loads a whitening and its provenance.

    Raises:
        InputError: if the file is missing, damaged, or not a whitening.
    """
    content: Any = load_tensors(path)
    try:
        whitening = Whitening.from_state({key: content[key] for key in ("mean", "projection")})
        learnt_from = content.get("learnt_from", {})
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(f"{path} is not a whitening ({' '.join(str(error).split())})") from None
    return whitening, learnt_from if isinstance(learnt_from, dict) else {}
