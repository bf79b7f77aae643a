"""Download images, ground truth, example descriptors and weights into the folders where the commands look for them.

python -m tools.download roxford5k rparis6k weights
python -m tools.download revisitop1m features

The same command can be started again at any time: existing files are only verified, interrupted downloads
are resumed, and an archive is deleted once its images are unpacked.
"""

import argparse
import os
import re
import sys
import webbrowser
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import torch

from model.checkpoint import PUBLISHED, find_checkpoint, load_encoder
from model.errors import InputError, short_list
from model.resnet import ResNet
from report.command import run_command
from revisitop.descriptors import load_mat
from revisitop.layout_revisitop import load_distractor_list, read_ground_truth
from revisitop.layouts import dataset_folder
from tools.archives import find_bad, unpack, unpack_all
from tools.gldv2 import get_gldv2
from tools.transfer import Fetcher, Source


@dataclass(frozen=True)
class Images:
    """A set of images: the file that lists them, their archives, and whether these are unpacked without folders."""

    listing: Source
    archives: tuple[Source, ...]
    flat: bool


VGG = ("https://www.robots.ox.ac.uk", "http://www.robots.ox.ac.uk")
CMP, PTAK = "http://cmp.felk.cvut.cz", "http://ptak.felk.cvut.cz"
NETWORKS = "personal/sumapave/public/ames/networks"
IMAGES = {
    "roxford5k": Images(
        Source((CMP, PTAK), "revisitop/data/datasets/roxford5k/gnd_roxford5k.pkl"),
        (Source(VGG, "~vgg/data/oxbuildings/oxbuild_images-v1.tgz"),),
        flat=True,
    ),
    "rparis6k": Images(
        Source((CMP, PTAK), "revisitop/data/datasets/rparis6k/gnd_rparis6k.pkl"),
        tuple(Source(VGG, f"~vgg/data/parisbuildings/paris_{n}-v1.tgz") for n in (1, 2)),
        flat=True,
    ),
    "revisitop1m": Images(
        Source((PTAK, CMP), "revisitop/revisitop1m/revisitop1m.txt"),
        tuple(Source((PTAK, CMP), f"revisitop/revisitop1m/jpg/revisitop1m.{n}.tar.gz") for n in range(1, 101)),
        flat=False,
    ),
}
FEATURES = tuple(
    Source((CMP, PTAK), f"revisitop/data/features/{name}_resnet_rsfm120k_gem.mat") for name in ("roxford5k", "rparis6k")
)
WEIGHTS = {
    50: Source((PTAK,), f"{NETWORKS}/{PUBLISHED[50]}"),
    101: Source((), f"{NETWORKS}/{PUBLISHED[101]}"),  # no known host has it, but a --mirror may
}
DRIVE = "https://github.com/sungonce/CVNet"  # its README links to a web drive with both
ITEMS = (*IMAGES, "gldv2", "features", "weights")

HELP = f"""items:
  roxford5k    ground truth and images of ROxford5k: DATA_DIR/roxford5k/
  rparis6k     ground truth and images of RParis6k: DATA_DIR/rparis6k/
  revisitop1m  list and 100 archives of the million distractors: DATA_DIR/revisitop1m/
  gldv2        Google Landmarks v2: lists, solution, 100 archives of index images (about 85 GB) and 20 of test images
               (10 GB), of which only the 1,129 queries are kept: DATA_DIR/gldv2/
  features     revisitop's example descriptors, for TEST.FEATURES: DATA_DIR/*.mat
  weights      WEIGHTS_DIR/{PUBLISHED[50]}; for {PUBLISHED[101]}, instructions

--mirror URL: each file is requested from URL first, with the same path as on its own host, which is the fallback:
{CMP}/{FEATURES[0].path}
is requested as URL/{FEATURES[0].path}

Files and archives from other sources are used, too, if they are in the folder of the item.
Exit codes: 0 if everything is complete; 2 if something is missing, with a line that says what to do."""


def main(argv: list[str]) -> None:
    args = parse(argv)
    fetcher = Fetcher(args.mirror)
    missing = {}
    for item in dict.fromkeys(args.items):
        folder = args.weights_dir if item == "weights" else args.data_dir
        try:
            if item in IMAGES:
                missing[item] = get_images(fetcher, item, folder)
            elif item == "gldv2":
                missing[item] = get_gldv2(fetcher, folder / "gldv2", args.all_test_images)
            else:
                missing[item] = {"features": get_features, "weights": get_weights}[item](fetcher, folder)
        except OSError as error:  # of the disk; those of the network are InputErrors
            missing[item] = [f"{error.filename or folder}: {error.strerror}"]
        if not missing[item]:
            print(f"{item} is complete")
    for item, problems in missing.items():
        for problem in problems:
            print(f"{item}: {problem}", file=sys.stderr)
    if incomplete := [item for item, problems in missing.items() if problems]:
        raise InputError(
            f"not complete: {', '.join(incomplete)}; see above, and start the same command again to resume"
        )
    if not fetcher.fetched:
        print("everything is complete already, nothing was downloaded")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m tools.download", description=__doc__, epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("items", nargs="+", choices=ITEMS, metavar="ITEM", help=", ".join(ITEMS))
    parser.add_argument(
        "--data-dir", type=Path, default=Path("revisitop"), metavar="DIR", help="folder of the datasets [./revisitop]"
    )
    parser.add_argument(
        "--weights-dir", type=Path, default=Path("weights"), metavar="DIR", help="folder of the checkpoints [./weights]"
    )
    parser.add_argument(
        "--all-test-images", action="store_true", help="of gldv2, keep all 117,577 test images, not only the queries"
    )
    parser.add_argument("--mirror", type=_http_address, metavar="URL", help="a mirror to try first; see below")
    return parser.parse_args(argv)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{message}; see --help")


def _http_address(text: str) -> str:
    if not re.match(r"https?://[^/]", text) or not urlsplit(text).hostname:
        raise argparse.ArgumentTypeError(f"{text!r} is not an http:// or https:// address")
    return text.rstrip("/")


def get_images(fetcher: Fetcher, name: str, data_dir: Path) -> list[str]:
    """Downloads the list and the archives that are not unpacked yet, and checks all images. Returns what is missing."""
    wanted, folder = IMAGES[name], dataset_folder(data_dir, name) or data_dir / name
    has_ground_truth = wanted.listing.name.endswith(".pkl")
    problems = []
    try:
        fetcher.fetch(wanted.listing, folder, partial(read_ground_truth, name) if has_ground_truth else check_list)
    except InputError as error:
        problems.append(str(error))

    def bad_images() -> list[str]:
        if not has_ground_truth:
            return find_bad(load_distractor_list(folder)[1], name, decode=False)
        dataset = read_ground_truth(name, folder / wanted.listing.name)
        return find_bad([*dataset.images()], name, decode=True)

    marker = folder / "unpacked.txt"
    begun = marker.exists() and bool(marker.read_text().split())
    if not begun and not problems and not bad_images():  # they came from another source
        return []
    problems += unpack_all(
        fetcher, wanted.archives, folder, folder / "jpg",
        lambda source, new: lambda archive: unpack(archive, new, wanted.flat),
    )  # fmt: skip
    if not problems and (bad := bad_images()):
        problems.append(
            f"{len(bad)} images are missing or damaged ({short_list(bad)}), and all archives are unpacked; "
            f"replace these images, or delete {marker} to have the archives fetched again"
        )
    return problems


def get_features(fetcher: Fetcher, data_dir: Path) -> list[str]:
    """Downloads revisitop's example descriptors. Returns what is missing."""
    problems = []
    for source in FEATURES:
        try:
            fetcher.fetch(source, data_dir, check_mat)
        except InputError as error:
            problems.append(str(error))
    return problems


def get_weights(fetcher: Fetcher, folder: Path) -> list[str]:
    """Downloads the checkpoints. Returns what is missing, with instructions if there is no address."""
    problems = []
    for depth, source in WEIGHTS.items():
        try:
            find_checkpoint(folder, depth)  # under any name
            continue
        except InputError:
            pass
        try:
            fetcher.fetch(source, folder, partial(check_checkpoint, depth))
        except InputError as error:
            problems.append(f"{error}; get {source.name} from the web drive linked at {DRIVE} and put it into {folder}")
    has_display = sys.platform in ("darwin", "win32") or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())
    if problems and has_display and sys.stdout.isatty():
        webbrowser.open(DRIVE)
    return problems


def check_list(path: Path) -> None:
    """Raises InputError if the file is not a list of image names, or ends within one."""
    names = [line.strip() for line in path.read_bytes().splitlines() if line.strip()]
    wrong = [name for name in names if not re.search(rb"\.(jpe?g|png)$", name, re.IGNORECASE)]
    if wrong or not names:
        raise InputError(f"{path} is not a list of images: {f'it has {wrong[0][:40]!r}' if wrong else 'it is empty'}")


def check_mat(path: Path) -> None:
    """Raises InputError if the file is not a MATLAB file with the descriptors Q and X."""
    if not {"Q", "X"} <= load_mat(path).keys():
        raise InputError(f"{path} has no Q and X (query and database descriptors)")


def check_checkpoint(depth: int, path: Path) -> None:
    """Raises InputError if the file is not a checkpoint of this depth."""
    with torch.device("meta"):
        encoder = ResNet(depth)
    load_encoder(encoder, path)


if __name__ == "__main__":
    run_command(main)
