"""The whole network as one module, for use in other programs: RGB images -> unit descriptors."""

from collections.abc import Iterable
from functools import partial

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from extraction.batching import equal_sizes, first_batch_size, in_fitting_parts
from extraction.extract import extract_batch
from extraction.images import limit_side, to_rgb
from model.errors import InputError
from model.extractor import NetworkExtractor

AnyImage = Tensor | Image.Image

# Resizing floating-point images may leave 0..1 a little; normalised images leave it by more.
_SLACK = 0.1


class ImageDescriptor(nn.Module):
    """Computes unit descriptors of RGB images as in torchvision or Pillow, for inference.

    Images of equal size are batched internally, as many as the memory allows; a descriptor does not
    depend on its batch.

    Args:
        extractor: the result of Recipe.extractor, which also normalises.
        max_side: longer side to which larger images are reduced; None keeps their size.

    Shape:
        - a tensor (3, H, W) or (N, 3, H, W), floating, RGB in 0..1; a PIL image of any mode, turned
          upright by its EXIF orientation; or a list of these, of any sizes
        - (N, D) float32, N = 1 for a single image, on the extractor's device
    """

    def __init__(self, extractor: NetworkExtractor, max_side: int | None = None):
        super().__init__()
        self.extractor, self.max_side = extractor, max_side

    def forward(self, images: AnyImage | Iterable[AnyImage]) -> Tensor:
        """Returns the descriptors. Raises a ValueError for an invalid image, with its number in the list."""
        if isinstance(images, Image.Image) or (isinstance(images, Tensor) and images.ndim != 4):
            images = [images]
        if not isinstance(images, Iterable):
            raise ValueError(
                f"images must be tensors (3, H, W), PIL images, or a list of them, got {type(images).__name__}"
            )
        size = first_batch_size(self.extractor)
        found: dict[int, Tensor] = {}
        pixels = ((number, limit_side(_pixels(image, number), self.max_side)) for number, image in enumerate(images))
        for numbers, batch in equal_sizes(pixels, size.of):
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
    """Returns the pixels of an image, (H, W, 3) floating-point in 0..1."""
    if isinstance(image, Image.Image):
        try:
            return torch.from_numpy(to_rgb(ImageOps.exif_transpose(image))).float().div_(255)
        except Exception as error:  # decoders raise any exception
            raise ValueError(f"image {number}: {error}") from None
    if not isinstance(image, Tensor):
        raise ValueError(f"image {number} must be a tensor (3, H, W) or a PIL image, got {type(image).__name__}")
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"image {number} must have shape (3, H, W), got {tuple(image.shape)}")
    if not image.is_floating_point():
        raise ValueError(f"image {number} must be RGB in 0..1, got {image.dtype}; divide it by 255")
    low, high = torch.stack(image.aminmax()).tolist()  # a single wait for a GPU
    if not -_SLACK <= low <= high <= 1 + _SLACK:
        raise ValueError(
            f"image {number} must be RGB in 0..1, {tuple(image.shape)} has {low:.3g} to {high:.3g}; "
            "do not normalise it: the model subtracts mean and deviation itself"
        )
    return image.permute(1, 2, 0)
