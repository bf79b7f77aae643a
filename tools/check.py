"""Check the folder of a dataset: its layout, its lists, and which images are missing or damaged.

python -m tools.check NAME TEST.DATA_DIR DIR
python -m tools.check NAME --decode

A dataset is a folder in TEST.DATA_DIR in one of six layouts: revisitop's (gnd_NAME.pkl, jpg/), GLDv2's (index.csv,
queries.csv, solution.csv, index/, queries/), a folder of images per class, query/ and gallery/ with a folder per class,
database/ and queries/ of places with UTM coordinates, or a folder per object with query/ and pos/ (ILIAS).
ROxford and RParis are compared with what is published about them. tools.verify checks the machine and the weights,
too.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm

from assembly import find_dataset, small_set_advice
from config import DATASET, CommandLine
from extraction.images import FORMATS, ImageFile, ReadingLimits, set_reading_limits
from model.errors import InputError, printable, short_list
from report.command import run_command
from revisitop.dataset import Dataset
from revisitop.published import published

MARKS = {True: "✓", False: "✗", None: "–"}


class Finding(NamedTuple):
    """A result of a check: a tick, or a problem and what to do; None for what is missing or only noted.

    Attributes:
        ok: whether it is as it should be.
        text: the result in a line.
        mistakes: the mistakes of tools.causes that a tick rules out, or that a problem suggests.
    """

    ok: bool | None
    text: str
    mistakes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return printable(f"{MARKS[self.ok]} {self.text}")


def checked(ok: bool, text: str, advice: str, *mistakes: str) -> Finding:
    """Returns a tick, or a problem with what to do about it, see Finding."""
    return Finding(bool(ok), text if ok else f"{text}; {advice}", mistakes)


class Header(NamedTuple):
    """The upright size of an image, and whether EXIF turns it, from its header."""

    width: int
    height: int
    turned: bool


def main(argv: list[str]) -> None:
    line = CommandLine(__doc__, (*DATASET, "DATA_LOADER.MAX_PIXELS", "DATA_LOADER.TRUNCATED"))
    line.add("name", metavar="NAME", help="name of the dataset's folder")
    line.add("--decode", action="store_true", help="decode every image, which may take long, not only its header")
    line.add("--list", action="store_true", help="print the files in the order of the rows of descriptors")
    args, cfg, _ = line.parse(argv)
    set_reading_limits(ReadingLimits(cfg.DATA_LOADER.MAX_PIXELS, cfg.DATA_LOADER.TRUNCATED))
    dataset = find_dataset(cfg, args.name)
    for text in in_words(dataset):
        print(printable(text))
    if advice := small_set_advice(cfg, dataset):
        print(f"{advice}, with the options of your network")
    for part, images in (("query", dataset.queries), ("database", dataset.database)) if args.list else ():
        for number, image in enumerate(images):
            print(printable(f"{part} {number} {image.path}"))
    findings = list(check_dataset(dataset, args.decode))
    print(*findings, sep="\n")
    if any(finding.ok is False for finding in findings):
        raise InputError(f"{args.name}: see the lines with {MARKS[False]}")


def in_words(dataset: Dataset) -> Iterator[str]:
    """Yields the description of a dataset line by line."""
    yield f"{dataset!r}"
    yield f"layout: {dataset.layout}"
    for part, images in (("queries", dataset.queries), ("database", dataset.database)):
        folders = Counter(os.path.relpath(image.path.parent, dataset.folder) for image in images)
        yield f"{part} in: {short_list([f'{name}/ ({count:,})' for name, count in folders.items()])}"
    usages = Counter(truth.usage for truth in dataset.ground_truth)
    if usages.keys() != {""}:
        yield f"queries by usage: {', '.join(f'{usage} {count:,}' for usage, count in sorted(usages.items()))}"
    for kind in (kind for kind in dataset.ground_truth[0].kinds if kind != "itself"):
        counts = np.array([len(truth.kinds[kind]) for truth in dataset.ground_truth])
        each = f"{counts.min():,} to {counts.max():,} per query, median {np.median(counts):g}"
        each = each if np.ptp(counts) else f"{counts[0]:,} per query"
        yield f"{kind}: {counts.sum():,} in all, {each}; {(counts == 0).sum():,} queries without"
    measured = dict.fromkeys(each.measure for each in dataset.protocols)
    size = len(dataset.database)
    values = [f"{each.title}, {each.at}@{','.join(str(k) for k in each.kappas if k <= size)}" for each in measured]
    yield f"metrics: {'; '.join(values)} for {', '.join(each.title for each in dataset.protocols)}"


def check_dataset(dataset: Dataset, decode: bool = False) -> Iterator[Finding]:
    """Yields the findings about a dataset: its counts, files and boxes, and the sizes of its images.

    Args:
        decode: whether all images are decoded; else only their headers and ends are read.
    """
    known = published()["datasets"].get(dataset.name, {})
    if known:
        yield from check_lists(dataset, known)
    missing, count = dataset.missing_files()
    if missing:
        folder = missing[0].parent
        yield Finding(
            False, f"{len(missing)} of {count} images are missing ({short_list(missing)}); put them in {folder}"
        )
        return
    headers, damaged = read_images(list(dict.fromkeys(image.path for image in dataset.images())), decode)
    if damaged:
        yield Finding(False, f"{len(damaged)} of {count} images cannot be used: {short_list(damaged)}; replace them")
    else:
        yield Finding(True, f"all {count:,} images exist and {'can be decoded' if decode else 'are complete'}")
    if turned := sum(header.turned for header in headers.values()):
        yield Finding(None, f"{turned:,} images are turned by their EXIF orientation, as they are read here")
    if known or any(query.box for query in dataset.queries):
        yield check_boxes(dataset, headers, cropped=bool(known))
    if known:
        yield check_sizes(dataset, headers, known["longer_side"])


def check_lists(dataset: Dataset, known: dict) -> Iterator[Finding]:
    """Yields the findings about the counts of a published dataset, and about its junk images."""
    again = download_again(dataset, f"gnd_{dataset.name}.pkl")
    counts, expected = (len(dataset.queries), len(dataset.database)), (known["queries"], known["images"])
    words = f"{counts[0]} queries, {counts[1]:,} database images; {expected[0]} and {expected[1]:,} are published"
    yield checked(counts == expected, words, again)
    junk = sum(len(truth.kinds.get("junk", ())) for truth in dataset.ground_truth)
    words = f"{junk:,} junk images are listed, which are ignored" if junk else "no query lists junk images to ignore"
    yield checked(junk > 0, words, again, "junk")


def check_boxes(dataset: Dataset, headers: dict[Path, Header], cropped: bool = True) -> Finding:
    """Returns whether the boxes of queries lie within their images and, if they should, crop them."""
    boxed = [query for query in dataset.queries if query.box]
    outside, whole = [], 0
    for query in boxed:
        if header := headers.get(query.path):
            x0, y0, x1, y1 = query.box
            whole += x0 <= 1 and y0 <= 1 and x1 >= header.width - 1 and y1 >= header.height - 1
            if min(x0, y0) < -1 or x1 > header.width + 1 or y1 > header.height + 1:
                outside.append(f"{query.path.name}, {header.width} x {header.height}")
    if outside:
        words = f"{len(outside)} query boxes leave their images ({short_list(outside)}), which were resized or rotated"
        return checked(False, words, download_again(dataset), "EXIF", "resized")
    if whole == len(boxed):
        words = f"boxes: no query is cropped: {whole:,} have a box, which is the whole image"
        again = download_again(dataset, f"gnd_{dataset.name}.pkl")
        return checked(False, words, again, "no crop") if cropped else Finding(None, words)
    return Finding(True, f"boxes: {len(boxed):,} of {len(dataset.queries):,} queries have one, within its image",
                   ("no crop",))  # fmt: skip


def check_sizes(dataset: Dataset, headers: dict[Path, Header], side: int) -> Finding:
    """Returns whether the sizes of images can be those of the originals, most of which have this longer side."""
    sides = np.array([max(header.width, header.height) for header in headers.values()])
    words = f"{(sides == side).mean():.0%} of the images have a longer side of {side}, {(sides > side).sum():,} longer"
    original = not (sides > side).any() and (sides == side).mean() >= 0.5
    return checked(original, words, f"these are not the originals; {download_again(dataset)}", "resized")


def download_again(dataset: Dataset, name: str = "") -> str:
    """Returns what to do to get a file of a published dataset again, or all of it."""
    command = f"python -m tools.download {dataset.name} --data-dir {dataset.folder.parent}"
    return f"delete {dataset.folder / name} and start {command}"


def read_images(paths: Sequence[Path], decode: bool = False) -> tuple[dict[Path, Header], list[str]]:
    """Returns the headers of the images that can be read, and a line for each other one.

    Args:
        decode: whether to decode all of them, and not only those whose header or end is damaged.
    """

    def read(path: Path) -> Header | str:
        header = read_header(path)
        if (decode or header is None) and (problem := ImageFile(path).problem()):
            return problem
        return header or Header(0, 0, False)

    with ThreadPoolExecutor() as pool:
        bar = tqdm(pool.map(read, paths), "checking images", len(paths), unit="img", dynamic_ncols=True, leave=False)
        results = dict(zip(paths, bar, strict=True))
    headers = {path: result for path, result in results.items() if isinstance(result, Header)}
    return headers, [result for result in results.values() if isinstance(result, str)]


def read_header(path: Path) -> Header | None:
    """Returns the header of an image; None if it, or the end of a JPEG file, is damaged."""
    try:
        with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1)
            file.seek(-2, os.SEEK_END)
            if image.format == "JPEG" and file.read(2) != b"\xff\xd9":
                return None
            width, height = image.size[::-1] if turned > 4 else image.size
            return Header(width, height, turned != 1)
    except Exception:  # decoders raise any exception
        return None


if __name__ == "__main__":
    run_command(main)
