"""The whole network as one module for programs of one's own: RGB images -> unit descriptors."""

from collections.abc import Iterable
from functools import partial

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from model.batching import equal_sizes, first_batch_size, in_fitting_parts
from model.errors import InputError
from model.extract import extract_batch
from model.extractor import NetworkExtractor
from model.images import to_rgb

AnyImage = Tensor | Image.Image

# Floating images may leave 0..1 a little when they are resized; what was normalised leaves it by more.
_SLACK = 0.1


class ImageDescriptor(nn.Module):
    """RGB images, as torchvision and Pillow have them -> unit descriptors, for inference.

    Batches of equal sizes are made inside, as large as the memory allows; a descriptor does not
    depend on them.

    Args:
        extractor: what Recipe.extractor gives; it resizes and normalises.

    Shape:
        - a tensor (3, H, W) or (N, 3, H, W), floating, RGB in 0..1; a PIL image of any mode, turned
          upright by its EXIF orientation; or a list of these, of any sizes
        - (N, D) float32, N = 1 for a single image, on the extractor's device
    """

    def __init__(self, extractor: NetworkExtractor):
        super().__init__()
        self.extractor = extractor

    def forward(self, images: AnyImage | Iterable[AnyImage]) -> Tensor:
        """Raises a ValueError for what is no such image, with its number in a list."""
        if isinstance(images, Image.Image) or (isinstance(images, Tensor) and images.ndim != 4):
            images = [images]
        if not isinstance(images, Iterable):
            raise ValueError(f"images are tensors (3, H, W) or PIL images, or a list, got {type(images).__name__}")
        size = first_batch_size(self.extractor)
        found: dict[int, Tensor] = {}
        for numbers, batch in equal_sizes(((i, _pixels(image, i)) for i, image in enumerate(images)), size):
            names = [f"image {number}" for number in numbers]
            for part, vectors in in_fitting_parts(partial(extract_batch, self.extractor), batch, names, size):
                if isinstance(vectors, InputError):
                    raise vectors
                found.update(zip(numbers[part], vectors, strict=True))
        rows = [found[number] for number in sorted(found)]
        descriptors = torch.stack(rows) if rows else torch.empty(0, self.extractor.dim, device=self.extractor.device)
        if not descriptors.isfinite().all():
            raise ValueError(
                "a descriptor is not finite; a power or threshold of the modules is too large, "
                "or the network overflows in fp16"
            )
        return descriptors


def _pixels(image: AnyImage, number: int) -> Tensor:
    """(H, W, 3) floating, in 0..1."""
    if isinstance(image, Image.Image):
        try:
            return torch.from_numpy(to_rgb(ImageOps.exif_transpose(image))).float().div_(255)
        except Exception as error:  # decoders raise what they like
            raise ValueError(f"image {number}: {error}") from None
    if not isinstance(image, Tensor):
        raise ValueError(f"image {number}: a tensor (3, H, W) or a PIL image is needed, got {type(image).__name__}")
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"image {number}: a tensor has shape (3, H, W), got {tuple(image.shape)}")
    if not image.is_floating_point():
        raise ValueError(f"image {number}: RGB in 0..1 is needed, got {image.dtype}; divide it by 255")
    low, high = torch.stack(image.aminmax()).tolist()  # in one look, which waits for a GPU
    if not -_SLACK <= low <= high <= 1 + _SLACK:
        raise ValueError(
            f"image {number}: RGB in 0..1 is needed, {tuple(image.shape)} has {low:.3g} to {high:.3g}; "
            "mean and deviation are the model's own business"
        )
    return image.permute(1, 2, 0)
