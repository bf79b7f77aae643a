"""Download the retrieval benchmark of Google Landmarks v2, for python -m tools.download gldv2."""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from model.errors import InputError, short_list
from revisitop.dataset import Dataset
from revisitop.layout_csv import read_csv_dataset
from tools.archives import find_bad, unpack, unpack_all
from tools.transfer import Check, Fetcher, Source

HOSTS, ROOT = ("https://s3.amazonaws.com",), "google-landmark"
LISTS = ("metadata/index.csv", "metadata/test.csv", "ground_truth/retrieval_solution_v2.1.csv")
ARCHIVES = {"index": 100, "test": 20}


def get_gldv2(fetcher: Fetcher, folder: Path, all_tests: bool) -> list[str]:
    """Downloads lists, solution and images; each archive is checked by its MD5, unpacked and deleted before the next.

    Args:
        folder: the folder of the dataset.
        all_tests: whether to keep also test images that are not queries.

    Returns:
        A line for each missing item.
    """
    problems = []
    for path in LISTS:
        try:
            fetcher.fetch(Source(HOSTS, f"{ROOT}/{path}"), folder, check_csv)
        except InputError as error:
            problems.append(str(error))
    if problems:
        return problems
    dataset = read_csv_dataset("gldv2", folder)
    if not any((folder / kind / "unpacked.txt").exists() for kind in ARCHIVES) and not missing_images(dataset):
        return []  # they came from another source
    queries = {f"{name}.jpg" for name in dataset.query_names}
    wanted = {"index": lambda name: True, "test": lambda name: all_tests or name in queries}
    for kind, count in ARCHIVES.items():
        (folder / kind).mkdir(exist_ok=True)
        archives = [Source(HOSTS, f"{ROOT}/{kind}/images_{number:03}.tar") for number in range(count)]
        check_of = partial(check_by_md5, fetcher, kind, folder / kind, wanted[kind])
        problems += unpack_all(fetcher, archives, folder / kind, folder / kind, check_of)
    dataset = read_csv_dataset("gldv2", folder)  # its folders exist now
    if not problems and (bad := missing_images(dataset)):
        problems.append(
            f"{len(bad)} images are missing ({short_list(bad)}), and all archives are unpacked; get these images, or "
            f"delete {folder / 'index' / 'unpacked.txt'} to have the archives fetched again"
        )
    return problems


def missing_images(dataset: Dataset) -> list[str]:
    return find_bad(dataset.queries, "queries", decode=False) + find_bad(dataset.database, "index", decode=False)


def check_by_md5(
    fetcher: Fetcher, kind: str, folder: Path, wanted: Callable[[str], bool], source: Source, new: Path
) -> Check:
    """Returns a check that compares an archive with its MD5 and unpacks it into `new`."""
    number = source.name.removesuffix(".tar")
    listed = fetcher.fetch(Source(HOSTS, f"{ROOT}/md5sum/{kind}/md5.{number}.txt"), folder, check_md5)
    expected = listed.read_text().split()[0].lower()

    def check(archive: Path) -> None:
        digest = hashlib.md5(usedforsecurity=False)
        with archive.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        found = digest.hexdigest()
        if found != expected:
            raise InputError(f"{archive.name} has the MD5 {found}, but {listed.name} says {expected}")
        unpack(archive, new, flat=False, wanted=wanted)

    return check


def check_md5(path: Path) -> None:
    """Raises InputError if the file does not begin with an MD5."""
    word = (path.read_text(errors="replace").split() or [""])[0]
    if len(word) != 32 or set(word.lower()) - set("0123456789abcdef"):
        raise InputError(f"{path} contains no MD5")


def check_csv(path: Path) -> None:
    """Raises InputError if the file has no header with an id."""
    with path.open(encoding="utf-8", errors="replace") as file:
        header = file.readline()
    if "id" not in [cell.strip() for cell in header.split(",")]:
        raise InputError(f"{path} is not a list: its first line is {header[:40]!r}")
