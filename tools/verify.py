"""Check in a minute that this machine computes the paper's results, and that its data and weights are complete.

python -m tools.verify
python -m tools.verify TEST.DATA_DIR DIR TEST.WEIGHTS DIR TEST.DEVICE cuda --json

descriptors  the paper's descriptors of two images, in each precision, on the CPU and the GPU
protocol     the metrics of bundled rankings, and rankings after reranking
environment  versions, TF32, resizing, JPEG files, EXIF
datasets     the datasets of TEST.DATASET_LIST, as python -m tools.check NAME, and the list of the distractors
weights      the checkpoints in TEST.WEIGHTS

✓ is right, ✗ is wrong and says what to do, – is missing or only noted. Exit codes: 0, or 2 if something is wrong.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
import PIL.features
import torch
from PIL import ExifTags, Image
from torch.nn.functional import avg_pool2d, conv2d
from yacs.config import CfgNode

import revisitop
from assembly import DEFAULT_WEIGHTS, find_dataset, option
from config import CommandLine
from extraction.extract import extract_batch
from extraction.images import read_image
from extraction.jpeg import decodes_as_pillow
from model.backbone import PRECISIONS
from model.checkpoint import PUBLISHED, find_checkpoint, sha256
from model.cvnet import STAGE_DEPTHS
from model.device import choose_device, device_name, forbid_tf32
from model.errors import InputError, reason_of, short_list
from model.recipe import Recipe
from modules.descriptor import rescale
from modules.reranking import SuperGlobalReranker
from modules.search import Database
from report.command import run_command
from report.log import package_versions
from revisitop.dataset import Dataset, GroundTruth
from revisitop.descriptors import load_features
from revisitop.evaluate import evaluate, evaluate_ranks
from revisitop.layout_revisitop import load_distractor_list
from revisitop.published import published
from revisitop.retrieve import rerank, retrieve
from revisitop.toy import seeded_checkpoint
from tools.check import Finding, check_dataset, checked, read_images
from tools.download import UNPACKED, read_checkpoint

REFERENCE = Path(revisitop.__file__).parent / "reference"  # computed by the paper's released code
LARGEST = {"fp32": 2e-6, "bf16": 2e-3, "fp16": 5e-4}  # differences of an element of a descriptor
PRODUCT_ERROR = 1e-5  # of products in float32; those in TF32 are wrong by 1e-4
SAMPLE = 1000  # distractors whose files are looked at

Check = Callable[[CfgNode], Iterable[Finding]]


def main(argv: list[str]) -> None:
    line = CommandLine(__doc__, ("TEST.DATA_DIR", "TEST.DATASET_LIST", "TEST.WEIGHTS", "TEST.DEVICE"))
    line.add("--json", action="store_true", help="print JSON")
    args, cfg, _ = line.parse(argv)
    sections: dict[str, list[Finding]] = {}
    for title, check in CHECKS.items():
        sections[title] = [*check(cfg)]
        if not args.json:
            print(title, *sections[title], sep="\n  ", flush=True)
    if args.json:
        print(json.dumps({title: [each._asdict() for each in found] for title, found in sections.items()}, indent=1))
    if wrong := [title for title, findings in sections.items() if any(each.ok is False for each in findings)]:
        raise InputError(f"{', '.join(wrong)}: see the lines with ✗")


def verify(cfg: CfgNode) -> list[Finding]:
    """Returns the findings of all checks."""
    return [finding for check in CHECKS.values() for finding in check(cfg)]


def devices(cfg: CfgNode) -> list[torch.device]:
    """Returns the devices to verify, without TF32 as in every command: that of TEST.DEVICE, with auto the CPU, too."""
    with option("TEST.DEVICE"):
        device = choose_device(cfg.TEST.DEVICE)
    if device.type == "cuda":
        forbid_tf32()
    return list(dict.fromkeys((torch.device("cpu"), device) if cfg.TEST.DEVICE == "auto" else (device,)))


def product_error(device: torch.device) -> float:
    """Returns the largest relative error of a matrix product and a convolution in float32, in the current settings."""
    x = torch.linspace(1, 2, 64 * 64).reshape(64, 64)
    exact, y = x.double() @ x.double(), x.to(device)
    results = y @ y, conv2d(y.reshape(1, 64, 8, 8), y.reshape(64, 64, 1, 1)).reshape(64, 64)
    return max((result.double().cpu() / exact - 1).abs().max().item() for result in results)


def check_descriptors(cfg: CfgNode) -> Iterator[Finding]:
    """Yields how far descriptors are from those of the paper's released code, for each device and precision."""
    with tempfile.TemporaryDirectory() as folder, np.load(REFERENCE / "reference.npz") as reference:
        torch.save(seeded_checkpoint(50, prefix=""), weights := Path(folder) / "seeded.pyth")
        for device, precision in product(devices(cfg), PRECISIONS):
            words = f"{device_name(device)}, {precision}"
            try:
                extractor = Recipe(weights=weights, precision=precision).extractor(device)
                numbers = (0, 1) if precision == "fp32" else (1,)  # half precision is slow on many CPUs
                pixels = [torch.from_numpy(reference[f"image_{number}"]) for number in numbers]
                found = np.stack([extract_batch(extractor, [image])[0].cpu().numpy() for image in pixels])
            except RuntimeError as error:
                yield Finding(None, f"{words}: not supported ({reason_of(error)})")
                continue
            expected = np.stack([reference[f"descriptor_all_3_image_{number}"] for number in numbers])
            largest, cosine = abs(found - expected).max(), (found * expected).sum(axis=1).min()
            words += f": largest difference {largest:.1e} of {LARGEST[precision]:.0e}, cosine {cosine:.7f}"
            advice = "restore the files of this project, install another PyTorch, or choose another TEST.DEVICE"
            right = largest <= LARGEST[precision]
            mistakes = ("RGB", "antialias") if right and precision == "fp32" else () if right else ("RGB",)
            yield checked(right, words, f"these are not the paper's descriptors; {advice}", *mistakes)


def check_protocol(cfg: CfgNode) -> Iterator[Finding]:
    """Yields whether bundled rankings have the expected metrics, before and after reranking."""
    given = json.loads((REFERENCE / "evaluation.json").read_text())
    kinds = ("easy", "hard", "junk")
    truth = [GroundTruth({kind: np.array(lists[kind], dtype=np.int64) for kind in kinds}) for lists in given["gnd"]]
    metrics = evaluate_ranks(np.array(given["ranks"]).T, truth)
    largest = max(abs(metrics[name].map - expected["map"]) for name, expected in given["expected"].items())
    advice = "restore the files of this project, git checkout ."
    yield checked(largest < 1e-9, f"mAP of bundled rankings: largest difference {largest:.0e}", advice)
    with np.load(REFERENCE / "reference.npz") as reference:
        queries, rows = (torch.from_numpy(reference[name]) for name in ("rerank_Q", "rerank_X"))
        expected = reference["rerank_ranks_M400_K9_b0.15"].T
    database = Database([rows])
    found = rerank(retrieve(queries, database, len(rows)), SuperGlobalReranker(), queries, database).ids.numpy()
    same = (found == expected).mean()
    yield checked(same == 1, f"ranking after reranking: {same:.2%} of the places as expected", advice, "S2")


def check_environment(cfg: CfgNode) -> Iterator[Finding]:
    """Yields versions, and whether products, resizing and decoding are those of the paper."""
    versions = package_versions()
    yield Finding(True, ", ".join(f"{name} {version}" for name, version in versions.items()))
    for device in devices(cfg):
        error = product_error(device)
        words = f"products in float32 on {device_name(device)}: largest relative error {error:.0e}"
        advice = "it is that of TF32, remove NVIDIA_TF32_OVERRIDE from the environment"
        yield checked(error <= PRODUCT_ERROR, words, advice)
    x = torch.arange(16.0).square().reshape(1, 1, 4, 4)
    halved = torch.allclose(rescale(x, 0.5), avg_pool2d(x, 2))
    words = f"images are resized {'without antialiasing' if halved else 'in another way than for the paper'}"
    yield checked(halved, words, "install another version of PyTorch", "antialias")
    library = f"Pillow {versions['pillow']}"
    if decodes_as_pillow():
        library = f"simplejpeg, to the same pixels as {library}"
    turbo = PIL.features.check_feature("libjpeg_turbo")
    words = f"JPEG files are decoded by {library} with {'libjpeg-turbo' if turbo else 'another libjpeg'}"
    yield checked(turbo, words, "pip install --force-reinstall pillow")
    with tempfile.TemporaryDirectory() as folder:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6  # turned by a quarter
        Image.new("RGB", (40, 20)).save(path := Path(folder) / "turned.jpg", exif=exif)
        upright = read_image(path).shape == (40, 20, 3)
    words = f"the EXIF orientation of images is {'followed' if upright else 'ignored'}"
    yield checked(upright, words, "pip install --upgrade pillow")


def check_datasets(cfg: CfgNode) -> Iterator[Finding]:
    """Yields the findings of tools.check about each dataset, its published descriptors, and the distractors."""
    for name in cfg.TEST.DATASET_LIST:
        try:
            dataset = find_dataset(cfg, name)
        except InputError as error:
            yield Finding(None, f"{name}: {error}")
            continue
        yield from (each._replace(text=f"{name}: {each.text}") for each in check_dataset(dataset))
        yield from check_features(dataset, Path(cfg.TEST.DATA_DIR))
    folder = Path(cfg.TEST.DATA_DIR) / "revisitop1m"
    if not folder.is_dir():
        return
    try:
        _, images = load_distractor_list(folder)
    except InputError as error:
        yield Finding(False, str(error))
        return
    count, expected = len(images), published()["distractors"]
    advice = f"and start python -m tools.download revisitop1m --data-dir {folder.parent}"
    words = f"revisitop1m: {count:,} images are listed, {expected:,} are published"
    yield checked(count == expected, words, f"delete {folder / 'revisitop1m.txt'} {advice}")
    sample = [images[number].path for number in range(0, count, max(1, count // SAMPLE))]
    damaged = read_images(sample)[1]
    words = f"revisitop1m: of a sample of {len(sample):,} images, {len(damaged)} are damaged or missing"
    bad = f" ({short_list(damaged)})" if damaged else ""
    yield checked(not damaged, f"{words}{bad}", f"delete them and {folder / UNPACKED} {advice}")


def check_features(dataset: Dataset, folder: Path) -> Iterator[Finding]:
    """Yields whether revisitop's example descriptors, if they are there, have the published metrics."""
    path = folder / f"{dataset.name}_resnet_rsfm120k_gem.mat"
    expected = published()["datasets"].get(dataset.name, {}).get("features")
    if not expected or not path.exists():
        return
    try:
        queries, rows, *_ = load_features(path, dataset)
        ranking = retrieve(queries, Database([rows]), listed=dataset.listed)
    except InputError as error:
        yield Finding(False, str(error))
        return
    found = {name: 100 * each.map for name, each in evaluate(ranking, dataset.ground_truth, dataset.protocols).items()}
    ours, theirs = (" / ".join(f"{value:.2f}" for value in maps.values()) for maps in (found, expected))
    right = max(abs(found[name] - value) for name, value in expected.items()) < 0.01
    words = f"{path.name}: mAP {ours}, {theirs} is published"
    yield checked(right, words, f"replace {path} and the gnd_{dataset.name}.pkl", *["junk"] * right)


def check_weights(cfg: CfgNode) -> list[Finding]:
    """Returns whether the checkpoints of each depth, or that of the file given, load strictly, and their GeM power."""
    path = DEFAULT_WEIGHTS if cfg.TEST.WEIGHTS == "auto" else Path(cfg.TEST.WEIGHTS)
    findings = [check_checkpoint(path, depth) for depth in STAGE_DEPTHS]
    return [each for each in findings if each.ok] or findings if path.is_file() else findings


def check_checkpoint(folder: Path, depth: int) -> Finding:
    """Returns whether the checkpoint of this depth in a folder, or a file, loads strictly, and its GeM power."""
    try:
        path = find_checkpoint(folder, depth)
    except InputError as error:
        other = (folder / PUBLISHED[depth]).exists()  # a damaged file, or another network
        return Finding(False if other else None, str(error))
    try:
        power = read_checkpoint(depth, path).head.pool["p"].item()
    except InputError as error:
        return Finding(False, str(error))
    return Finding(True, f"{path}: ResNet-{depth}, loaded strictly; GeM power {power:.3f}; SHA-256 {sha256(path)}")


CHECKS: dict[str, Check] = {
    "descriptors": check_descriptors,
    "protocol": check_protocol,
    "environment": check_environment,
    "datasets": check_datasets,
    "weights": check_weights,
}

if __name__ == "__main__":
    run_command(main)
