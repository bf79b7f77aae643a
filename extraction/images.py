"""Read images: from a file and a box to pixels and the identity of the image."""

import contextlib
import hashlib
import io
import logging
import os
import re
import stat
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from PIL import ImageFile as PillowFile
from torch import Tensor

from extraction.identity import KEY_BYTES, NO_STAT, Box, Identity, box_in_words, file_identity, stat_record
from extraction.jpeg import decoded_jpeg
from model.errors import InputError, reason_of

log = logging.getLogger(__name__)

with contextlib.suppress(ImportError):  # HEIC, the format of many phones, if the package is installed
    import pillow_heif

    pillow_heif.register_heif_opener()
Image.init()
# The supported formats, which Pillow reads by itself. Others would start programs (PostScript starts Ghostscript).
_SAFE = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "TGA", "ICO", "AVIF", "HEIF")
FORMATS = tuple(name for name in _SAFE if name in Image.OPEN)

# Pillow's names of pixels with 16 bits per channel, of which it keeps the upper 8 unless the image is grey.
_DEEP = re.compile(r";16[BLN]")
_DARK = "16 bits per channel, but no value above 255, which would be black; save it with 8 bits per channel"
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

    def __post_init__(self) -> None:
        if isinstance(self.path, str):
            object.__setattr__(self, "path", Path(self.path))

    def read(self) -> np.ndarray:
        """Returns the pixels, (H, W, 3) uint8 RGB. Raises ImageError if the file is damaged or the box outside it."""
        return self.read_identified()[0]

    def read_identified(self) -> tuple[np.ndarray, Identity]:
        """Returns the pixels, as read, and the identity of the image from which they were decoded."""
        pixels, identity = _read(self.path, self.box)
        return (pixels if self.box is None else crop(pixels, self.box, self.path)), identity

    def identity(self) -> Identity:
        """Returns the identity of the image without decoding it. Raises ImageError if the file cannot be read."""
        try:
            with self.path.open("rb") as file:
                return file_identity(file, self.box)
        except OSError as error:
            raise ImageError(self.path, error.strerror or str(error)) from None

    def label(self, folder: Path | None) -> bytes:
        """Returns its path relative to the folder, followed by its box, if it has one: `name|x0,y0,x1,y1`."""
        name = str(self.path) if folder is None else str(self.path).removeprefix(f"{folder}{os.sep}")
        return os.fsencode(name if self.box is None else f"{name}|{box_in_words(self.box)}")

    def problem(self) -> str | None:
        """Returns why it cannot be read, or None if it can."""
        try:
            self.read()
        except ImageError as error:
            return str(error)
        return None


class NameList(Sequence[str]):
    """Names, stored as compactly as their bytes: a million objects would be copied to every process that reads."""

    def __init__(self, names: Iterable[str | bytes]):
        encoded, parts = map(os.fsencode, names), [np.array([], np.bytes_)]
        while part := list(islice(encoded, 1 << 14)):  # never all of them as objects
            parts.append(np.array(part, np.bytes_))
        self.array = np.concatenate(parts)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: Any) -> Any:
        return NameList(self.array[index]) if isinstance(index, slice) else os.fsdecode(bytes(self.array[index]))


class ImageList(Sequence[ImageFile]):
    """Images in a folder by their names, and by their boxes if they have any."""

    def __init__(self, folder: Path, names: NameList, boxes: Sequence[Box | None] | None = None):
        self.folder, self.names, self.boxes = folder, names, boxes

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        boxes = None if self.boxes is None else self.boxes[index]
        if isinstance(index, slice):
            return ImageList(self.folder, self.names[index], boxes)
        return ImageFile(self.folder / self.names[index], boxes)


class ReadingLimits(NamedTuple):
    """Which images a process reads.

    Attributes:
        pixels: the largest number of pixels. A file of a few kilobytes can claim billions; the default is Pillow's own.
        truncated: whether what is there of JPEG files whose end is missing is read.
    """

    pixels: int = 2 * (Image.MAX_IMAGE_PIXELS or 89478485)
    truncated: bool = False


_limits = ReadingLimits()


def set_reading_limits(limits: ReadingLimits) -> None:
    """Sets which images this process reads."""
    global _limits
    _limits = limits
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, limits.pixels)


def reading_limits() -> ReadingLimits:
    """Returns which images this process reads."""
    return _limits


def image_suffixes() -> set[str]:
    """Returns the suffixes of the files that read_image reads, in lower case: .jpg, .png ..."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}


def read_image(path: Path) -> np.ndarray:
    """Decodes an image to (H, W, 3) uint8 RGB, upright by its EXIF orientation, see to_rgb.

    Raises:
        ImageError: if the file is missing, not a regular file, not an image, damaged, too large, or has no
            8-bit equivalent. Of an animation, the first frame is read.
    """
    return _read(path, None)[0]


def _read(path: Path, box: Box | None) -> tuple[np.ndarray, Identity]:
    """Decodes a whole image, see read_image, and identifies it together with a box."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a FIFO would never end
            raise ImageError(path, "not a file")
        with path.open("rb") as file:
            before = stat_record(os.fstat(file.fileno()))
            pixels, whole = _read_pixels(file, path)
            identity = file_identity(file, box)
            if not whole:  # another key, and no stat record: it is not taken for the same as a file that was read whole
                log.warning("%s: its end is missing; the rest is grey", path)
                identity = Identity(hashlib.blake2b(identity.key, digest_size=KEY_BYTES).digest(), NO_STAT)
            if stat_record(os.fstat(file.fileno())) != before:
                raise ImageError(path, "changed while it was read")
            return pixels, identity
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
        raise ImageError(path, f"cannot be decoded ({reason_of(error)})") from None


def _read_pixels(file: BinaryIO, path: Path) -> tuple[np.ndarray, bool]:
    """Returns the pixels, and whether the file is whole, which only a JPEG need not be, see ReadingLimits."""
    is_jpeg = file.read(2) == b"\xff\xd8"
    try:
        return _opened(file, path), True
    except OSError as error:
        if not (_limits.truncated and is_jpeg and "truncated" in str(error)):
            raise
    PillowFile.LOAD_TRUNCATED_IMAGES = True
    try:
        return _opened(file, path), False
    finally:
        PillowFile.LOAD_TRUNCATED_IMAGES = False


def _opened(file: BinaryIO, path: Path) -> np.ndarray:
    file.seek(0)
    with Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > _limits.pixels:
            raise _too_large(path, image.width * image.height)
        return _decoded(image)


def _decoded(image: PillowFile.ImageFile) -> np.ndarray:
    """Returns the pixels of an opened image. Raises ValueError if it is dark only because of its depth."""
    pixels = decoded_jpeg(image)
    if pixels is None:
        deep = _DEEP.search(str(image.tile))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        pixels = to_rgb(image)
        if deep and not pixels.any():
            raise ValueError(_DARK)
    return pixels


def probe_pixels() -> list[np.ndarray]:
    """Returns two small drawn images, (H, W, 3) uint8, as they are read from a JPEG and a PNG file."""
    images = []
    for height, width, kind in ((72, 96, "JPEG"), (64, 56, "PNG")):
        y, x, channel = np.ogrid[:height, :width, :3]
        waves = (x * (3 + channel) + y * (7 - 2 * channel)) % 256 + (x * y * (channel + 1)) // 16 % 128
        file = io.BytesIO()
        Image.fromarray((waves % 256).astype(np.uint8)).save(file, kind)
        with Image.open(file) as image:
            images.append(_decoded(image))
    return images


def _too_large(path: Path, pixels: int) -> ImageError:
    return ImageError(path, f"has {pixels:,} pixels, more than the limit of {_limits.pixels:,}", pixels)


def to_rgb(image: Image.Image) -> np.ndarray:
    """Returns the pixels of an image, (H, W, 3) uint8 RGB.

    Grey, palette and CMYK images are converted, alpha is dropped, and 16 bits are reduced to the upper 8.

    Raises:
        ValueError: if the image has no 8-bit equivalent, or has 16 bits or more without a value above 255: it may be
            an image of 8 bits that was saved with more.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        is_32_bit = image.mode == "I" and image.format == "TIFF"  # Pillow reads some of 16 bits into 32
        if is_32_bit or values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("32-bit image; save it with 8 or 16 bits per channel")
        if values.max() <= 255:
            raise ValueError(_DARK)
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


def limit_side(pixels: Tensor, side: int | None) -> Tensor:
    """Returns an image whose longer side is reduced to this length (bilinear, antialiased), if it is longer.

    (H, W, 3) uint8, or floating-point in 0..1 -> (h, w, 3), floating-point in 0..1 if it was reduced.
    """
    height, width = pixels.shape[:2]
    if side is None or side >= max(height, width):
        return pixels
    x = pixels.permute(2, 0, 1)[None]
    x = x.float().div(255) if pixels.dtype == torch.uint8 else x
    sides = [max(1, round(length * side / max(height, width))) for length in (height, width)]
    x = F.interpolate(x, sides, mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)
    return x[0].permute(1, 2, 0).contiguous()
