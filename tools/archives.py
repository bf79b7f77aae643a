"""Archives of images: brought, checked, unpacked whole or not at all, and deleted."""

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

from model.errors import InputError
from model.images import ImageError, ImageFile, read_image
from tools.transfer import Check, Fetcher, Source

UNPACKING = ".unpacking"


def unpack_all(
    fetcher: Fetcher, archives: Iterable[Source], folder: Path, into: Path, check_of: Callable[[Source, Path], Check]
) -> list[str]:
    """Brings the images of archives that are not unpacked yet; each archive is deleted before the next.

    Args:
        folder: for the archives, and for unpacked.txt, which tells what is done.
        into: for the images.
        check_of: for an archive and the folder into which it is to be unpacked, what does that, see get_archive.

    Returns:
        What went wrong with the others, a line for each.
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
    """Brings the archive's images into a folder, each whole or not at all. Returns the archive, needed no more.

    Args:
        folder: for the archive.
        into: for the images.
        check: unpacks the archive into the folder `.unpacking` of `into`, and raises InputError if it is not sound.

    Raises:
        InputError: if no address gives a sound archive.
    """
    new = into / UNPACKING  # in the folder itself, which may be a link to another disk
    try:
        path = fetcher.fetch(source, folder, check)
        for member_file in [file for file in new.rglob("*") if file.is_file()]:
            target = into / member_file.relative_to(new)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(member_file, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return path


# A member is both a file and a folder: as the folder was empty, the archive is at fault.
_NAME_CLASHES = (FileExistsError, IsADirectoryError, NotADirectoryError)


def unpack(archive: Path, folder: Path, flat: bool, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Extracts files of a .tar or .tar.gz into an empty folder, beside each other if `flat`; reads it to its end.

    Args:
        wanted: which files are extracted, by their names without folders.

    Raises:
        InputError: if it is damaged, holds no file, or a member is a link, a device or leaves the folder.
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
            while file.read(1 << 20):  # tar's end comes before gzip's, where the checksum is
                pass
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, *_NAME_CLASHES) as error:
        raise InputError(f"{archive} is damaged or no archive ({error})") from None
    if not held:
        raise InputError(f"{archive} holds no file")


def _opened(archive: Path) -> BinaryIO:
    file = archive.open("rb")
    if file.read(2) != b"\x1f\x8b":
        file.seek(0)
        return file
    file.close()
    return gzip.open(archive)


def _refuse_unsafe(archive: Path, member: tarfile.TarInfo, folder: Path) -> None:
    path = PureWindowsPath(member.name)  # knows both kinds of slashes
    if path.anchor or ".." in path.parts or "\0" in member.name:
        raise InputError(f"{archive} refused: its member {member.name!r} would leave the folder")
    if not member.isfile() and not member.isdir():
        raise InputError(f"{archive} refused: its member {member.name!r} is a link or device, not a file")
    if hasattr(tarfile, "data_filter"):  # Python 3.10.12, 3.11.4, 3.12
        tarfile.data_filter(member, str(folder))


def find_bad(images: Sequence[ImageFile], name: str, decode: bool) -> list[str]:
    """The images that are not there, or cannot be decoded, each with the reason."""

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
