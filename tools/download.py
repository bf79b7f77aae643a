"""Download images, ground truth, example descriptors and weights into the folders where the commands look for them.

python -m tools.download roxford5k rparis6k weights
python -m tools.download revisitop1m features

The same command can be started again at any time: existing files are only verified, interrupted downloads
are resumed, and an archive is deleted once its images are unpacked.
"""

import argparse
import gzip
import hashlib
import os
import shutil
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

import torch
from tqdm import tqdm

from extraction.files import read_mat
from extraction.images import ImageFile
from model.checkpoint import PUBLISHED, find_checkpoint, load_encoder
from model.cvnet import ResNet
from model.errors import InputError, short_list
from report.command import run_command
from revisitop.layout_csv import read_csv_dataset
from revisitop.layout_revisitop import load_distractor_list, read_ground_truth
from revisitop.layouts import dataset_folder
from tools.check import read_images
from tools.transfer import Fetcher, File

VGG = ("https://www.robots.ox.ac.uk", "http://www.robots.ox.ac.uk")
CMP, PTAK = "http://cmp.felk.cvut.cz", "http://ptak.felk.cvut.cz"
S3 = ("https://s3.amazonaws.com",)
IMAGES = {
    "roxford5k": ["~vgg/data/oxbuildings/oxbuild_images-v1.tgz"],
    "rparis6k": [f"~vgg/data/parisbuildings/paris_{n}-v1.tgz" for n in (1, 2)],
}
LANDMARK_LISTS = ("metadata/index.csv", "metadata/test.csv", "ground_truth/retrieval_solution_v2.1.csv")
LANDMARK_ARCHIVES = {"index": 100, "test": 20}
FEATURES = [f"revisitop/data/features/{name}_resnet_rsfm120k_gem.mat" for name in IMAGES]
WEIGHTS = {50: PUBLISHED[50], 101: "CVPR2022_CVNet_R101.pt"}
UNPACKED = "unpacked.txt"  # lists the archives in its folder that are unpacked
ITEMS = (*IMAGES, "revisitop1m", "gldv2", "features", "weights")

HELP = f"""items:
  roxford5k    ground truth and images of ROxford: DATA_DIR/roxford5k/
  rparis6k     ground truth and images of RParis: DATA_DIR/rparis6k/
  revisitop1m  list and 100 archives of the million distractors: DATA_DIR/revisitop1m/
  gldv2        Google Landmarks v2: lists, solution, 100 archives of index images (about 85 GB) and 20 of test images
               (10 GB), of which only the 1,129 queries are kept: DATA_DIR/gldv2/
  features     revisitop's example descriptors, for TEST.FEATURES: DATA_DIR/*.mat
  weights      WEIGHTS_DIR/{PUBLISHED[50]} and {PUBLISHED[101]}

Files and archives from other sources are used, too, if they are in the folder of the item.
Exit codes: 0 if everything is complete; 2 if something is missing, with a line that says what to do."""


@dataclass(frozen=True)
class Item:
    """What the command downloads under one name.

    Attributes:
        files: files that are kept: lists, descriptors, weights.
        archives: archives of images, which are deleted once they are unpacked.
        bad_images: returns a line for each image that is missing or damaged; needs all files.
        advice: what else the user can do if a download fails.
    """

    name: str
    files: list[File]
    archives: list[File] = field(default_factory=list)
    bad_images: Callable[[], list[str]] = list
    advice: str = ""

    def needed(self) -> list[File]:
        """Returns what is to be downloaded or unpacked. Raises InputError if an existing list is invalid."""
        missing = [file for file in self.files if not file.target.exists()]
        packed = [file for file in self.archives if file.target.name not in unpacked_names(file.folder)]
        return missing + (packed if packed and (missing or self.bad_images()) else [])

    def get(self, fetcher: Fetcher) -> list[str]:
        """Verifies, downloads and unpacks what is needed, and returns why it is not complete, a line each."""
        try:
            if problems := self.fetch(fetcher, self.files) or self.fetch(fetcher, self.needed()):
                return problems
            bad = self.bad_images()
        except ConnectionError as error:
            files = [file for file in self.needed() if not file.target.exists()]
            places = short_list([f"{file.hosts[0]}/{file.path} as {file.target}" for file in files])
            return [f"{error}; get {places}{self.advice}"]
        except (InputError, OSError) as error:
            return [str(error)]
        lists = " and ".join(dict.fromkeys(str(file.folder / UNPACKED) for file in self.archives))
        words = f"{len(bad)} images are missing or damaged ({short_list(bad)}), and all archives are unpacked"
        advice = f"replace these images, or delete {lists} to have the archives downloaded again"
        return [f"{words}; {advice}"] if bad else []

    def fetch(self, fetcher: Fetcher, files: Sequence[File]) -> list[str]:
        """Fetches files one after the other; an archive, which its check unpacks, is deleted before the next."""
        problems = []
        for file in files:
            try:
                fetcher.fetch(file)
            except InputError as error:
                problems.append(f"{error}{self.advice}")
                continue
            if file in self.archives:
                with (file.folder / UNPACKED).open("a") as names:
                    names.write(f"{file.target.name}\n")
                file.target.unlink()
        return problems


def main(argv: list[str]) -> None:
    args = parse(argv)
    names, folders = dict.fromkeys(args.items), (args.data_dir, args.weights_dir)
    download = Download([make_item(name, *folders, args.all_test_images) for name in names], args.mirror)
    if incomplete := download.get():
        words = "see above, and start the same command again to resume"
        raise InputError(f"not complete: {', '.join(incomplete)}; {words}")
    if not download.needed:
        print("everything is complete already, nothing was downloaded")
    print("complete: every file is there and can be read; python -m tools.verify compares them with what is published")


class Download:
    """A download of several items, whose sizes are printed first.

    Attributes:
        needed: whether anything is missing.
        size: the number of bytes to download, as far as the hosts tell it.
        offline: whether no host can be reached.
    """

    def __init__(self, items: Sequence[Item], mirror: str | None = None):
        self.items, self.fetcher, self.needed, self.size = items, Fetcher(mirror), False, 0
        for item in items:
            try:
                needed = item.needed()
                files = [file for file in needed if not file.target.exists()]
                sizes = [self.fetcher.size(file) for file in tqdm(files, f"sizes of {item.name}", leave=False)]
            except (InputError, OSError):  # which is reported when the item is downloaded
                self.needed = True
                continue
            self.needed, size = self.needed or bool(needed), sum(filter(None, sizes))
            self.size += size
            unknown = f", {sizes.count(None)} of unknown size" if None in sizes else ""
            print(f"{item.name}: {len(files)} files, {size / 1e9:,.3f} GB{unknown}")
        self.offline = self.fetcher.offline
        if self.needed and not self.offline:
            print(f"to download: {self.size / 1e9:,.3f} GB")

    def get(self) -> list[str]:
        """Downloads the items, prints what each is missing, and returns the names of those that are not complete."""
        incomplete = []
        for item in self.items:
            if problems := item.get(self.fetcher):
                incomplete.append(item.name)
                print(*(f"{item.name}: {problem}" for problem in problems), sep="\n", file=sys.stderr)
            else:
                print(f"{item.name} is complete")
        return incomplete


def parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m tools.download", description=__doc__, epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("items", nargs="+", choices=ITEMS, metavar="ITEM", help=", ".join(ITEMS))
    add("--data-dir", type=Path, default="revisitop", metavar="DIR", help="folder of the datasets [./revisitop]")
    add("--weights-dir", type=Path, default="weights", metavar="DIR", help="folder of the checkpoints [./weights]")
    add("--all-test-images", action="store_true", help="of gldv2, keep all 117,577 test images, not only the queries")
    add("--mirror", type=http_address, metavar="URL", help="try URL/PATH first for each https://HOST/PATH")
    return parser.parse_args(argv)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{message}; see --help")


def http_address(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text!r} is not an http:// or https:// address")
    return text.rstrip("/")


def make_item(
    name: str, data_dir: Path, weights_dir: Path, all_tests: bool = False, depths: Iterable[int] = tuple(WEIGHTS)
) -> Item:
    """Returns an item: the addresses of its files, their folders, and how they are checked."""
    if name == "weights":
        return weights(weights_dir, depths)
    if name == "features":
        return Item(name, [File((CMP, PTAK), path, data_dir, read_mat) for path in FEATURES])
    folder = dataset_folder(data_dir, name) or data_dir / name
    if name == "gldv2":
        return landmarks(folder, all_tests)
    if name == "revisitop1m":
        paths, check = [f"jpg/{name}.{n}.tar.gz" for n in range(1, 101)], partial(unpack, folder / "jpg")
        return Item(
            name,
            [File((PTAK, CMP), f"revisitop/{name}/{name}.txt", folder, check_list)],
            [File((PTAK, CMP), f"revisitop/{name}/{path}", folder, check) for path in paths],
            lambda: absent(load_distractor_list(folder)[1]),
        )
    path, check = f"revisitop/data/datasets/{name}/gnd_{name}.pkl", partial(unpack, folder / "jpg", flat=True)
    truth = File((CMP, PTAK), path, folder, partial(read_ground_truth, name))
    return Item(
        name,
        [truth],
        [File(VGG, path, folder, check) for path in IMAGES[name]],
        lambda: read_images([image.path for image in read_ground_truth(name, truth.target).images()])[1],
    )


def landmarks(folder: Path, all_tests: bool) -> Item:
    """Returns Google Landmarks v2; of its test images, only the queries are kept unless `all_tests`."""
    files, archives = [File(S3, f"google-landmark/{path}", folder) for path in LANDMARK_LISTS], []
    for kind, count in LANDMARK_ARCHIVES.items():
        lists = folder if kind == "test" and not all_tests else None
        for name in (f"images_{n:03}" for n in range(count)):
            files.append(md5 := File(S3, f"google-landmark/md5sum/{kind}/md5.{name}.txt", folder / kind))
            check = partial(unpack, folder / kind, mode="r:", md5=md5.target, queries_of=lists)
            archives.append(File(S3, f"google-landmark/{kind}/{name}.tar", folder / kind, check))
    return Item("gldv2", files, archives, lambda: absent(read_csv_dataset("gldv2", folder).images()))


def weights(folder: Path, depths: Iterable[int]) -> Item:
    """Returns the checkpoints of which the folder has none, under any name."""
    files = []
    for depth in depths:
        try:
            find_checkpoint(folder, depth)
        except InputError:
            path, check = f"personal/sumapave/public/ames/networks/{WEIGHTS[depth]}", partial(read_checkpoint, depth)
            files.append(File((PTAK,), path, folder, check, name=PUBLISHED[depth]))
    advice = f", or from the drive folder linked in weights/README.md, and put it into {folder}"
    return Item("weights", files, advice=advice)


def unpacked_names(folder: Path) -> list[str]:
    return (folder / UNPACKED).read_text().split() if (folder / UNPACKED).exists() else []


def check_list(path: Path) -> None:
    """Raises InputError if the file is not a list of images, or ends within a name."""
    names = path.read_bytes().split()
    if not names or not all(name.lower().endswith((b".jpg", b".jpeg", b".png")) for name in names):
        raise InputError(f"{path} is not a list of images")


def read_checkpoint(depth: int, path: Path) -> ResNet:
    """Returns the encoder of this depth. Raises InputError if the file does not load strictly into it."""
    with torch.device("meta"):
        encoder = ResNet(depth)
    return load_encoder(encoder, path)


def absent(images: Iterable[ImageFile]) -> list[str]:
    """Returns a line for each image that is missing."""
    bar = tqdm(images, "checking images", unit="img", dynamic_ncols=True)
    return [f"{image.path}: no such file" for image in bar if not image.path.is_file()]


def file_md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# What damaged archives raise; the last three if a member is both a file and a folder.
DAMAGED = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError)
DAMAGED += (FileExistsError, IsADirectoryError, NotADirectoryError)


def unpack(
    into: Path,
    archive: Path,
    mode: str = "r:gz",
    flat: bool = False,
    md5: Path | None = None,
    queries_of: Path | None = None,
) -> None:
    """Unpacks the files of an archive into a folder, without links; nothing at all if the archive is damaged.

    Args:
        mode: "r:gz" for .tar.gz, "r:" for .tar.
        flat: whether to leave out the folders in the archive.
        md5: a file that begins with the MD5 of the archive.
        queries_of: a folder with the lists of gldv2, to unpack only its queries.

    Raises:
        InputError: if it is damaged, or a file would be outside the folder, or this Python cannot unpack safely.
    """
    if not hasattr(tarfile, "data_filter"):
        raise InputError("this Python cannot unpack archives safely; update it to 3.10.12, 3.11.4, 3.12 or later")
    if md5 is not None and not md5.read_text().lower().startswith(file_md5(archive)):
        raise InputError(f"{archive} does not have the MD5 in {md5}")
    queries = queries_of and {f"{name}.jpg" for name in read_csv_dataset("gldv2", queries_of).query_names}

    def image(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
        name = PurePosixPath(member.name).name
        if not member.isfile() or (queries and name not in queries):
            return None
        return tarfile.data_filter(member.replace(name=name if flat else member.name, mtime=None), folder)

    new = into / ".unpacking"  # inside the folder, which may be a link to another disk
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        with tarfile.open(archive, mode) as tar:
            members = tqdm(tar, f"unpacking {archive.stem}", unit="img", dynamic_ncols=True)
            tar.extractall(new, members, filter=image)
            while tar.fileobj.read(1 << 20):  # the checksum of a .gz is at its end
                pass
        for path in [path for path in new.rglob("*") if path.is_file()]:
            target = into / path.relative_to(new)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    except DAMAGED as error:
        raise InputError(f"{archive} is damaged, unsafe or not an archive ({error})") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


if __name__ == "__main__":
    run_command(main)
