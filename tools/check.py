"""Check the folder of a dataset: its layout, its lists, and which images are missing or damaged.

python -m tools.check NAME TEST.DATA_DIR DIR
python -m tools.check NAME --decode

A dataset is a folder in TEST.DATA_DIR in one of six layouts: revisitop's (gnd_NAME.pkl, jpg/), GLDv2's (index.csv,
queries.csv, solution.csv, index/, queries/), a folder of images per class, query/ and gallery/ with a folder per class,
database/ and queries/ of places with UTM coordinates, or a folder per object with query/ and pos/ (ILIAS).
"""

import os
from collections import Counter
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from assembly import find_dataset, small_set_advice
from config import DATASET, CommandLine
from model.errors import InputError, printable, short_list
from report.command import run_command
from revisitop.dataset import Dataset


def main(argv: list[str]) -> None:
    line = CommandLine(__doc__, DATASET)
    line.add("name", metavar="NAME", help="name of the dataset's folder")
    line.add("--decode", action="store_true", help="also decode every image, which may take long")
    args, cfg, _ = line.parse(argv)
    dataset = find_dataset(cfg, args.name)
    for text in in_words(dataset):
        print(printable(text))
    if advice := small_set_advice(cfg, dataset):
        print(advice)
    missing, count = dataset.missing_files()
    if missing:
        raise InputError(f"{len(missing)} of {count} images are missing ({short_list(missing)})")
    print(f"images: all {count:,} files exist")
    if args.decode:
        images = tqdm(dataset.images(), total=len(dataset.queries) + len(dataset.database), unit="img")
        if damaged := list(dict.fromkeys(problem for image in images if (problem := image.problem()))):
            raise InputError(f"{len(damaged)} images cannot be used: {short_list(damaged, 50)}")
        print("images: all can be decoded")


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
    for kind in dataset.ground_truth[0].kinds:
        counts = np.array([len(truth.kinds[kind]) for truth in dataset.ground_truth])
        yield (
            f"{kind}: {counts.sum():,} in all, {counts.min():,} to {counts.max():,} per query, "
            f"median {np.median(counts):g}; {(counts == 0).sum():,} queries without"
        )
    boxes = sum(image.box is not None for image in dataset.queries)
    yield f"boxes: {boxes:,} of {len(dataset.queries):,} queries have one"
    measured = dict.fromkeys(each.measure for each in dataset.protocols)
    size = len(dataset.database)
    values = [f"{each.title}, {each.at}@{','.join(str(k) for k in each.kappas if k <= size)}" for each in measured]
    yield f"metrics: {'; '.join(values)} for {', '.join(each.title for each in dataset.protocols)}"


if __name__ == "__main__":
    run_command(main)
