"""The embedded benchmark: drawn facades in ROxford's layout, and random weights in CVNet's format.

With it, a first run and the tests use every part of the real pipeline without a download. It tests the
code, and says nothing about accuracy. Each landmark is one facade, seen from different distances and
angles, in different light and weather, and behind occluders; the strength of the change decides whether
an image is easy, hard or junk. Everything is drawn from fixed seeds.
"""

import logging
import math
import os
import pickle
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor, nn

from cvnet_rerank.network import CVNetLayers
from extraction.files import read_pickle, write_atomically
from model.cvnet import ResNet
from model.errors import InputError
from revisitop.layouts import dataset_folder

log = logging.getLogger(__name__)

DISCLAIMER = "toy: drawn images and random weights; it shows that the code works, not how accurate the method is"
DRAWN_DISCLAIMER = "toy: drawn images; its metrics show that the code works, not how accurate a method is"

LANDMARKS = "toy_gldv2"
NAMES = ("toy", LANDMARKS)

_VERSION = 3  # increase it when the drawing changes, so that older toy folders are drawn again
_LANDMARKS = 12
_VIEWS = {
    "easy": (5, 0.05, 0.2),
    "hard": (5, 0.3, 0.5),
    "junk": (1, 1.0, 1.2),
}  # number of images, lowest and highest strength
_DISTRACTORS = 12
# Views whose cosines with positives and negatives differ by at least 1e-6, so that rounding swaps none.
_QUERY_SEEDS = (38, 0, 0, 0, 1, 0, 1, 0, 20, 17, 1, 1)
_FACADE = 320  # side of a facade in pixels, before the view is computed


def ensure_dataset(data_dir: Path, progress: Callable[[Iterable], Iterable] = iter) -> None:
    """Draws data_dir/toy if it is missing, atomically.

    Raises:
        InputError: if it cannot be written.
    """
    folder = dataset_folder(data_dir, "toy")
    if folder is not None:
        content = read_pickle(folder / "gnd_toy.pkl")
        if isinstance(content, dict) and content.get("version") == _VERSION:
            return
    with _new_folder(data_dir / "toy") as new:
        (new / "jpg").mkdir()
        _draw_dataset(new, progress)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A context that fills a folder, which appears when it is complete, in place of an older one.

    Raises:
        InputError: if it cannot be written.
    """
    new = folder.with_name(f"{folder.name}.{os.getpid()}.new")
    try:
        new.mkdir(parents=True)
        yield new
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    except OSError as error:
        raise InputError(f"cannot draw the toy dataset into {folder} ({error.strerror})") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def ensure_landmarks(data_dir: Path, progress: Callable[[Iterable], Iterable] = iter) -> None:
    """Creates data_dir/toy_gldv2 if it is missing: the images of toy in GLDv2's layout.

    Easy and hard images of toy are relevant; half of the queries are Public, half Private.

    Raises:
        InputError: if it cannot be written.
    """
    ensure_dataset(data_dir, progress)
    source, folder, marker = data_dir / "toy", data_dir / LANDMARKS, f"toy {_VERSION}\n"
    if (folder / "made_from.txt").exists() and (folder / "made_from.txt").read_text() == marker:
        return
    content = read_pickle(source / "gnd_toy.pkl")
    names, queries, truth = content["imlist"], content["qimlist"], content["gnd"]
    tables = {
        "index.csv": ["id", *names],
        "queries.csv": ["id,x0,y0,x1,y1"],
        "solution.csv": ["id,images,Usage"],
    }
    for query, each, usage in zip(queries, truth, cycle(("Public", "Private")), strict=False):
        positives = " ".join(names[number] for number in [*each["easy"], *each["hard"]])
        tables["queries.csv"].append(",".join(map(str, [query, *each["bbx"]])))
        tables["solution.csv"].append(f"{query},{positives},{usage}")
    with _new_folder(folder) as new:
        for kind, members in (("index", names), ("queries", queries)):
            (new / kind).mkdir()
            for name in members:
                shutil.copyfile(source / "jpg" / f"{name}.jpg", new / kind / f"{name}.jpg")
        for name, lines in tables.items():
            (new / name).write_text("\n".join([*lines, ""]))
        (new / "made_from.txt").write_text(marker)


def ensure_weights(folder: Path, depth: int) -> Path:
    """Returns a checkpoint of random weights in the published format, which is written on first use."""
    path = folder / f"toy_R{depth}.pyth"
    if not path.exists():
        log.info("drawing the random weights %s", path)
        checkpoint = seeded_checkpoint(depth)
        write_atomically(path, lambda file: torch.save(checkpoint, file))  # a path would stand in the file
    return path


def seeded_checkpoint(depth: int, prefix: str = "encoder_q.") -> dict:
    """Returns random weights in the format of a published checkpoint, the same on every machine.

    With the prefix "encoder_q.", as in CVNet's files, the keys of the reranker are included.
    Every tensor is drawn from NumPy's PCG64, seeded with the CRC-32 of its key without prefix. The bias of
    head.fc then removes the direction that all rectified features share, so that images differ.
    """
    with torch.device("meta"):
        encoder, reranker = ResNet(depth), CVNetLayers()
    state = _drawn_state(encoder)
    fc = state["head.fc.weight"]
    state["head.fc.bias"] = -fc.sum(dim=1) / math.sqrt(fc.shape[1])
    state = {f"{prefix}{key}": value for key, value in state.items()}
    if prefix == "encoder_q.":
        state |= _drawn_state(reranker)
    return {"epoch": 25, "model_state": state}


def _drawn_state(network: nn.Module) -> dict[str, Tensor]:
    return {key: _draw_weights(key, tuple(value.shape)) for key, value in network.state_dict().items()}


def _draw_weights(key: str, shape: tuple[int, ...]) -> Tensor:
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    if key.endswith("num_batches_tracked"):
        return torch.tensor(1000)
    if key.endswith("head.pool.p"):
        return torch.tensor([3.0])
    if len(shape) >= 2:
        values = rng.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))
    elif key.endswith("running_var"):
        values = rng.uniform(0.6, 1.4, shape)
    elif key.endswith("running_mean"):
        values = rng.normal(0, 0.1, shape)
    elif key.endswith("c_bn.weight"):  # the residual branches stay small
        values = rng.uniform(0.1, 0.4, shape)
    elif key.endswith("weight"):  # the other norms
        values = rng.uniform(0.7, 1.3, shape)
    else:  # biases
        values = rng.normal(0, 0.05, shape)
    return torch.from_numpy(values.astype(np.float32))


def _draw_dataset(folder: Path, progress: Callable[[Iterable], Iterable]) -> None:
    """Draws all images; those of the database are in mixed order, as in the real benchmarks."""
    views = [
        (landmark, kind, number, float(strength))
        for landmark in range(_LANDMARKS)
        for kind, (count, low, high) in _VIEWS.items()
        for number, strength in enumerate(np.linspace(low, high, count))
    ]
    views += [(_LANDMARKS + number, "distractor", 0, 0.3) for number in range(_DISTRACTORS)]
    order = np.random.default_rng(0).permutation(len(views))
    ground_truth = [{"bbx": None, "easy": [], "hard": [], "junk": []} for _ in range(_LANDMARKS)]
    names = [f"toy_{number:03d}" for number in range(len(views))]
    query_names = [f"toy_query_{landmark:02d}" for landmark in range(_LANDMARKS)]

    def draw(name: str, landmark: int, seed: tuple, strength: float) -> list[float]:
        rng = np.random.default_rng([zlib.crc32(str(part).encode()) for part in seed])
        image, box = draw_view(draw_facade(landmark), rng, strength)
        # Lossless, under the name that the layout requires.
        image.save(folder / "jpg" / f"{name}.jpg", format="PNG", compress_level=1)
        return box

    images = list(zip(names, (views[index] for index in order), strict=True))
    for position, (name, (landmark, kind, number, strength)) in enumerate(progress(images)):
        draw(name, landmark, (landmark, kind, number), strength)
        if kind != "distractor":
            ground_truth[landmark][kind].append(position)
    for landmark, name in enumerate(query_names):
        ground_truth[landmark]["bbx"] = draw(name, landmark, (landmark, "query", _QUERY_SEEDS[landmark]), 0.1)
    content = {"imlist": names, "qimlist": query_names, "gnd": ground_truth, "version": _VERSION}
    (folder / "gnd_toy.pkl").write_bytes(pickle.dumps(content))


def draw_facade(landmark: int) -> Image.Image:
    """Draws a building on a transparent ground, (320, 320) RGBA; its style depends only on the number."""
    rng = np.random.default_rng([7, landmark])
    side = _FACADE
    facade = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    pen = ImageDraw.Draw(facade)
    wall, trim, glass, roof = (_colour(rng, low, high) for low, high in ((90, 230), (40, 250), (10, 120), (40, 190)))
    left, right = int(rng.integers(10, 50)), side - int(rng.integers(10, 50))
    eaves, floor = int(rng.integers(60, 120)), side - 8

    # The roof: a gable, a dome, battlements or a pair of spires.
    middle, kind = (left + right) // 2, rng.integers(4)
    if kind == 0:
        pen.polygon([(left - 8, eaves), (middle, 12), (right + 8, eaves)], fill=roof)
    elif kind == 1:
        pen.ellipse([left + 20, 10, right - 20, 2 * eaves - 10], fill=roof)
    elif kind == 2:
        for x in range(left, right - 12, 32):
            pen.rectangle([x, eaves - 26, x + 16, eaves], fill=roof)
    else:
        for x in (left, right - 50):
            pen.polygon([(x, eaves), (x + 25, 5), (x + 50, eaves)], fill=roof)
    pen.rectangle([left, eaves, right, floor], fill=wall)

    # The wall's texture: courses of stone, planks, or both.
    course, plank = (int(rng.integers(6, 30)) if rng.random() < 0.7 else 0 for _ in range(2))
    joint = tuple(int(c * 0.75) for c in wall)
    if course:
        for y in range(eaves, floor, course):
            pen.line([left, y, right, y], fill=joint, width=2)
    if plank:
        for x in range(left, right, plank):
            pen.line([x, eaves, x, floor], fill=joint, width=2)

    # Windows on a grid: square, arched or round, with frames and perhaps bars.
    columns, rows = (int(n) for n in rng.integers((3, 2), (9, 6)))
    shape, bars = rng.integers(3), rng.random() < 0.5
    width, height = (right - left) / columns, (floor - eaves - 50) / rows
    for row in range(rows):
        for column in range(columns):
            x0, y0 = left + (column + 0.22) * width, eaves + 10 + (row + 0.18) * height
            x1, y1 = x0 + 0.56 * width, y0 + 0.64 * height
            outer = [x0 - 3, y0 - 3, x1 + 3, y1 + 3]
            if shape == 0:
                pen.rectangle(outer, fill=trim)
                pen.rectangle([x0, y0, x1, y1], fill=glass)
            else:
                pen.ellipse(outer, fill=trim)
                pen.ellipse([x0, y0, x1, y1], fill=glass)
                if shape == 1:
                    pen.rectangle([x0 - 3, (y0 + y1) / 2, x1 + 3, y1 + 3], fill=trim)
                    pen.rectangle([x0, (y0 + y1) / 2, x1, y1], fill=glass)
            if bars:
                pen.line([(x0 + x1) / 2, y0, (x0 + x1) / 2, y1], fill=trim, width=2)
    door = int(rng.integers(16, 34))
    pen.rectangle([middle - door, floor - 52, middle + door, floor], fill=trim)
    pen.rectangle([middle - door + 5, floor - 45, middle + door - 5, floor], fill=roof)
    return facade


def draw_view(facade: Image.Image, rng: np.random.Generator, strength: float) -> tuple[Image.Image, list[float]]:
    """Draws a view of the facade; returns the image, and the box of the facade in it.

    Strength 0 is a frontal view in clear light; at 1 little of the facade is visible.
    """
    width, height = (int(n) for n in rng.integers(140, 201, 2))
    sky = np.array([175, 200, 225]) + rng.uniform(-30, 30) + strength * rng.uniform(-25, 25, 3)
    ground = np.array([120, 115, 105]) + rng.uniform(-20, 20) + strength * rng.uniform(-25, 25, 3)
    fade = np.clip(np.linspace(-1.5, 2.5, height), 0, 1)[:, None, None]
    scene = np.broadcast_to(sky * (1 - fade) + ground * fade, (height, width, 3))
    image = Image.fromarray(scene.astype(np.uint8))

    # The positions of the four corners of the facade: distance, place, tilt and perspective.
    size = 1.3 * min(width, height) * (1 - strength * rng.uniform(-0.3, 0.45))
    centre = np.array([width, height]) / 2 + strength * rng.uniform(-0.22, 0.22, 2) * (width, height)
    angle = strength * rng.uniform(-0.25, 0.25)
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * size / 2
    corners *= 1 - 0.35 * strength * rng.random((4, 1))
    corners = corners @ np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]) + centre
    seen = facade.transform(
        (width, height), Image.Transform.PERSPECTIVE, _homography(corners), Image.Resampling.BICUBIC
    )
    image.paste(seen, mask=seen.getchannel("A"))

    # Occluders: trees and posts.
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.poisson(2 * strength))):
        x, y = rng.uniform(0, width), rng.uniform(0.45 * height, height)
        radius = rng.uniform(0.06, 0.2) * width
        leaves = tuple(int(c) for c in rng.integers((10, 60, 10), (70, 140, 60)))
        pen.rectangle([x - 3, y, x + 3, height], fill=(70, 50, 30))
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=leaves)

    # Light and weather: a tint, contrast, fog, rain or snow, and the camera's blur and noise.
    pixels = np.asarray(image, dtype=float) / 255
    pixels = pixels ** math.exp(strength * rng.uniform(-0.4, 0.4)) * (1 + strength * rng.uniform(-0.15, 0.15, 3))
    fog = strength * rng.uniform(0, 0.35)
    pixels = pixels * (1 - fog) + 0.8 * fog
    pixels += rng.normal(0, 0.005 + 0.02 * strength * rng.random(), pixels.shape)
    image = Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for x, y in rng.uniform(0, (width, height), (int(rng.poisson(30 * strength)), 2)):
        pen.line([x, y, x + 3, y + 9], fill=(225, 225, 235))
    image = image.filter(ImageFilter.GaussianBlur(strength * rng.uniform(0, 1.4)))

    low, high = corners.min(axis=0), corners.max(axis=0)
    box = [max(0.0, low[0]), max(0.0, low[1]), min(float(width), high[0]), min(float(height), high[1])]
    return image, [round(float(number), 1) for number in box]


def _colour(rng: np.random.Generator, low: int, high: int) -> tuple[int, ...]:
    return tuple(int(c) for c in rng.integers(low, high, 3))


def _homography(corners: np.ndarray) -> list[float]:
    """Returns Pillow's eight coefficients of the map from the image to the facade, given the facade's corners."""
    rows, right = [], []
    for (x, y), (u, v) in zip(corners, [(0, 0), (_FACADE, 0), (_FACADE, _FACADE), (0, _FACADE)], strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        right += [u, v]
    return np.linalg.solve(np.array(rows), np.array(right, dtype=float)).round(12).tolist()
