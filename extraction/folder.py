"""The images of a folder and its subfolders."""

import logging
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from extraction.images import ImageFile, image_suffixes
from model.errors import InputError, short_list

log = logging.getLogger(__name__)

_NAMED_AT_MOST = 50

LeftOut = dict[str, list[Path]]  # files and folders that are skipped, by reason


def find_images(path: Path) -> list[ImageFile]:
    """Returns the file, or the image files of a folder and its subfolders, by name; skipped files are logged.

    Raises:
        InputError: if there is none.
    """
    if path.is_file():
        return [ImageFile(path)]
    if not path.is_dir():
        raise InputError(f"there is no file or folder {path}")
    left_out: LeftOut = {}
    images = [ImageFile(file) for file in image_files(path, left_out)]
    for reason, paths in left_out.items():
        names = [str(each.relative_to(path)) for each in paths]
        named = "" if reason in ("hidden", "not images") else f": {short_list(names, _NAMED_AT_MOST)}"
        hint = "; pip install pillow-heif for .heic" if any(name.lower().endswith(".heic") for name in names) else ""
        log.info("%s: %d skipped, %s%s%s", path, len(names), reason, named, hint)
    if not images:
        raise InputError(f"{path} contains no image; files with suffixes such as .jpg, .png, .webp or .tif are read")
    return images


def image_files(folder: Path, left_out: LeftOut) -> Iterator[Path]:
    """Yields the image files of a folder and its subfolders, by name; all others are added to left_out, by reason.

    Raises:
        InputError: if a folder cannot be read.
    """
    suffixes, known = image_suffixes(), _other_image_suffixes()

    def leave_out(reason: str, entry: Path) -> None:
        left_out.setdefault(reason, []).append(entry)

    def walk(folder: Path) -> Iterator[Path]:
        for entry in entries_of(folder):
            suffix = entry.suffix.lower()
            if is_hidden(entry):
                leave_out("hidden", entry)
            elif entry.is_dir() and not entry.is_symlink():
                yield from walk(entry)
            elif suffix not in suffixes:
                leave_out("unsupported image formats" if suffix in known else "not images", entry)
            elif entry.is_file():
                yield entry
            else:
                leave_out("broken links, linked folders, or not files", entry)

    return walk(folder)


def entries_of(folder: Path) -> list[Path]:
    """Returns the entries of a folder, by name. Raises InputError if it cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}") from None


def is_hidden(path: Path) -> bool:
    """Returns whether a file or folder is hidden, or the __MACOSX that macOS adds to archives."""
    return path.name.startswith(".") or path.name == "__MACOSX"


def _other_image_suffixes() -> set[str]:
    """Returns suffixes of images that cannot be read."""
    cameras = {".heic", ".heif", ".avif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"}
    return ({*Image.registered_extensions()} | cameras) - image_suffixes()
