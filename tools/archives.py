"""Archives of images: download, check, unpack atomically, and delete them."""

import gzip
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

from tqdm import tqdm

from extraction.images import ImageError, ImageFile, read_image
from model.errors import InputError
from tools.transfer import Check, Fetcher, Source

UNPACKING = ".unpacking"


def unpack_all(
    fetcher: Fetcher, archives: Iterable[Source], folder: Path, into: Path, check_of: Callable[[Source, Path], Check]
) -> list[str]:
    """Downloads and unpacks the archives that are not unpacked yet; each is deleted before the next.

    Args:
        folder: where the archives go, and unpacked.txt, which lists the finished ones.
        into: where the images go.
        check_of: returns, for an archive and the folder to unpack it into, the check of get_archive.

    Returns:
        The errors of the archives that failed, a line each.
    """
    marker, problems = folder / "unpacked.txt", []
    unpacked = marker.read_text().split() if marker.exists() else []
    for archive in archives:
        if archive.name in unpacked:
            continue
        try:
            path = get_archive(fetcher, archive, folder, into, check_of(archive, into / UNPACKING))
        except InputError as error:
            problems.append(str(error))
        else:
            with marker.open("a") as file:
                file.write(f"{archive.name}\n")
            path.unlink()
    return problems


def get_archive(fetcher: Fetcher, source: Source, folder: Path, into: Path, check: Check) -> Path:
    """Downloads an archive and unpacks its images into a folder, atomically. Returns the archive, which may be deleted.

    Args:
        folder: where the archive goes.
        into: where the images go.
        check: unpacks the archive into the folder `.unpacking` of `into`, and raises InputError if it is invalid.

    Raises:
        InputError: if no address provides a valid archive.
    """
    new = into / UNPACKING  # inside the folder, which may be a link to another disk
    try:
        path = fetcher.fetch(source, folder, check)
        for member_file in [file for file in new.rglob("*") if file.is_file()]:
            target = into / member_file.relative_to(new)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(member_file, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return path


# A member is both a file and a folder; the folder was empty, so that the archive is invalid.
_NAME_CLASHES = (FileExistsError, IsADirectoryError, NotADirectoryError)


def unpack(archive: Path, folder: Path, flat: bool, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Unpacks files of a .tar or .tar.gz into an empty folder, without subfolders if `flat`; reads it to its end.

    Args:
        wanted: which files are unpacked, by their names without folders.

    Raises:
        InputError: if it is damaged or contains no file, or a member is a link, a device or outside the folder.
    """
    held = 0
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        with _opened(archive) as file:
            with tarfile.open(fileobj=file, mode="r|") as tar:
                for member in tqdm(tar, desc=f"unpacking {archive.stem}", unit="img", dynamic_ncols=True):
                    _refuse_unsafe(archive, member, folder)
                    held += member.isfile()
                    if member.isfile() and wanted(PurePosixPath(member.name).name):
                        name = PurePosixPath(member.name)
                        path = folder / (name.name if flat else name)
                        path.parent.mkdir(parents=True, exist_ok=True)
                        with path.open("wb") as member_file:
                            shutil.copyfileobj(tar.extractfile(member), member_file)
            while file.read(1 << 20):  # the checksum is at the end of the gzip stream, after the end of the tar
                pass
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, *_NAME_CLASHES) as error:
        raise InputError(f"{archive} is damaged or not an archive ({error})") from None
    if not held:
        raise InputError(f"{archive} contains no file")


def _opened(archive: Path) -> BinaryIO:
    file = archive.open("rb")
    if file.read(2) != b"\x1f\x8b":
        file.seek(0)
        return file
    file.close()
    return gzip.open(archive)


def _refuse_unsafe(archive: Path, member: tarfile.TarInfo, folder: Path) -> None:
    path = PureWindowsPath(member.name)  # handles both kinds of slashes
    if path.anchor or ".." in path.parts or "\0" in member.name:
        raise InputError(f"{archive} is refused: its member {member.name!r} would leave the folder")
    if not member.isfile() and not member.isdir():
        raise InputError(f"{archive} is refused: its member {member.name!r} is a link or device, not a file")
    if hasattr(tarfile, "data_filter"):  # Python 3.10.12, 3.11.4, 3.12
        tarfile.data_filter(member, str(folder))


def find_bad(images: Sequence[ImageFile], name: str, decode: bool) -> list[str]:
    """Returns a line for each image that is missing or cannot be decoded, with the reason."""

    def problem(image: ImageFile) -> str | None:
        if not decode:
            return None if image.path.is_file() else f"{image.path}: no such file"
        try:
            read_image(image.path)
        except ImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        found = pool.map(problem, images) if decode else map(problem, images)
        bar = tqdm(found, desc=f"checking {name}", total=len(images), unit="img", dynamic_ncols=True)
        return [reason for reason in bar if reason]
