"""The whole network as one module for programs of one's own: RGB pictures -> unit descriptors."""

from collections.abc import Iterable
from functools import partial

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from model.batching import equal_sizes, first_batch_size, in_fitting_parts
from model.extract import describe
from model.images import to_rgb
from model.superglobal import SuperGlobal

Picture = Tensor | Image.Image

# Floating pictures may leave 0..1 a little when they are resized; what was normalised leaves it by more.
_SLACK = 0.1


class PictureDescriber(nn.Module):
    """RGB pictures, as torchvision and Pillow have them -> unit descriptors, for inference.

    Batches of equal sizes are made inside, as large as the memory allows; a descriptor does not
    depend on them.

    Args:
        model: what build_model gives; it resizes, and is given normalised B, G, R by this module.

    Shape:
        - a tensor (3, H, W) or (N, 3, H, W), floating, RGB in 0..1; a PIL picture of any mode, turned
          upright by its EXIF orientation; or a list of these, of any sizes
        - (N, D) float32, N = 1 for a single picture, on the model's device
    """

    def __init__(self, model: SuperGlobal):
        super().__init__()
        self.model = model

    def forward(self, pictures: Picture | Iterable[Picture]) -> Tensor:
        """Raises a ValueError for what is no such picture, with its number in a list."""
        if isinstance(pictures, Image.Image) or (isinstance(pictures, Tensor) and pictures.ndim != 4):
            pictures = [pictures]
        if not isinstance(pictures, Iterable):
            raise ValueError(
                f"pictures are tensors (3, H, W) or PIL pictures, or a list, got {type(pictures).__name__}"
            )
        size = first_batch_size(self.model)
        found: dict[int, Tensor] = {}
        for numbers, batch in equal_sizes(((i, _pixels(picture, i)) for i, picture in enumerate(pictures)), size):
            names = [f"picture {number}" for number in numbers]
            for part, vectors in in_fitting_parts(partial(describe, self.model), batch, names, size):
                found.update(zip(numbers[part], vectors, strict=True))
        descriptors = [found[number] for number in sorted(found)]
        rows = torch.stack(descriptors) if descriptors else torch.empty(0, self.model.dim, device=self.model.device)
        if not rows.isfinite().all():
            raise ValueError("a descriptor is not finite; a power or threshold of the modules is too large")
        return rows


def _pixels(picture: Picture, number: int) -> Tensor:
    """(H, W, 3) floating, in 0..1."""
    if isinstance(picture, Image.Image):
        try:
            return torch.from_numpy(to_rgb(ImageOps.exif_transpose(picture))).float().div_(255)
        except Exception as error:  # decoders raise what they like
            raise ValueError(f"picture {number}: {error}") from None
    if not isinstance(picture, Tensor):
        raise ValueError(
            f"picture {number}: a tensor (3, H, W) or a PIL picture is needed, got {type(picture).__name__}"
        )
    if picture.ndim != 3 or picture.shape[0] != 3 or 0 in picture.shape:
        raise ValueError(f"picture {number}: a tensor has shape (3, H, W), got {tuple(picture.shape)}")
    if not picture.is_floating_point():
        raise ValueError(f"picture {number}: RGB in 0..1 is needed, got {picture.dtype}; divide it by 255")
    low, high = picture.min().item(), picture.max().item()
    if not -_SLACK <= low <= high <= 1 + _SLACK:
        raise ValueError(
            f"picture {number}: RGB in 0..1 is needed, {tuple(picture.shape)} has {low:.3g} to {high:.3g}; "
            "mean and deviation are the model's own business"
        )
    return picture.permute(1, 2, 0)
