"""Read images: from a file and a box to pixels, and from pixels to the normalised input of the network."""

import contextlib
import os
import re
import stat
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from extraction.jpeg import decoded_jpeg
from model.errors import InputError

# B, G, R order, as the network was trained.
MEAN_BGR = (0.406, 0.456, 0.485)
STD_BGR = (0.225, 0.224, 0.229)

with contextlib.suppress(ImportError):  # HEIC, the format of many phones, if the package is installed
    import pillow_heif

    pillow_heif.register_heif_opener()
Image.init()
# The supported formats, which Pillow reads by itself. Others would start programs (PostScript starts Ghostscript).
_SAFE = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "TGA", "ICO", "AVIF", "HEIF")
FORMATS = tuple(name for name in _SAFE if name in Image.OPEN)

Box = tuple[float, float, float, float]


# A file of a few kilobytes can claim billions of pixels; the default is Pillow's own limit.
PIXEL_LIMIT = 2 * (Image.MAX_IMAGE_PIXELS or 89478485)
_pixel_limit = PIXEL_LIMIT
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # warns at half of the limit


class ImageError(InputError):
    """An image that cannot be used; the message says which one and why.

    Args:
        pixels: its number of pixels, if they are too many; 0 if the reason is another one.
    """

    def __init__(self, path: Path, reason: str, pixels: int = 0):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason, self.pixels = path, reason, pixels

    def __reduce__(self) -> tuple:  # for transfer between processes
        return ImageError, (self.path, self.reason, self.pixels)


@dataclass(frozen=True)
class ImageFile:
    """An image file, or the part of it inside a box (x0, y0, x1, y1)."""

    path: Path
    box: Box | None = None

    def read(self) -> np.ndarray:
        """Returns the pixels, (H, W, 3) uint8 RGB. Raises ImageError if the file is damaged or the box outside it."""
        pixels = read_image(self.path)
        return pixels if self.box is None else crop(pixels, self.box, self.path)

    def label(self, folder: Path) -> bytes:
        """Returns its name relative to the folder, followed by its box, if it has one: `name|x0,y0,x1,y1`."""
        name = str(self.path).removeprefix(f"{folder}/")
        return os.fsencode(name if self.box is None else f"{name}|{','.join(str(float(side)) for side in self.box)}")

    def problem(self) -> str | None:
        """Returns why it cannot be read, or None if it can."""
        try:
            self.read()
        except ImageError as error:
            return str(error)
        return None


class ImageList(Sequence[ImageFile]):
    """Images in a folder, by name, stored as compactly as the bytes of the names.

    (A list of a million objects would be copied to every process that reads images.)
    """

    def __init__(self, folder: Path, names: Sequence[bytes] | np.ndarray):
        self.folder, self.names = folder, np.array(names, dtype=np.bytes_)

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> ImageFile: ...
    @overload
    def __getitem__(self, index: slice) -> "ImageList": ...
    def __getitem__(self, index: int | slice) -> "ImageFile | ImageList":
        if isinstance(index, slice):
            return ImageList(self.folder, self.names[index])
        return ImageFile(self.folder / self.name(index))

    def name(self, index: int) -> str:
        """Returns the name as it is in the list."""
        return os.fsdecode(bytes(self.names[index]))


def set_pixel_limit(pixels: int) -> None:
    """Sets the largest number of pixels of images that this process reads, by default PIXEL_LIMIT."""
    global _pixel_limit
    _pixel_limit = pixels
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, pixels)


def pixel_limit() -> int:
    """Returns the largest number of pixels of images that this process reads."""
    return _pixel_limit


def image_suffixes() -> set[str]:
    """Returns the suffixes of the files that read_image reads, in lower case: .jpg, .png ..."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}


def read_image(path: Path) -> np.ndarray:
    """Decodes an image to (H, W, 3) uint8 RGB, upright by its EXIF orientation, see to_rgb.

    Raises:
        ImageError: if the file is missing, not a regular file, not an image, damaged, too large, or has no
            8-bit equivalent. Of an animation, the first frame is read.
    """
    try:
        if isinstance(path, Path) and not stat.S_ISREG(path.stat().st_mode):  # reading a FIFO would never end
            raise ImageError(path, "not a file")
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > _pixel_limit:
                raise _too_large(path, image.width * image.height)
            pixels = decoded_jpeg(image)
            if pixels is not None:
                return pixels
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(path, "no such file") from None
    except Image.DecompressionBombError as error:
        raise _too_large(path, int(re.findall(r"\d+", str(error))[0])) from None
    except MemoryError:
        raise ImageError(path, "too many pixels for the memory") from None
    except Image.UnidentifiedImageError:
        raise ImageError(path, "not an image") from None
    except OSError as error:
        reason = error.strerror or f"cannot be decoded ({error})"
        raise ImageError(path, reason) from None
    except Exception as error:  # decoders raise any exception (SyntaxError, struct.error, ...)
        raise ImageError(path, f"cannot be decoded ({str(error) or type(error).__name__})") from None


def _too_large(path: Path, pixels: int) -> ImageError:
    return ImageError(path, f"has {pixels:,} pixels, more than the limit of {_pixel_limit:,}", pixels)


def to_rgb(image: Image.Image) -> np.ndarray:
    """Returns the pixels of an image, (H, W, 3) uint8 RGB.

    Grey, palette and CMYK images are converted, alpha is dropped, and 16 bits are reduced to the upper 8.

    Raises:
        ValueError: if the image has no 8-bit equivalent.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("32-bit image; save it with 8 or 16 bits per channel")
        return np.repeat((values >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("floating-point image; save it with 8 or 16 bits per channel")
    return np.array(image.convert("RGB"))


def crop(pixels: np.ndarray, box: Box, path: Path) -> np.ndarray:
    """Returns the pixels inside the box: each number truncated to int, half-open, clipped to the image.

    Raises:
        ImageError: if the result is empty.
    """
    height, width = pixels.shape[:2]
    x0, y0, x1, y1 = (max(0, int(number)) for number in box)
    cropped = pixels[y0:y1, x0:x1]
    if cropped.size == 0:
        shown = ", ".join(f"{number:g}" for number in box)
        raise ImageError(path, f"the query box ({shown}) holds no pixel of this {width} x {height} image")
    return cropped


def to_network_input(pixels: Tensor) -> Tensor:
    """Normalises RGB, uint8 or floating-point in 0..1, to B, G, R for the network. (N, H, W, 3) -> (N, 3, H, W)."""
    x = pixels.permute(0, 3, 1, 2).contiguous().flip(1)
    x = x.float().div_(255) if x.dtype == torch.uint8 else x.float()
    return x.sub_(per_channel(MEAN_BGR, x.device)).div_(per_channel(STD_BGR, x.device))


def per_channel(values: Sequence[float], device: torch.device) -> Tensor:
    """Returns a value per channel, (C, 1, 1), filled on the device: a copy to it would wait for all queued work."""
    return torch.stack([torch.full((1, 1), float(value), device=device) for value in values])
