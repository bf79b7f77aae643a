"""The images of a folder and its subfolders."""

import logging
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from extraction.images import ImageFile, image_suffixes
from model.errors import InputError, short_list

log = logging.getLogger(__name__)

_NAMED_AT_MOST = 50


def find_images(path: Path) -> list[ImageFile]:
    """Returns the file, or the image files of a folder and its subfolders, by name; skipped files are logged.

    Raises:
        InputError: if there is none.
    """
    if path.is_file():
        return [ImageFile(path)]
    if not path.is_dir():
        raise InputError(f"there is no file or folder {path}")
    suffixes, known = image_suffixes(), _other_image_suffixes()
    left_out: dict[str, list[str]] = {}

    def leave_out(reason: str, entry: Path) -> None:
        left_out.setdefault(reason, []).append(str(entry.relative_to(path)))

    def walk(folder: Path) -> Iterator[Path]:
        try:
            entries = sorted(folder.iterdir())
        except OSError as error:
            raise InputError(f"{folder}: {error.strerror}") from None
        for entry in entries:
            suffix = entry.suffix.lower()
            if entry.name.startswith("."):
                leave_out("hidden", entry)
            elif entry.is_dir() and not entry.is_symlink():
                yield from walk(entry)
            elif suffix not in suffixes:
                leave_out("unsupported image formats" if suffix in known else "not images", entry)
            elif entry.is_file():
                yield entry
            else:
                leave_out("broken links, linked folders, or not files", entry)

    images = [ImageFile(file) for file in walk(path)]
    for reason, names in left_out.items():
        named = "" if reason in ("hidden", "not images") else f": {short_list(names, _NAMED_AT_MOST)}"
        hint = "; pip install pillow-heif for .heic" if any(name.lower().endswith(".heic") for name in names) else ""
        log.info("%s: %d skipped, %s%s%s", path, len(names), reason, named, hint)
    if not images:
        raise InputError(f"{path} contains no image; files with suffixes such as .jpg, .png, .webp or .tif are read")
    return images


def _other_image_suffixes() -> set[str]:
    """Returns suffixes of images that cannot be read."""
    cameras = {".heic", ".heif", ".avif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"}
    return ({*Image.registered_extensions()} | cameras) - image_suffixes()
