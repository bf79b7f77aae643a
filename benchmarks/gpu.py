"""All measurements that need a GPU, in less than ten minutes.

    python benchmarks/gpu.py --out results.json
    python benchmarks/gpu.py --device cpu --small

Parts run in order of importance, results are printed immediately, and a failing part does not end the
others: rates of the device; descriptors, search and rerankers compared with those of a CPU;
synchronisations; extraction, reranking, search and CVNet-Rerank compared with plain baselines; running
out of memory; a folder of JPEG files; the slowest kernels. Weights and images are random, because they do
not matter for speed. Goals are printed beside the results. "of the floor" is the time for the network's
FLOPs at the measured matrix rate of that precision, divided by the measured time.
"""

import argparse
import gc
import json
import os
import platform
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["TQDM_DISABLE"] = "1"

import extract
import rerank
import speedup
from alternate import Timing, best_seconds, machine, matrix_rate, measure, timed

from extraction.extract import extract_batch
from extraction.images import ImageFile
from extraction.loading import Loading
from model.device import choose_device, prepare_process
from model.errors import InputError
from model.extractor import NetworkExtractor
from model.folding import PRECISIONS
from model.recipe import Recipe
from modules.pooling import GEMP_EPS, GEMP_P, RGEM_P, RGEM_WINDOW, GeMPlus, RegionalGeM
from modules.reranking import RERANK_K, RERANK_M, SuperGlobalReranker
from modules.search import Database, search
from report.command import run_command

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "data" / "reference.npz"
SYNCHRONISATION = "called a synchronizing CUDA operation"


@dataclass(frozen=True)
class Sizes:
    """The sizes of the problems; the defaults are those of the numbers in the README."""

    matrix: int = 8192
    buffer: int = 1 << 30  # bytes
    image: tuple[int, int] = (1024, 768)
    batches: tuple[int, ...] = (1, 8, 21, 42)
    batch: int = 21  # for the parts that use a single batch size
    queries: int = 70
    database: int = 5000
    dim: int = 2048
    m: int = RERANK_M
    k: int = RERANK_K
    fixtures: tuple[int, ...] = (0, 1)
    checked_rows: int = 50_000
    rows: int = 1_000_000
    listed: int = 120
    pairs: int = 30
    files: int = 1024
    workers: tuple[int, ...] = (4, 8, 16)
    caps: tuple[float, ...] = (3, 1, 0.6, 0.45)  # GiB
    seconds: float = 0.5  # per measurement
    repeat: int = 3
    precisions: tuple[str, ...] = ("fp32", "bf16", "fp16")


SMALL = Sizes(
    matrix=256, buffer=1 << 20, image=(48, 32), batches=(1,), batch=1, queries=3, database=300, dim=64, m=60, k=5,
    fixtures=(1,), checked_rows=500, rows=2000, listed=5, pairs=1, files=2, workers=(1,), seconds=0, repeat=1,
    precisions=("fp32", "bf16"),
)  # fmt: skip


@dataclass
class Visit:
    """The device, the settings of the measurements, and their results.

    Attributes:
        device, sizes, folder: the device, the sizes of the problems, and the folder for files.
        file: the file for the results, or None.
        extractors: the networks created so far, by precision.
        lines, failures, figures: the printed lines per part; the errors of failed parts; the results by name.
    """

    device: torch.device
    sizes: Sizes
    folder: Path
    file: Path | None = None
    extractors: dict[str, NetworkExtractor] = field(default_factory=dict)
    lines: dict[str, list[str]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def say(self, text: str) -> None:
        print(f"  {text}", flush=True)
        next(reversed(self.lines.values())).append(text)

    def figure(self, name: str, value: float, unit: str, at_least: float | None = None, below: float | None = None):
        """Prints and keeps a result, with its goal if there is one."""
        self.figures[name] = float(value)
        goal = ""
        if at_least is not None:
            goal = f"   [goal >= {at_least:,g}: {'met' if value >= at_least else 'missed'}]"
        if below is not None:
            goal = f"   [goal < {below:,g}: {'met' if value < below else 'missed'}]"
        self.say(f"{name}: {value:,.4g} {unit}{goal}")

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """A context in which an error is printed in a line or two, and does not end the other parts."""
        try:
            yield
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            first = str(error).strip().partition("\n")[0][:300]
            self.failures[what] = f"{type(error).__name__}: {first} ({Path(where.filename).name}:{where.lineno})"
            self.say(f"{what} FAILED, {self.failures[what]}")
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def measure(self, run: Callable[[], Any]) -> Timing:
        return measure(run, self.sizes.repeat, self.sizes.seconds)

    def recipe(self, precision: str = "fp32") -> Recipe:
        return Recipe(self.folder / "random.pyth", precision=precision)

    def extractor(self, precision: str) -> NetworkExtractor:
        """Returns the network on the device, which is created once."""
        if precision not in self.extractors:
            self.extractors[precision] = self.recipe(precision).extractor(self.device)
        return self.extractors[precision]

    def rerank_sizes(self) -> tuple:
        s = self.sizes
        return s.queries, s.database, s.dim, s.m, s.k, self.device

    def save(self) -> None:
        if self.file is not None:
            kept = {"machine": machine(self.device), "lines": self.lines, "failures": self.failures}
            self.file.write_text(json.dumps({**kept, "figures": self.figures}, indent=1))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    parser.add_argument("--small", action="store_true", help="tiny problems without meaningful results, for a test")
    parser.add_argument("--minutes", type=float, default=9, help="time limit; parts that do not fit are skipped [9]")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="[all]")
    parser.add_argument("--out", type=Path, help="a JSON file for the results [gpu.json in the folder OUT, if set]")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    out = args.out or (Path(os.environ["OUT"]) / "gpu.json" if os.environ.get("OUT") else None)
    with tempfile.TemporaryDirectory() as folder:
        extract.random_checkpoint(folder, 50)
        visit = Visit(choose_device(args.device), SMALL if args.small else Sizes(), Path(folder), out)
        for name in args.parts:
            part, estimate = PARTS[name]
            left = 60 * args.minutes - (time.perf_counter() - start)
            print(f"\n{name} ({time.perf_counter() - start:.0f} s)", flush=True)
            visit.lines[name] = []
            if left < (0 if args.small else estimate):
                visit.say(f"skipped: it takes about {estimate} s, but {left:.0f} s are left")
            else:
                with visit.attempt(name):
                    part(visit)
            visit.save()
    print(f"\nRows for benchmarks/README.md ({time.perf_counter() - start:.0f} s)\n")
    print("\n".join(table_rows(visit)), flush=True)
    if visit.failures:
        print(f"\nfailed: {', '.join(visit.failures)}")


def rates(visit: Visit) -> None:
    """Measures how fast the device multiplies and copies. It runs first, because it changes TF32's setting and back."""
    device, sizes = visit.device, visit.sizes
    visit.say(f"{machine(device)}, Python {platform.python_version()}, {os.cpu_count()} cores")
    if visit.on_gpu:
        memory = torch.cuda.get_device_properties(device).total_memory
        visit.say(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, {memory / 2**30:.0f} GiB")
        torch.set_float32_matmul_precision("high")
        rate = matrix_rate(device, torch.float32, sizes.matrix)
        torch.set_float32_matmul_precision("highest")
        visit.figure("matrix product, TF32", rate / 1e12, "TFLOP/s")
    prepare_process(device)
    for name, dtype in PRECISIONS.items():
        visit.figure(f"matrix product, {name}", matrix_rate(device, dtype, sizes.matrix) / 1e12, "TFLOP/s")
    x = torch.zeros(sizes.buffer, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    visit.figure("memory, read and written", 2 * x.nbytes / best_seconds(lambda: y.copy_(x), device) / 1e9, "GB/s")
    if not visit.on_gpu:
        visit.say("TF32 and the bus need a GPU")
        return
    for kind in ("pinned", "pageable"):
        host = torch.zeros(sizes.buffer // 4, dtype=torch.uint8, pin_memory=kind == "pinned")
        there = x[: len(host)]
        up = best_seconds(partial(there.copy_, host, non_blocking=True), device)
        down = best_seconds(partial(host.copy_, there, non_blocking=True), device)
        visit.figure(f"bus, {kind}, to the device", host.nbytes / up / 1e9, "GB/s")
        visit.figure(f"bus, {kind}, from the device", host.nbytes / down / 1e9, "GB/s")


def parity(visit: Visit) -> None:
    """Compares descriptors, rankings and new orders with those of the fixtures and of a CPU."""
    device, sizes = visit.device, visit.sizes
    prepare_process(device)
    with np.load(FIXTURES) as arrays:
        reference = dict(arrays)
    for precision in sizes.precisions:
        name, closest = f"descriptors, {precision}", 0.99999 if precision == "fp32" else 0.9999
        with visit.attempt(name):
            extractor = visit.extractor(precision)
            images = [torch.from_numpy(reference[f"image_{i}"]) for i in sizes.fixtures]
            made = np.stack([extract_batch(extractor, [image]).cpu().numpy()[0] for image in images])
            expected = np.stack([reference[f"descriptor_all_3_image_{i}"] for i in sizes.fixtures])
            visit.figure(f"{name}, largest difference", np.abs(made - expected).max(), "")
            visit.figure(f"{name}, cosine", (made * expected).sum(axis=1).min(), "", at_least=closest)
    with visit.attempt("pooling in one kernel"):
        from modules.fused_pooling import regional_gem  # needs Triton

        feature_map = torch.rand(2, sizes.dim, 24, 32, device=device).sub_(0.5).relu_()
        feature_map = feature_map.contiguous(memory_format=torch.channels_last)
        once = regional_gem(feature_map, RGEM_P, RGEM_WINDOW, GEMP_P, GEMP_EPS)
        difference = (once / GeMPlus()(RegionalGeM()(feature_map)) - 1).abs().max()
        visit.figure("pooling in one kernel, largest relative difference", difference.item(), "", below=1e-5)
    with visit.attempt("search"):
        rows = random_rows(sizes.checked_rows, sizes.dim, torch.float32, torch.device("cpu"))
        rows[7] = rows[11]  # ties
        queries = random_rows(sizes.queries, sizes.dim, torch.float32, torch.device("cpu"))
        listed = list(torch.arange(sizes.queries * sizes.listed).remainder(len(rows)).view(sizes.queries, -1))
        for dtype in (torch.float32, torch.float16):
            there = rows.to(dtype)
            expected = search(queries, there, sizes.m, listed)
            for name, database in {"device": there.to(device), "CPU": there}.items():
                found = search(queries.to(device), Database(database), sizes.m, listed, device=device)
                same = all(torch.equal(a, b) for a, b in zip(found[:2], expected[:2], strict=True))
                same = same and all(map(torch.equal, found.positions, expected.positions))
                visit.figure(f"search, {dtype} rows on the {name}, equal to the CPU's to the bit", same, "", at_least=1)
    with visit.attempt("the paper's reranking"):
        q, x = (torch.from_numpy(reference[name]).to(device) for name in ("rerank_Q", "rerank_X"))
        ids = search(q, x, len(x), device=device).ids
        reranked = SuperGlobalReranker(400, 9, 0.15).rerank(q, ids.to(device), Database(x).rows).order.cpu()
        same = ids.gather(1, reranked).T.numpy() == reference["rerank_ranks_M400_K9_b0.15"][:400]
        visit.figure("reranking of the fixtures, places that are the paper's", same.mean(), "", at_least=1)
    for name in rerank.RERANKERS:
        with visit.attempt(name):
            *problem, _ = visit.rerank_sizes()
            here, cpu = (rerank.ours(*problem, where, name)() for where in (device, torch.device("cpu")))
            visit.figure(f"{name}, places that are the CPU's", (here == cpu).mean(), "", at_least=1)


def synchronisations(visit: Visit) -> None:
    """Counts where the host waits for the device: the operations, and the lines of the project that call them."""
    if not visit.on_gpu:
        visit.say("this needs a GPU")
        return
    sizes, device = visit.sizes, visit.device
    images = pinned_images(visit, sizes.batch)
    rows = random_rows(100_000, sizes.dim, torch.float32, device)
    queries = random_rows(sizes.queries, sizes.dim, torch.float32, device)
    extractor = visit.extractor("bf16")
    files = [extract.InMemory(image.numpy()) for image in images] * 3
    runs = {
        "a batch": lambda: extract_batch(extractor, images),
        "three batches with their store": extract.into_store(extractor, files, Loading(pin_memory=True)),
        "reranking a block": rerank.ours(*visit.rerank_sizes()),
        "search of 100,000 rows": lambda: search(queries, Database(rows), sizes.m, device=device),
    }
    for name, run in runs.items():
        with visit.attempt(name):
            run()
            lines = counted_synchronisations(run)
            visit.figure(f"synchronisations, {name}", sum(lines.values()), "")
            for where, count in lines.most_common():
                visit.say(f"  {count:5d} at {where}")


def counted_synchronisations(run: Callable[[], Any]) -> Counter[str]:
    """Returns the number of waits for the device that PyTorch reports in a run, by the line of the project."""
    lines: Counter[str] = Counter()

    def note(message: Warning | str, *_: Any) -> None:
        if SYNCHRONISATION in str(message):
            lines[project_line()] += 1

    before = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else None
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        try:
            if before is not None:
                torch.cuda.set_sync_debug_mode("warn")
            run()
        finally:
            if before is not None:
                torch.cuda.set_sync_debug_mode(before)
    return lines


def project_line() -> str:
    """Returns the innermost running line of the project except those of this file."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path != Path(__file__):
            return f"{path.relative_to(ROOT)}:{frame.lineno} {frame.line}"
    return "PyTorch itself"


def extraction(visit: Visit) -> None:
    """Measures images per second in each precision and batch size, compared with the plain network, image by image."""
    device, sizes = visit.device, visit.sizes
    prepare_process(device)
    images = pinned_images(visit, max(sizes.batches))
    flops = extract.network_flops(visit.recipe(), *sizes.image)
    visit.figure("FLOPs of an image", flops / 1e9, "GFLOP")
    in_memory = [extract.InMemory(image.numpy()) for image in images[: max(8, sizes.batch)]]
    baseline = visit.measure(extract.baseline(visit.recipe(), device, in_memory))
    base = baseline.median / len(in_memory)
    visit.figure("extraction, baseline", 1 / base, "img/s")
    visit.figure("extraction, baseline, peak memory", baseline.more, "MB")
    for kind in ("fp32, contiguous", *sizes.precisions):
        precision = kind.partition(",")[0]
        least, share = (1.5, None) if precision == "fp32" else (10, 40)
        rate = matrix_rate(device, PRECISIONS[precision], sizes.matrix)
        with visit.attempt(f"extraction, {kind}"):
            extractor = visit.extractor(precision)
            if kind != precision:
                extractor = visit.recipe(precision).extractor(device)
                extractor.network.encoder.set_memory_format(torch.contiguous_format)
            for batch in sizes.batches:
                name, count = f"extraction, {kind}, batch {batch}", batch * max(1, sizes.batch // batch)
                with visit.attempt(name):
                    timing = visit.measure(in_batches(extractor, images[:count], batch))
                    each = timing.median / count
                    visit.figure(name, 1 / each, "img/s")
                    visit.figure(f"{name}, ratio", base / each, "x", at_least=least)
                    visit.figure(f"{name}, of the floor", 100 * flops / rate / each, "%", at_least=share)
                    visit.figure(f"{name}, peak memory", timing.more, "MB")


def in_batches(extractor: NetworkExtractor, images: Sequence[Tensor], batch: int) -> Callable[[], Tensor]:
    """Returns a run over the images that queues all batches before waiting for the first."""
    parts = [images[start : start + batch] for start in range(0, len(images), batch)]
    return lambda: torch.cat([extract_batch(extractor, part) for part in parts]).cpu()


def reranking(visit: Visit) -> None:
    """Measures milliseconds per query of each reranker; for SuperGlobal also the baseline, and rows on the CPU."""
    problem, queries = visit.rerank_sizes(), visit.sizes.queries
    prepare_process(visit.device)
    timings = {}
    contenders = {
        "baseline": partial(rerank.baseline, *problem),
        "ours": partial(rerank.ours, *problem),
        "database on the device": partial(rerank.ours, *problem, rows_on=str(visit.device)),
        "database on the CPU": partial(rerank.ours, *problem, rows_on="cpu"),
    }
    for name, prepare in contenders.items():
        full = f"reranking, {name}"
        with visit.attempt(full):
            timings[name] = visit.measure(prepare())
            goal = None if name == "baseline" else 0.1
            visit.figure(full, 1000 * timings[name].median / queries, "ms/query", below=goal)
            visit.figure(f"{full}, ratio", timings["baseline"].median / timings[name].median, "x")
            visit.figure(f"{full}, peak memory", timings[name].more, "MB")
    floor = 2 * visit.sizes.m**2 * visit.sizes.dim / matrix_rate(visit.device, torch.float32, visit.sizes.matrix)
    visit.figure("reranking, ours, of the floor", 100 * floor * queries / timings["ours"].median, "%")
    for name in [name for name in rerank.RERANKERS if name != "superglobal"]:
        with visit.attempt(f"reranking, {name}"):
            milliseconds = 1000 * visit.measure(rerank.ours(*problem, name)).median / queries
            visit.figure(f"reranking, {name}", milliseconds, "ms/query")


def million(visit: Visit) -> None:
    """Measures exact search, compared with a plain product and topk, which is neither exact nor bounded in memory."""
    device, sizes = visit.device, visit.sizes
    prepare_process(device)
    queries = random_rows(sizes.queries, sizes.dim, torch.float32, device)
    random = torch.Generator().manual_seed(1)
    listed = list(torch.randint(sizes.rows, (sizes.queries, sizes.listed), generator=random))
    for dtype in (torch.float16, torch.float32):
        name, rows = f"search, {str(dtype).removeprefix('torch.')}", random_rows(sizes.rows, sizes.dim, dtype, device)
        ours = partial(search, queries, Database(rows), sizes.m, device=device)
        with visit.attempt(name):
            plain = visit.measure(lambda rows=rows: (queries.to(rows.dtype) @ rows.T).topk(sizes.m).indices.cpu())
            visit.figure(f"{name}, plain", 1000 * plain.median, "ms")
            timing = visit.measure(ours)
            visit.figure(f"{name}, on the device", 1000 * timing.median, "ms", below=20)
            visit.figure(f"{name}, on the device, ratio", plain.median / timing.median, "x")
            visit.figure(f"{name}, on the device, peak memory", timing.more, "MB")
            same = (timing.value.ids == plain.value).float().mean()
            visit.figure(f"{name}, places equal to the plain ones", same, "")
        with visit.attempt(f"{name}, listed rows"):
            timing = visit.measure(partial(ours, listed=listed))
            visit.figure(f"{name}, on the device, listed rows", 1000 * timing.median, "ms", below=20)
    if visit.on_gpu:
        with visit.attempt("search, rows on the CPU"):
            here = Database(rows.cpu())
            del rows, ours
            seconds = visit.measure(partial(search, queries, here, sizes.m, device=device)).median
            visit.figure("search, float32, on the CPU", 1000 * seconds, "ms")


def pairs(visit: Visit) -> None:
    """Measures CVNet-Rerank's time per pair, and how much faster SuperGlobal reranks the same number of candidates."""
    sizes, device, checkpoint = visit.sizes, visit.device, visit.recipe().checkpoint
    contenders = {
        f"CVNet, {name}": (partial(speedup.cvnet, checkpoint, name, device, sizes.pairs, sizes.image), sizes.pairs)
        for name in sizes.precisions
    }
    contenders["CVNet by the book"] = partial(speedup.cvnet_by_the_book, checkpoint, device, sizes.image), 1
    ours = visit.measure(rerank.ours(*visit.rerank_sizes())).median / sizes.queries
    for name, (prepare, count) in contenders.items():
        with visit.attempt(name):
            each = visit.measure(prepare()).median / count
            visit.figure(f"{name}, a pair", 1000 * each, "ms")
            goal = speedup.PAPER if name == "CVNet, fp32" else None
            visit.figure(f"{name}, over SuperGlobal's time", sizes.m * each / ours, "x", at_least=goal)


def out_of_memory(visit: Visit) -> None:
    """Tests extraction with too little memory: batches are halved until they fit, or an error names the image."""
    if not visit.on_gpu:
        visit.say("this needs a GPU")
        return
    device = visit.device
    images = [extract.InMemory(image.numpy()) for image in pinned_images(visit, visit.sizes.batch)]
    total = torch.cuda.get_device_properties(device).total_memory
    extractor = visit.recipe().extractor(device)
    run = extract.into_store(extractor, images, Loading())
    expected = run()
    said: Counter[str] = Counter()
    forward = extractor.forward

    def recorded(pixels: Tensor) -> Tensor:
        try:
            return forward(pixels)
        except RuntimeError as error:
            said[f"{len(pixels)} images: {type(error).__name__}: {str(error)[:160]}"] += 1
            raise

    extractor.forward = recorded
    for cap in visit.sizes.caps:
        with visit.attempt(f"{cap} GiB"):
            said.clear()
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(
                min(1.0, (torch.cuda.memory_reserved(device) + cap * 2**30) / total), device
            )
            try:
                visit.figure(f"{cap} GiB, largest difference", np.abs(run() - expected).max(), "", below=1e-5)
            except InputError as error:
                visit.say(f"{cap} GiB: {error}")
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0, device)
                for text, count in said.items():
                    visit.say(f"  {count} x {text}")


def files(visit: Visit) -> None:
    """Measures images per second from JPEG files, with several numbers of worker processes."""
    sizes = visit.sizes
    drawn = [extract.draw_image(*sizes.image, seed) for seed in range(min(16, sizes.files))]
    images = []
    for number, pixels in enumerate(drawn):
        Image.fromarray(pixels).save(visit.folder / f"{number}.jpg", quality=90)
    for number in range(sizes.files):  # different names for the same few files
        path = visit.folder / f"image_{number}.jpg"
        os.link(visit.folder / f"{number % len(drawn)}.jpg", path)
        images.append(ImageFile(path))
    visit.figure("decoding a JPEG", 1000 * extract.decoding_seconds(*sizes.image), "ms per core")
    for workers in sizes.workers:
        with visit.attempt(f"{workers} workers"):
            run = extract.into_store(visit.extractor("bf16"), images, Loading(workers, visit.on_gpu))
            seconds = min(timed(run, 0) for _ in range(2))
            visit.figure(f"end to end, bf16, {workers} workers", len(images) / seconds, "img/s")


def kernels(visit: Visit) -> None:
    """Lists the ten slowest kernels of extraction in bf16; on a CPU, the operators."""
    extractor = visit.extractor("bf16")
    run = in_batches(extractor, pinned_images(visit, visit.sizes.batch), visit.sizes.batch)
    run()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if visit.on_gpu else [])]
    with profile(activities=activities) as profiler:
        run()
    if visit.on_gpu:
        events = [each for each in profiler.key_averages() if each.device_type == DeviceType.CUDA]
        times = {each.key: (each.self_device_time_total, each.count) for each in events}
    else:
        times = {each.key: (each.self_cpu_time_total, each.count) for each in profiler.key_averages()}
    total = sum(microseconds for microseconds, _ in times.values())
    visit.figure("kernels, an image", total / 1000 / visit.sizes.batch, "ms")
    visit.figure("launches, a batch", sum(count for _, count in times.values()), "")
    for name, (microseconds, count) in sorted(times.items(), key=lambda item: -item[1][0])[:10]:
        share = 100 * microseconds / total
        visit.say(f"{microseconds / 1000:8.2f} ms {share:5.1f} % {count:5d} x {name[:110]}")


# Each part with its estimated seconds on an H100, to decide whether it still fits.
PARTS: dict[str, tuple[Callable[[Visit], None], float]] = {
    "rates": (rates, 20),
    "parity": (parity, 45),
    "synchronisations": (synchronisations, 20),
    "extraction": (extraction, 90),
    "reranking": (reranking, 45),
    "million": (million, 50),
    "pairs": (pairs, 45),
    "out_of_memory": (out_of_memory, 30),
    "files": (files, 60),
    "kernels": (kernels, 20),
}


def pinned_images(visit: Visit, count: int) -> list[Tensor]:
    """Returns random images (H, W, 3), on a GPU in pinned memory; eight are drawn and repeated."""
    drawn = [torch.from_numpy(extract.draw_image(*visit.sizes.image, seed)) for seed in range(min(8, count))]
    return [image.pin_memory() if visit.on_gpu else image for image in islice(cycle(drawn), count)]


def random_rows(count: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns random unit descriptors (N, D), drawn on the device."""
    random = torch.Generator(device).manual_seed(count)
    out = torch.empty(count, dim, dtype=dtype, device=device)
    for part in out.split(50_000):
        part.copy_(F.normalize(torch.randn(part.shape, device=device, generator=random), dim=1))
    return out


def table_rows(visit: Visit) -> list[str]:
    """Returns the available results as rows of the first table in benchmarks/README.md."""
    have, rows = visit.figures, []

    def row(name: str, baseline: str, unit: str) -> None:
        cells = {baseline: unit, name: unit, f"{name}, ratio": "{:.1f}", f"{name}, of the floor": "{:.0f} %"}
        cells[f"{name}, peak memory"] = "{:,.0f} MB"
        if name in have and baseline in have:
            shown = [cell.format(have[each]) if each in have else "" for each, cell in cells.items()]
            rows.append(f"| {'' if rows else machine(visit.device)} | {name} | {' | '.join(shown)} |")

    for kind in ("fp32, contiguous", *visit.sizes.precisions):
        made = [f"extraction, {kind}, batch {batch}" for batch in visit.sizes.batches]
        best = max(made, key=lambda name: have.get(name, 0))
        row(best, "extraction, baseline", "{:,.0f} img/s")
    for kind in ("ours", "database on the device", "database on the CPU"):
        row(f"reranking, {kind}", "reranking, baseline", "{:.3f} ms/query")
    for kind in ("float16", "float32"):
        row(f"search, {kind}, on the device", f"search, {kind}, plain", "{:.1f} ms")
    return rows


if __name__ == "__main__":
    run_command(main)
