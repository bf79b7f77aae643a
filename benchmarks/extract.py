"""Time extraction: a plain network, image by image, compared with this project in every precision.

    python benchmarks/extract.py
    python benchmarks/extract.py --device cuda --images 84
    python benchmarks/extract.py --name timm:resnet50 --scales 1

The baseline is the network as it was trained, in float32, one image at a time, waiting for each
descriptor. Images are in memory; decoding is timed separately. Weights are random, because they do not
matter for speed. "of the floor" is the time for the network's FLOPs at the device's measured matrix
rate in that precision, divided by the measured time.
"""

import argparse
import io
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["TQDM_DISABLE"] = "1"

from alternate import alternate, machine, matrix_rate, positive, report

from extraction.extract import extract_images
from extraction.images import ImageFile, read_image, to_network_input
from extraction.loading import PLAIN_LOADING, Loading
from extraction.store import DescriptorStore
from model.checkpoint import load_encoder
from model.device import choose_device, forbid_tf32, prepare_process
from model.extractor import Extractor
from model.folding import PRECISIONS
from model.network_recipe import NetworkRecipe
from model.recipe import Recipe
from model.resnet import STAGE_DEPTHS, ResNet
from model.superglobal import SuperGlobal
from modules.descriptor import SCALE_SETS
from modules.pooling import GeMPlus, RegionalGeM, ScaleGeM
from report.command import run_command
from revisitop.toy import seeded_checkpoint


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    parser.add_argument("--name", help="another network, such as timm:NAME, untrained, instead of CVNet's")
    parser.add_argument("--depth", type=positive, default=50, choices=STAGE_DEPTHS, help="layers of the ResNet [50]")
    parser.add_argument("--scales", type=positive, default=3, choices=SCALE_SETS, help="number of scales [3]")
    parser.add_argument("--size", type=sides, default="1024x768", help="WIDTHxHEIGHT of the images [1024x768]")
    parser.add_argument("--images", type=positive, help="images per run [2, on a GPU 63]")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=PRECISIONS, help="[fp32 bf16]")
    parser.add_argument("--repeat", type=positive, default=5, help="runs of each, whose median is used [5]")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    width, height = args.size
    count = args.images or (63 if device.type == "cuda" else 2)  # a GPU processes 21 of 1024x768 at a time
    images = [InMemory(draw_image(width, height, seed)) for seed in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        scales = SCALE_SETS[args.scales]
        recipe: Recipe | NetworkRecipe = Recipe(random_checkpoint(folder, args.depth), args.depth, scales=scales)
        if args.name:
            recipe = NetworkRecipe(args.name, "untrained", scales)
        contenders = {"baseline": partial(baseline, recipe, device, images)}
        loading = Loading(pin_memory=device.type == "cuda")
        contenders |= {
            name: partial(ours, replace(recipe, precision=name), device, images, loading) for name in args.precision
        }
        rates = {name: matrix_rate(device, PRECISIONS[name]) for name in args.precision}
        timings = alternate(contenders, args.repeat)
        flops = network_flops(recipe, width, height)
    print(
        f"{args.name or f'ResNet-{args.depth}'}, {args.scales} scales, {width}x{height}, {count} images a run, "
        f"{machine(device)}"
    )
    report(timings, "baseline", "img/s", lambda seconds: count / seconds)
    reference = timings["baseline"].value
    for name in args.precision:
        rate = max(rates[name], matrix_rate(device, PRECISIONS[name]))  # the speed of the machine may have changed
        floor = count * flops / rate
        rows = timings[name].value
        print(
            f"{name:<12}{100 * floor / timings[name].median:.0f}% of the floor "
            f"({flops / 1e9:.0f} GFLOP per image, {rate / 1e9:.0f} GFLOP/s); from the baseline's "
            f"descriptors: {np.abs(rows - reference).max():.1e} at most, cosine {(rows * reference).sum(1).min():.6f}"
        )
    decoding = decoding_seconds(width, height)
    for name in args.precision:
        needed = math.ceil(decoding * count / timings[name].median)
        print(f"{name:<12}worker processes needed for decoding: {needed} ({1000 * decoding:.0f} ms per JPEG)")


def sides(text: str) -> tuple[int, int]:
    """Parses WIDTHxHEIGHT."""
    width, _, height = text.partition("x")
    return positive(width), positive(height)


def random_checkpoint(folder: str | Path, depth: int) -> Path:
    """Writes a checkpoint of reproducible random weights, and returns its path."""
    path = Path(folder) / "random.pyth"
    torch.save(seeded_checkpoint(depth), path)
    return path


class InMemory:
    """Stands for a extraction.images.ImageFile, with pixels in memory."""

    def __init__(self, pixels: np.ndarray):
        self.pixels, self.path = pixels, Path("memory")

    def read(self) -> np.ndarray:
        return self.pixels


def draw_image(width: int, height: int, seed: int) -> np.ndarray:
    """Draws smooth colours with some noise, which take about as long to decode as a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (-(-height // 32), -(-width // 32), 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    return (smooth + rng.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)


def baseline(recipe: Recipe | NetworkRecipe, device: torch.device, images: list[InMemory]):
    if isinstance(recipe, NetworkRecipe):
        extractor = recipe.extractor(device)

        def one_by_one() -> np.ndarray:
            with torch.no_grad():
                pixels = [torch.from_numpy(image.read())[None] for image in images]
                return torch.cat([extractor(each.to(device)).cpu() for each in pixels]).numpy()

        return one_by_one
    encoder = load_encoder(ResNet(recipe.depth), recipe.checkpoint)
    model = SuperGlobal(encoder, recipe.scales, GeMPlus(), RegionalGeM(), ScaleGeM()).eval().to(device)
    forbid_tf32()

    def run() -> np.ndarray:
        with torch.no_grad():
            pixels = [torch.from_numpy(image.read())[None] for image in images]
            return torch.cat([model(to_network_input(each.to(device))).cpu() for each in pixels]).numpy()

    return run


def ours(
    recipe: Recipe | NetworkRecipe,
    device: torch.device,
    images: list[InMemory] | list[ImageFile],
    loading: Loading = PLAIN_LOADING,
):
    prepare_process(device)
    return into_store(recipe.extractor(device), images, loading)


def into_store(extractor: Extractor, images: list[InMemory] | list[ImageFile], loading: Loading):
    def run() -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            store = DescriptorStore(Path(folder) / "rows.npy", len(images), extractor.dim, {})
            extract_images(extractor, images, store, store.missing(), "benchmark", loading)
            store.finish()
            return np.load(store.path)

    return run


def network_flops(recipe: Recipe | NetworkRecipe, width: int, height: int) -> int:
    """Counts the FLOPs of one image, for convolutions and projection, without computing them."""
    model = recipe.network("meta") if isinstance(recipe, Recipe) else recipe.attached().to("meta")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.empty(1, 3, height, width, device="meta"))
    return counter.get_total_flops()


def decoding_seconds(width: int, height: int) -> float:
    """Returns the seconds to decode one JPEG in one process."""
    file = io.BytesIO()
    Image.fromarray(draw_image(width, height, 0)).save(file, "JPEG", quality=90)
    seconds = []
    for _ in range(10):
        file.seek(0)
        start = time.perf_counter()
        read_image(file)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    run_command(main)
