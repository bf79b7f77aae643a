"""Time extraction: a plain network, image by image, compared with this project in every precision.

    python benchmarks/extract.py
    python benchmarks/extract.py --device cuda --images 84
    python benchmarks/extract.py --name timm:resnet50 --scales 1
    python benchmarks/extract.py --engines openvino onnxruntime torch.compile   # pip install openvino onnxruntime onnx

The baseline is the network as it was trained, in float32, one image at a time, waiting for each
descriptor. Images are in memory; decoding is timed separately. Weights are random, because they do not
matter for speed. Other engines run the baseline's network in float32, compiled for this one size of image, on as many
threads of a CPU. "of the floor" is the time for the network's FLOPs at the device's measured matrix
rate in that precision, divided by the measured time.
"""

import argparse
import io
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from alternate import alternate, machine, matrix_rate, positive, report, timed
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import hubconf
from extraction.extract import extract_batch
from extraction.images import read_image
from model.checkpoint import load_encoder
from model.cvnet import STAGE_DEPTHS, ResNet, cvnet_backbone
from model.device import choose_device, prepare_process
from model.folding import PRECISIONS
from modules.attach import attach
from modules.descriptor import SCALE_SETS
from report.command import run_command
from revisitop.toy import seeded_checkpoint

# The shapes of a photograph; a GPU processes 21 of these at a time.
WIDTH, HEIGHT, BATCH = 1024, 768, 21
ENGINES = ("openvino", "onnxruntime", "torch.compile")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    parser.add_argument("--name", default="cvnet", help="another network, such as timm:NAME, untrained [cvnet]")
    parser.add_argument("--depth", type=positive, default=50, choices=STAGE_DEPTHS, help="layers of the ResNet [50]")
    parser.add_argument("--scales", type=positive, default=3, choices=SCALE_SETS, help="number of scales [3]")
    parser.add_argument("--size", type=sides, default=(WIDTH, HEIGHT), help=f"of the images [{WIDTH}x{HEIGHT}]")
    parser.add_argument("--images", type=positive, help=f"images per run [2, on a GPU {3 * BATCH}]")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=PRECISIONS, help="[fp32 bf16]")
    parser.add_argument("--engines", nargs="+", default=[], choices=ENGINES, help="other engines, for cvnet [none]")
    parser.add_argument("--repeat", type=positive, default=5, help="runs of each, whose median is used [5]")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    if args.engines and (args.name != "cvnet" or device.type != "cpu"):
        parser.error("--engines needs cvnet and a CPU")
    prepare_process(device)
    count = args.images or (3 * BATCH if device.type == "cuda" else 2)
    images = draw_images(count, *args.size, device)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = random_checkpoint(folder, args.depth)
        extractors = {
            name: extractor(args.name, checkpoint, args.depth, scales=args.scales, precision=name, device=device)
            for name in args.precision
        }
        if args.name == "cvnet":
            plain = PlainNetwork(checkpoint, args.depth, SCALE_SETS[args.scales]).to(device)
        else:
            plain = extractor(args.name, checkpoint, args.depth, scales=args.scales, device=device)
        decoding = decoding_seconds(Path(folder), *args.size)
    rates = {name: matrix_rate(device, PRECISIONS[name]) for name in args.precision}
    flops = flops_of(partial(one_by_one, plain, images[:1], device))
    contenders = {"baseline": partial(one_by_one, plain, images, device)}
    contenders |= {name: partial(in_batches, each, images, BATCH) for name, each in extractors.items()}
    for name in args.engines:
        contenders[name] = partial(one_by_one, compiled(name, plain, images[0][None]), images, device)
    timings = alternate(contenders, device, args.repeat)
    width, height = args.size
    print(f"{args.name}, {args.scales} scales, {width}x{height}, {count} images a run, {machine(device)}")
    report(timings, "baseline", "img/s", lambda seconds: count / seconds)
    reference = timings["baseline"].value
    for name in args.precision:
        rate = max(rates[name], matrix_rate(device, PRECISIONS[name]))  # the speed of the machine may have changed
        each, rows = timings[name].median / count, timings[name].value
        print(
            f"{name}: {100 * flops / rate / each:.0f}% of the floor ({flops / 1e9:.1f} GFLOP per image, "
            f"{rate / 1e9:.0f} GFLOP/s); decoding needs {decoding / each:.1f} processes; from the baseline's rows: "
            f"{(rows - reference).abs().max():.1e} at most, cosine {(rows * reference).sum(1).min():.6f}"
        )


def sides(text: str) -> tuple[int, int]:
    """Parses WIDTHxHEIGHT."""
    width, _, height = text.partition("x")
    return positive(width), positive(height)


def random_checkpoint(folder: str | Path, depth: int) -> Path:
    """Writes a checkpoint of reproducible random weights, and returns its path."""
    path = Path(folder) / "random.pyth"
    torch.save(seeded_checkpoint(depth), path)
    return path


def draw_image(width: int, height: int, seed: int) -> np.ndarray:
    """Draws smooth colours with some noise, which take about as long to decode as a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (-(-height // 32), -(-width // 32), 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    return (smooth + rng.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)


def draw_images(count: int, width: int, height: int, device: torch.device) -> list[Tensor]:
    """Returns images (H, W, 3) on the CPU, pinned for a GPU; eight are drawn and repeated."""
    drawn = [torch.from_numpy(draw_image(width, height, seed)) for seed in range(min(8, count))]
    drawn = [image.pin_memory() if device.type == "cuda" else image for image in drawn]
    return [drawn[number % len(drawn)] for number in range(count)]


def extractor(name: str, checkpoint: Path, depth: int = 50, **options) -> nn.Module:
    """Returns this project's extractor, (N, H, W, 3) uint8 RGB -> (N, D), see hubconf for the options."""
    if name == "cvnet":
        entry = {50: hubconf.superglobal_resnet50, 101: hubconf.superglobal_resnet101}[depth]
        return entry(checkpoint, **options).extractor
    return hubconf.superglobal(name, "untrained", **options).extractor


class PlainNetwork(nn.Module):
    """CVNet's network as it was trained, with the modules of SuperGlobal, in the form of an extractor."""

    def __init__(self, checkpoint: Path, depth: int, scales: tuple[float, ...]):
        super().__init__()
        self.backbone = cvnet_backbone(load_encoder(ResNet(depth), checkpoint))
        relup = self.backbone.relup_stages
        self.network = attach(self.backbone.network, (), scales=scales, projection="head.fc", relup=relup)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network(self.backbone.normalise(pixels))


def compiled(engine: str, network: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns the network as another engine runs it on a CPU, for images of this shape, (1, H, W, 3) -> (1, D)."""
    threads = torch.get_num_threads()
    if engine == "torch.compile":
        return torch.compile(network)
    if engine == "openvino":
        import openvino

        model = openvino.convert_model(torch.export.export(network, (images,)))
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        run = openvino.compile_model(model, "CPU", settings)
        return lambda images: torch.from_numpy(run(images.numpy())[0])
    import onnxruntime

    program = torch.onnx.export(torch.export.export(network, (images,)), dynamo=True)
    program.save(file := io.BytesIO())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


def one_by_one(network: Callable[[Tensor], Tensor], images: list[Tensor], device: torch.device) -> Tensor:
    """Returns the descriptors (N, D) on the CPU, each of which is waited for."""
    with torch.inference_mode():
        return torch.cat([network(image[None].to(device)).cpu() for image in images])


def in_batches(network: nn.Module, images: list[Tensor], size: int) -> Tensor:
    """Returns the descriptors (N, D) on the CPU; all batches are queued before the first is waited for."""
    parts = [images[start : start + size] for start in range(0, len(images), size)]
    return torch.cat([extract_batch(network, part) for part in parts]).cpu()


def flops_of(run: Callable[[], object]) -> int:
    """Returns the FLOPs of a run: those of convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def decoding_seconds(folder: Path, width: int, height: int) -> float:
    """Returns the seconds to decode one JPEG in one process."""
    Image.fromarray(draw_image(width, height, 0)).save(path := folder / "image.jpg", quality=90)
    return statistics.median(timed(partial(read_image, path), torch.device("cpu")) for _ in range(10))


if __name__ == "__main__":
    run_command(main)
