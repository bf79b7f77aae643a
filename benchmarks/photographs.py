"""Measure the accuracy with a public trained network: mAP on real photographs, module by module.

    python benchmarks/photographs.py --folder /tmp/photographs

The network is EfficientNet-Lite0 with its ImageNet weights; the photographs are those in the wheels of
scikit-image and scikit-learn, so that nothing beyond these packages is downloaded. Each photograph, or each
part of a larger one, is a landmark. The database contains views of it, drawn from seeds with increasing
strength (perspective, crop, light, blur, JPEG): the weaker half is easy, the stronger half hard; the query is
a mild view. The strength was chosen once, with average pooling only; the modules have their usual settings.

The views are drawn three times, with different seeds, as datasets in the folder; test.py evaluates each of
them with each setting, and the table has the mean and the range over the three.
"""

import argparse
import io
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import numpy as np
from alternate import positive
from PIL import Image, ImageFilter

from model.errors import InputError
from report.command import run_command

ROOT = Path(__file__).parents[1]

# The numbers of rows and columns of landmarks into which the photographs are cut.
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

# The options of each row. ReLU+ belongs in the stage with stride 4 (the first of a ResNet), here these two blocks.
ONE = ["TEST.SCALE_LIST", "1", "SupG.sgem", "False"]
PLAIN = ["SupG.rgem", "False", "SupG.relup", "False"]
RELUP = ["SupG.relup_stages", "['_blocks.1', '_blocks.2']", "SupG.relup_ends", "[]"]
SETTINGS: dict[str, list[str]] = {
    "average pooling, one scale": ["MODEL.POOLING", "average", *PLAIN, *ONE],
    "average pooling, three scales": ["MODEL.POOLING", "average", *PLAIN, "SupG.sgem", "False"],
    "average pooling, three scales, Scale-GeM": ["MODEL.POOLING", "average", *PLAIN],
    "GeM (p = 3), one scale": ["SupG.gemp", "False", *PLAIN, *ONE],
    "GeM+, one scale": [*PLAIN, *ONE],
    "+ Regional-GeM": ["SupG.relup", "False", *ONE],
    "+ Scale-GeM, three scales": ["SupG.relup", "False"],
    "+ ReLU+": RELUP,
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder for the datasets and their descriptors")
    parser.add_argument("--seeds", type=positive, default=3, help="drawings [3]")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    names = [draw_dataset(args.folder, seed).name for seed in range(args.seeds)]
    print("| mAP in percent | Easy | Medium | Hard |\n| --- | --- | --- | --- |")
    for title, options in SETTINGS.items():
        found = evaluate(args.folder, names, options)
        print(row(title, [each["retrieval"] for each in found]), flush=True)
    print(row("+ reranking", [each["reranking"] for each in found]))


def row(title: str, found: list[dict]) -> str:
    """Returns a line of the table: the mean, lowest and highest value over the drawings."""
    cells = []
    for protocol in "EMH":
        values = [each[protocol]["mAP"] for each in found]
        cells.append(f"{np.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})")
    return f"| {title} | {' | '.join(cells)} |"


def evaluate(folder: Path, names: list[str], options: list[str]) -> list[dict]:
    """Returns the results of test.py on these datasets, as in results.json."""
    command = [sys.executable, str(ROOT / "test.py"), "MODEL.NAME", f"{ROOT}/benchmarks/efficientnet_lite.py:build"]
    command += ["TEST.DATA_DIR", str(folder.absolute()), "TEST.DATASET_LIST", str(names), *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"test.py ended with {done.returncode}: {done.stderr.splitlines()[-1]}")
    results = json.loads((folder / "output" / "runs" / "latest" / "results.json").read_text())
    return [results["datasets"][name] for name in names]


def draw_dataset(
    folder: Path, seed: int = 0, photographs: Mapping[str, tuple[int, int]] = PHOTOGRAPHS, views: int = VIEWS,
    side: int = SIDE,
) -> Path:  # fmt: skip
    """Draws a dataset in revisitop's layout if it is missing, with a query per landmark, and returns its folder.

    The images are the same every time; those of a landmark do not depend on other landmarks.
    """
    name = f"photographs_{seed}"
    target, new = folder / name, folder / f"{name}.new"
    if target.exists():
        return target
    shutil.rmtree(new, ignore_errors=True)
    (new / "jpg").mkdir(parents=True)
    names, queries, truth = [], [], []
    strengths = [number / views for number in range(1, views + 1)] + [QUERY_STRENGTH]
    for photograph, grid in photographs.items():
        for part, region in enumerate(read_parts(photograph, *grid, side)):
            landmark = f"{photograph.split('.')[0]}_{part}"
            images = [f"{landmark}_{number:02}" for number in range(views)]
            for number, (image, strength) in enumerate(zip([*images, f"{landmark}_query"], strengths, strict=True)):
                rng = np.random.default_rng([*photograph.encode(), part, number, *([seed] if seed else [])])
                # Lossless, under the name that the layout requires.
                draw_view(region, rng, strength, side).save(new / "jpg" / f"{image}.jpg", format="PNG")
            easy, hard = np.split(len(names) + np.arange(views), [views // 2])
            truth.append({"bbx": [0, 0, side, side], "easy": easy.tolist(), "hard": hard.tolist(), "junk": []})
            names += images
            queries.append(f"{landmark}_query")
    content = {"imlist": names, "qimlist": queries, "gnd": truth}
    (new / f"gnd_{name}.pkl").write_bytes(pickle.dumps(content))
    new.rename(target)
    return target


def read_parts(name: str, rows: int, columns: int, side: int) -> list[Image.Image]:
    """Returns the landmarks of a photograph, row by row, with a shorter side 1.5 times that of a view."""
    package, folder = ("sklearn", "datasets/images") if name in OF_SKLEARN else ("skimage", "data")
    try:
        with (files(package) / folder / name).open("rb") as file:
            image = Image.open(file).convert("RGB")
    except (ModuleNotFoundError, FileNotFoundError):
        raise InputError(f"{name} of {package} is missing; pip install -r tests/requirements.txt") from None
    width, height = image.width // columns, image.height // rows
    places = [(x * width, y * height) for y in range(rows) for x in range(columns)]
    size = [round(1.5 * side * length / min(width, height)) for length in (width, height)]
    return [image.crop((x, y, x + width, y + height)).resize(size, Image.Resampling.LANCZOS) for x, y in places]


def draw_view(region: Image.Image, rng: np.random.Generator, strength: float, side: int) -> Image.Image:
    """Draws a view of the region, side x side; strength 0 is its centre in clear light."""
    # The corners of the view within the region: tilt and perspective, then zoom and place.
    sine, cosine = np.sin(angle := strength * rng.uniform(-0.6, 0.6)), np.cos(angle)
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (1 - 0.4 * strength * rng.random((4, 1)))
    corners = corners @ np.array([[cosine, sine], [-sine, cosine]])
    corners = (corners - corners.min(axis=0)) / np.ptp(corners, axis=0).max()  # within the unit square
    extent = min(region.size) * (1 - strength * rng.uniform(0.2, 0.7))
    corners = corners * extent + (np.array(region.size) - extent) / 2 * (1 + strength * rng.uniform(-1, 1, 2))
    coefficients = perspective(side, corners)
    view = region.transform((side, side), Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BICUBIC)
    # Light: gamma, contrast, brightness and tint; then the camera's blur and JPEG.
    pixels = (np.asarray(view) / 255) ** np.exp(strength * rng.uniform(-0.6, 0.6)) - 0.5
    pixels = 0.5 + pixels * (1 + strength * rng.uniform(-0.6, 0.3))
    pixels += strength * (rng.uniform(-0.2, 0.2) + rng.uniform(-0.08, 0.08, 3))
    view = Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8))
    view = view.filter(ImageFilter.GaussianBlur(strength * rng.uniform(0, 3) * side / SIDE))
    view.save(file := io.BytesIO(), "JPEG", quality=round(90 - strength * rng.uniform(0, 70)))
    return Image.open(file).convert("RGB")


def perspective(side: int, corners: np.ndarray) -> list[float]:
    """Returns Pillow's eight coefficients of the map from the corners of a square image to these, (4, 2)."""
    equations = []
    for (x, y), (u, v) in zip([(0, 0), (side, 0), (side, side), (0, side)], corners, strict=True):
        equations += [[x, y, 1, 0, 0, 0, -u * x, -u * y, u], [0, 0, 0, x, y, 1, -v * x, -v * y, v]]
    return np.linalg.solve(np.array(equations)[:, :8], np.array(equations)[:, 8]).tolist()


if __name__ == "__main__":
    run_command(main)
