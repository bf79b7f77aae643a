"""Measure how each classic mistake changes mAP, for the causes that tools.reproduce names.

    python benchmarks/signatures.py --folder /tmp/signatures

Each mistake is made on purpose on toy (drawn images, random weights) and on drawings of the photographs (real ones, a
trained network, see photographs.py), and its differences from the correct run are written to
revisitop/signatures.json, in percent, as soon as they are measured. At the end, each mistake is looked up by its own
pattern and, as a fairer test, among the signatures of the other sets only.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import photographs
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from extraction.extract import extract_batch
from extraction.images import ImageFile
from model.recipe import Recipe
from modules import descriptor
from modules.descriptor import SCALES
from modules.reranking import SuperGlobalReranker
from modules.search import Database
from report.command import run_command
from revisitop import toy
from revisitop.dataset import Dataset, GroundTruth
from revisitop.evaluate import evaluate
from revisitop.layouts import load_dataset
from revisitop.stages import Reranked, search_for
from tools.causes import SIGNATURES, causes

ROOT = Path(__file__).parents[1]
ROTATED = 10  # every so many database images are rotated, as if their EXIF orientation were ignored


@dataclass(frozen=True)
class Mistake:
    """A classic mistake, as the difference from a correct run.

    Attributes:
        settings: settings of the recipe.
        s2: the descriptors that SuperGlobal's reranking compares with the expanded query.
        antialias: whether images are resized with antialiasing.
        data: returns the dataset with the mistake; copies of images are written into the folder.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    s2: str = "refined"
    antialias: bool = False
    data: Callable[[Dataset, Path], Dataset] = lambda dataset, folder: dataset


def with_images(
    dataset: Dataset, folder: Path, change: Callable[[Image.Image], Image.Image], factor: float = 1.0, every: int = 1
) -> Dataset:
    """Returns the dataset with changed copies of its images, or of every so many database images; boxes are scaled."""
    folder.mkdir(parents=True, exist_ok=True)

    def copied(image: ImageFile) -> ImageFile:
        path = folder / f"{image.path.stem}.png"
        if not path.exists():
            change(Image.fromarray(ImageFile(image.path).read())).save(path)
        return ImageFile(path, image.box and tuple(factor * number for number in image.box))

    database = [image if number % every else copied(image) for number, image in enumerate(dataset.database)]
    return replace(dataset, queries=[copied(q) for q in dataset.queries] if every == 1 else dataset.queries,
                   database=database)  # fmt: skip


def without_junk(dataset: Dataset, folder: Path) -> Dataset:
    none = np.empty(0, dtype=np.int64)
    return replace(dataset, ground_truth=[GroundTruth({**t.kinds, "junk": none}) for t in dataset.ground_truth])


def without_boxes(dataset: Dataset, folder: Path) -> Dataset:
    return replace(dataset, queries=[ImageFile(query.path) for query in dataset.queries])


MISTAKES = {
    "antialias": Mistake(antialias=True),
    "RGB": Mistake(data=lambda d, folder: with_images(d, folder, lambda i: Image.merge("RGB", i.split()[::-1]))),
    "no crop": Mistake(data=without_boxes),
    "one scale": Mistake({"scales": (1.0,)}),
    "EXIF": Mistake(data=lambda d, folder: with_images(d, folder, lambda i: i.rotate(90, expand=True), every=ROTATED)),
    "plain ReLU": Mistake({"relup_threshold": None}),
    "S2": Mistake(s2="original"),
    "half": Mistake({"precision": "bf16"}),
    "resized": Mistake(data=lambda d, folder: with_images(d, folder, lambda i: i.reduce(2), factor=0.5)),
    "junk": Mistake(data=without_junk),
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder for the datasets and changed images")
    parser.add_argument("--sets", nargs="+", default=["toy", "toy, one scale", "photographs_0"], help="[%(default)s]")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    signatures = json.loads(SIGNATURES.read_text())
    for name in args.sets:
        signatures[name] = {}
        for mistake, differences in measure(*prepare(name, args.folder), args.folder / f"{name}_mistakes"):
            if any(differences.values()):
                signatures[name][mistake] = differences
                SIGNATURES.write_text(in_lines(signatures))
    for name, rows in signatures.items():
        others = {each: found for each, found in signatures.items() if each != name}
        for mistake, pattern in rows.items():
            places = [causes([(name, pattern)], among) for among in (signatures, others)]
            own, fair = (each.index(mistake) + 1 if mistake in each else None for each in places)
            print(f"{name}, {mistake}: place {own}; without the signatures of {name} {fair}")


def prepare(name: str, folder: Path) -> tuple[Dataset, Recipe]:
    """Returns a set and the recipe of the correct run."""
    if name.startswith("toy"):
        toy.ensure_dataset(folder)
        scales = SCALES if name == "toy" else (1.0,)
        return load_dataset("toy", folder), Recipe(weights=toy.ensure_weights(folder / "toy", 50), scales=scales)
    photographs.draw_dataset(folder, int(name.rpartition("_")[2]), dict.fromkeys(photographs.GRIDS[2, 2], (2, 2)))
    network = f"{ROOT}/benchmarks/efficientnet_lite.py:build"
    return load_dataset(name, folder), Recipe(network, relup_stages=("_blocks.1", "_blocks.2"), relup_ends=())


def measure(dataset: Dataset, recipe: Recipe, folder: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Yields each mistake with its differences in mAP, by "stage protocol"."""
    rows: dict[tuple, Tensor] = {}
    correct = maps(dataset, recipe, Mistake(), rows)
    print(f"{dataset.name}: {correct}", flush=True)
    for name, mistake in MISTAKES.items():
        found = maps(mistake.data(dataset, folder / name), replace(recipe, **mistake.settings), mistake, rows)
        differences = {key: round(value - correct[key], 2) for key, value in found.items()}
        print(f"{dataset.name}, {name}: {differences}", flush=True)
        yield name, differences


def maps(dataset: Dataset, recipe: Recipe, mistake: Mistake, rows: dict[tuple, Tensor]) -> dict[str, float]:
    """Returns mAP in percent by "stage protocol"; descriptors are kept in `rows`."""
    settings, rescale = (str(recipe.settings()), mistake.antialias), descriptor.rescale
    extractor = recipe.extractor()
    if mistake.antialias:
        descriptor.rescale = antialiased
    try:
        for image in tqdm([*dataset.images()], desc=dataset.name, unit="img", leave=False):
            if (settings, image) not in rows:
                rows[settings, image] = extract_batch(extractor, [torch.from_numpy(image.read())])[0]
    finally:
        descriptor.rescale = rescale
    queries, database = (
        torch.stack([rows[settings, image] for image in images]) for images in (dataset.queries, dataset.database)
    )
    stage = Reranked(SuperGlobalReranker(s2=mistake.s2))
    searched = search_for([stage], queries, Database([database]), dataset.listed)
    rankings = {"retrieval": searched.ranking, "reranking": stage(searched)}
    return {
        f"{title} {name}": 100 * metrics.map
        for title, ranking in rankings.items()
        for name, metrics in evaluate(ranking, dataset.ground_truth, dataset.protocols).items()
    }


def antialiased(x: Tensor, factor: float) -> Tensor:
    """Returns the images resized as by torchvision's default since 0.17, see modules.descriptor.rescale."""
    size = [max(1, int(side * factor)) for side in x.shape[-2:]]
    return x if factor == 1 else F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)


def in_lines(signatures: dict) -> str:
    """Returns the JSON with a line for each mistake."""
    sets = []
    for name, rows in signatures.items():
        lines = ",\n".join(f"  {json.dumps(mistake)}: {json.dumps(values)}" for mistake, values in rows.items())
        sets.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(sets) + "\n}\n"


if __name__ == "__main__":
    run_command(main)
