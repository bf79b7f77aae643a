"""All measurements that need a GPU, in less than ten minutes; the first three parts need about three.

    python benchmarks/gpu.py --out results.json
    python benchmarks/gpu.py --device cpu --small

Parts run in order of importance, results are printed immediately, and a failing part does not end the others:
descriptors, search and rerankers compared with those of a CPU; extraction, reranking, search and CVNet-Rerank compared
with plain baselines; waits of the host for the device; too little memory; the slowest kernels; JPEG
files. Weights and images are random, because they do not matter for speed. Goals are printed beside the results. Lines
that begin with | are rows of the first table in benchmarks/README.md, which explains "of the floor".
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import extract
import numpy as np
import rerank
import speedup
import torch
from alternate import Timing, alternate, machine, matrix_rate, timed
from PIL import Image
from search import LISTED, in_memory, random_rows
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import hubconf
from extraction.extract import extract_batch
from model.device import choose_device, prepare_process
from model.errors import InputError
from model.folding import PRECISIONS
from modules.pooling import GEMP_EPS, GEMP_P, RGEM_P, RGEM_WINDOW, GeMPlus, RegionalGeM
from modules.reranking import SuperGlobalReranker
from modules.search import Database, search
from report.command import run_command

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "revisitop" / "reference" / "reference.npz"
CPU = torch.device("cpu")
# What an H100 shall reach, beside the ratios: ms per query of reranking, ms of a search in a million rows.
RERANKING, SEARCH = 0.1, 20

Shown = tuple[Callable[[float], float], str]


@dataclass(frozen=True)
class Sizes:
    """The sizes of the problems; the defaults are those of the numbers in the README."""

    image: tuple[int, int] = (extract.WIDTH, extract.HEIGHT)
    batches: tuple[int, ...] = (1, 8, 21, 42)
    precisions: tuple[str, ...] = ("fp32", "bf16", "fp16")
    fixtures: tuple[int, ...] = (0, 1)
    problem: tuple[int, int, int, int] = (70, 5000, 2048, 400)  # queries, database, dimensions, candidates
    k: int = 9
    checked_rows: int = 50_000
    rows: int = 1_000_000
    queries: tuple[int, ...] = (1, 8, 70)
    pairs: int = 30
    files: tuple[int, int] = (64, 1024)
    workers: tuple[int, ...] = (8, 16)
    matrix: int = 8192
    repeat: int = 3
    seconds: float = 0.3  # per measurement


SMALL = Sizes(
    image=(48, 32), batches=(2,), precisions=("fp32", "bf16"), fixtures=(1,), problem=(3, 300, 64, 60), k=5,
    checked_rows=500, rows=2000, queries=(3,), pairs=1, files=(1, 3), workers=(0,), matrix=256,
    repeat=1, seconds=0,
)  # fmt: skip


@dataclass
class Run:
    """The device, the sizes, a random checkpoint in a temporary folder, and the results so far.

    Attributes:
        figures: the results by name.
        failures: the errors of failed parts, by name.
    """

    device: torch.device
    sizes: Sizes
    checkpoint: Path
    figures: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def figure(self, name: str, value: float, unit: str, at_least: float | None = None, below: float | None = None):
        """Prints and keeps a result, with its goal if there is one."""
        self.figures[name], goal = float(value), ""
        if at_least is not None:
            goal = f"   [goal >= {at_least:,.6g}: {'met' if value >= at_least else 'missed'}]"
        if below is not None:
            goal = f"   [goal < {below:,.6g}: {'met' if value < below else 'missed'}]"
        print(f"  {name}: {value:,.4g} {unit}{goal}", flush=True)

    def compare(
        self, name: str, baseline: Timing, ours: Timing, shown: Shown, floor: float | None = None, **goal: float
    ) -> None:
        """Prints a row for the README, and keeps our result and its ratio to the baseline.

        Args:
            shown: computes what is shown from the seconds of a run, and its unit.
            floor: the shortest possible seconds of a run.
        """
        quantity, unit = shown
        self.figures[f"{name}, ratio"] = ratio = baseline.median / ours.median
        cells = [machine(self.device), name, *(f"{quantity(each.median):,.3g} {unit}" for each in (baseline, ours))]
        cells += [f"{ratio:.1f}", "" if floor is None else f"{100 * floor / ours.median:.0f} %"]
        print(f"| {' | '.join(cells)} | {ours.megabytes:,.0f} MB |")
        self.figure(name, quantity(ours.median), unit, **goal)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """A context in which an error is printed in a line, and does not end the other parts."""
        try:
            yield
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            first = str(error).strip().partition("\n")[0][:300]
            self.failures[what] = f"{type(error).__name__}: {first} ({Path(where.filename).name}:{where.lineno})"
            print(f"  {what} FAILED, {self.failures[what]}", flush=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def alternate(self, contenders: dict[str, Callable[[], Any]]) -> dict[str, Timing]:
        return alternate(contenders, self.device, self.sizes.repeat, self.sizes.seconds)

    def extractor(self, precision: str) -> torch.nn.Module:
        return extract.extractor("cvnet", self.checkpoint, scales=3, precision=precision, device=str(self.device))

    def images(self, count: int) -> list[Tensor]:
        return extract.draw_images(count, *self.sizes.image, self.device)

    def problem(self, device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, rows and the first results of each query on the device, see rerank.problem."""
        return rerank.problem(*self.sizes.problem, device or self.device)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    parser.add_argument("--small", action="store_true", help="tiny problems without meaningful results, for a test")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="[all]")
    parser.add_argument("--out", type=Path, help="a JSON file for the results [gpu.json in the folder OUT, if set]")
    args = parser.parse_args(argv)
    start, device = time.perf_counter(), choose_device(args.device)
    prepare_process(device)
    out = args.out or (Path(os.environ["OUT"]) / "gpu.json" if os.environ.get("OUT") else None)
    print(f"{machine(device)}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        run = Run(device, SMALL if args.small else Sizes(), extract.random_checkpoint(folder, 50))
        for name in args.parts:
            print(f"\n{name} ({time.perf_counter() - start:.0f} s)", flush=True)
            if name in NEED_A_GPU and device.type != "cuda":
                print("  this needs a GPU")
                continue
            with run.attempt(name):
                PARTS[name](run)
            if out is not None:
                kept = {"machine": machine(device), "failures": run.failures, "figures": run.figures}
                out.write_text(json.dumps(kept, indent=1))
    print(f"\n{time.perf_counter() - start:.0f} s; failed: {', '.join(run.failures) or 'nothing'}")


def parity(run: Run) -> None:
    """Compares descriptors, rankings and new orders with those of the fixtures and of a CPU."""
    device, sizes = run.device, run.sizes
    with np.load(FIXTURES) as arrays:
        reference = {name: torch.from_numpy(array) for name, array in arrays.items() if array.dtype.kind in "uif"}
    for precision in sizes.precisions:
        with run.attempt(name := f"descriptors, {precision}"):
            network = run.extractor(precision)
            rows = torch.cat([extract.in_batches(network, [reference[f"image_{i}"]], 1) for i in sizes.fixtures])
            expected = torch.stack([reference[f"descriptor_all_3_image_{i}"] for i in sizes.fixtures])
            closest = 0.99999 if precision == "fp32" else 0.9999
            run.figure(f"{name}, largest difference", (rows - expected).abs().max().item(), "")
            run.figure(f"{name}, cosine", (rows * expected).sum(dim=1).min().item(), "", at_least=closest)
    with run.attempt("pooling in one kernel"):
        from modules.fused_pooling import regional_gem  # needs Triton

        feature_map = torch.rand(2, 2048, 24, 32, device=device).sub_(0.5).relu_()
        feature_map = feature_map.contiguous(memory_format=torch.channels_last)
        once = regional_gem(feature_map, RGEM_P, RGEM_WINDOW, GEMP_P, GEMP_EPS)
        difference = (once / GeMPlus()(RegionalGeM()(feature_map)) - 1).abs().max()
        run.figure("pooling in one kernel, largest relative difference", difference.item(), "", below=1e-5)
    with run.attempt("search"):
        count, _, dim, m = sizes.problem
        rows, queries = (random_rows(n, dim, torch.float32, CPU) for n in (sizes.checked_rows, count))
        rows[7] = rows[11]  # equal rows
        listed = list(torch.randint(len(rows), (count, LISTED), generator=torch.Generator().manual_seed(1)))
        for dtype in (torch.float32, torch.float16):
            expected = search(queries, typed := rows.to(dtype), m, listed)
            for name, database in {"device": typed.to(device), "CPU": typed}.items():
                found = search(queries.to(device), Database(database), m, listed, device=device)
                name = f"search, {dtype} rows on the {name}"
                run.figure(f"{name}, scores", (found.scores - expected.scores).abs().max().item(), "", below=1e-6)
                run.figure(f"{name}, places that are the CPU's", mean_equal(found.ids, expected.ids), "")
                ranks = (torch.cat(each.positions) for each in (found, expected))
                run.figure(f"{name}, ranks that are the CPU's", mean_equal(*ranks), "")
    with run.attempt("the paper's reranking"):
        q, x = reference["rerank_Q"].to(device), reference["rerank_X"].to(device)
        ids = search(q, x, len(x), device=device).ids
        order = SuperGlobalReranker(400, 9, 0.15).rerank(q, ids.to(device), Database(x).rows).order.cpu()
        same = mean_equal(ids.gather(1, order).T, reference["rerank_ranks_M400_K9_b0.15"][:400])
        run.figure("reranking of the fixtures, places that are the paper's", same, "", at_least=1)
    for name in rerank.RERANKERS:
        with run.attempt(name):
            orders = (rerank.ours(name, *run.problem(each), sizes.k)() for each in (device, CPU))
            run.figure(f"{name}, places that are the CPU's", mean_equal(*orders), "", at_least=1)


def mean_equal(a: Tensor, b: Tensor) -> float:
    return (a == b).float().mean().item()


def extraction(run: Run) -> None:
    """Measures images per second in each precision and batch size, compared with the plain network, image by image."""
    sizes, device = run.sizes, run.device
    images = run.images(max(sizes.batches))
    plain = extract.PlainNetwork(run.checkpoint, 50, extract.SCALE_SETS[3]).to(device)
    flops = extract.flops_of(partial(extract.one_by_one, plain, images[:1], device))
    run.figure("FLOPs of an image", flops / 1e9, "GFLOP")
    count = len(images)
    baseline = run.alternate({"baseline": partial(extract.one_by_one, plain, images[:8], device)})["baseline"]
    baseline.seconds = [seconds * count / len(images[:8]) for seconds in baseline.seconds]
    for precision in sizes.precisions:
        rate, least = matrix_rate(device, PRECISIONS[precision], sizes.matrix), 1.5 if precision == "fp32" else 10
        run.figure(f"matrix product, {precision}", rate / 1e12, "TFLOP/s")
        with run.attempt(f"extraction, {precision}"):
            network = run.extractor(precision)
            contenders = {str(batch): partial(extract.in_batches, network, images, batch) for batch in sizes.batches}
            floor, goal = count * flops / rate, least * count / baseline.median
            for batch, timing in run.alternate(contenders).items():
                name = f"extraction, {precision}, batch {batch}"
                run.compare(name, baseline, timing, (lambda seconds: count / seconds, "img/s"), floor, at_least=goal)


def reranking(run: Run) -> None:
    """Measures milliseconds per query of each reranker, compared with the textbook; rows in several places."""
    device, k, problem = run.device, run.sizes.k, run.problem()
    queries, _, dim, m = run.sizes.problem
    floor = queries * 2 * m**2 * dim / matrix_rate(device, torch.float32, run.sizes.matrix)
    contenders = {
        "baseline": partial(rerank.baseline, "superglobal", *problem, k),
        "superglobal": rerank.ours("superglobal", *problem, k),
        "database on the device": rerank.ours("superglobal", *problem, k, rows_on=str(device)),
        "database on the CPU": rerank.ours("superglobal", *problem, k, rows_on="cpu"),
    }
    timings = run.alternate(contenders)
    for name in list(contenders)[1:]:
        share = floor if name == "superglobal" else None
        per_query = (lambda seconds: 1000 * seconds / queries), "ms/query"
        run.compare(f"reranking, {name}", timings["baseline"], timings[name], per_query, share, below=RERANKING)
    for name in [name for name in rerank.RERANKERS if name != "superglobal"]:
        with run.attempt(f"reranking, {name}"):
            timing = run.alternate({name: rerank.ours(name, *problem, k)})[name]
            run.figure(f"reranking, {name}", 1000 * timing.median / queries, "ms/query")


def searching(run: Run) -> None:
    """Measures exact search, compared with a plain product and topk, which keeps all scores and no ranks."""
    sizes = run.sizes
    for dtype in (torch.float16, torch.float32):
        with run.attempt(name := f"search, {dtype}"):
            rows = random_rows(sizes.rows, sizes.problem[2], dtype, run.device)
            timings = in_memory(rows, list(sizes.queries), sizes.repeat, sizes.seconds)
            for each in ("ours", "ours, listed rows"):
                milliseconds = (lambda seconds: 1000 * seconds), "ms"
                run.compare(f"{name}, {each}", timings["product, topk"], timings[each], milliseconds, below=SEARCH)
            if run.device.type == "cuda":
                queries, host = random_rows(70, rows.shape[1], torch.float32, run.device, seed=1), Database(rows.cpu())
                del rows
                seconds = timed(partial(search, queries, host, 400, device=run.device), run.device)
                run.figure(f"{name}, rows on the CPU", 1000 * seconds, "ms")


def pairs(run: Run) -> None:
    """Measures CVNet-Rerank's time per pair, and how much faster SuperGlobal reranks the same number of candidates."""
    sizes, (queries, _, _, m) = run.sizes, run.sizes.problem
    images = torch.stack(run.images(1 + sizes.pairs)).to(run.device)
    ours = run.alternate({"ours": rerank.ours("superglobal", *run.problem(), sizes.k)})["ours"].median / queries
    for precision in ("by the book", *sizes.precisions):
        with run.attempt(name := f"CVNet, {precision}"):
            plain, network = speedup.networks(run.checkpoint, precision.replace("by the book", "fp32"), run.device)
            if precision == "by the book":
                count, maps = 1, speedup.feature_maps(plain, images[:2])
                contender = partial(speedup.score_by_the_book, plain, *maps.split(1))
            else:
                count, contender = sizes.pairs, partial(speedup.score, network, speedup.feature_maps(network, images))
            each = run.alternate({name: contender})[name].median / count
            run.figure(f"{name}, a pair", 1000 * each, "ms")
            goal = speedup.PAPER if precision == "fp32" else None
            run.figure(f"{name}, over SuperGlobal's time", m * each / ours, "x", at_least=goal)


def waits(run: Run) -> None:
    """Counts where the host waits for the device, as PyTorch reports it, by the innermost lines of the project."""
    batch, (count, _, dim, m), network = run.images(21), run.sizes.problem, run.extractor("bf16")
    rows, queries = (random_rows(n, dim, torch.float32, run.device) for n in (100_000, count))
    operations = {
        "a batch": lambda: extract_batch(network, batch),
        "reranking a block": rerank.ours("superglobal", *run.problem(), run.sizes.k),
        "search of 100,000 rows": partial(search, queries, Database(rows), m, device=run.device),
    }
    for name, operation in operations.items():
        lines: Counter[str] = Counter()

        def note(message: Warning | str, *_: Any, lines: Counter[str] = lines) -> None:
            if "called a synchronizing CUDA operation" in str(message):
                frames = [each for each in traceback.extract_stack() if Path(each.filename).is_relative_to(ROOT)]
                lines[f"{Path(frames[-2].filename).relative_to(ROOT)}:{frames[-2].lineno} {frames[-2].line}"] += 1

        operation()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            torch.cuda.set_sync_debug_mode("warn")
            try:
                operation()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        run.figure(f"waits, {name}", lines.total(), "")
        print("".join(f"  {times:5d} at {where}\n" for where, times in lines.most_common()), end="", flush=True)


def out_of_memory(run: Run) -> None:
    """Tests extraction with too little memory: batches are halved until they fit, or an error names the image."""
    network = hubconf.superglobal_resnet50(run.checkpoint, device=str(run.device))
    images = torch.rand(21, 3, *run.sizes.image[::-1])
    expected, total = network(images), torch.cuda.get_device_properties(run.device).total_memory
    for cap in (3, 1, 0.6, 0.45):  # GiB
        with run.attempt(f"{cap} GiB"):
            torch.cuda.empty_cache()
            fraction = (torch.cuda.memory_reserved(run.device) + cap * 2**30) / total
            torch.cuda.set_per_process_memory_fraction(min(1.0, fraction), run.device)
            try:
                difference = (network(images) - expected).abs().max().item()
                run.figure(f"{cap} GiB, largest difference", difference, "", below=1e-5)
            except InputError as error:
                print(f"  {cap} GiB: {error}")
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0, run.device)


def kernels(run: Run) -> None:
    """Lists the ten slowest kernels of extraction in bf16; on a CPU, the operators."""
    batch, network = run.images(max(run.sizes.batches)), run.extractor("bf16")
    extract_batch(network, batch).cpu()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + (run.device.type == "cuda")]) as times:
        extract_batch(network, batch).cpu()
    order = f"self_{run.device.type}_time_total"
    print(times.key_averages().table(sort_by=order, row_limit=10, max_name_column_width=60), flush=True)


def files(run: Run) -> None:
    """Measures images per second of extract_rop1m.py from JPEG files, from the times for few and for many files."""
    folder, (few, many) = run.checkpoint.parent / "images", run.sizes.files
    folder.mkdir()
    for number, image in enumerate(run.images(8)):
        Image.fromarray(image.numpy()).save(folder / f"{number}.jpg", quality=90)
    for number in range(8, many):  # different names for the same few files
        os.link(folder / f"{number % 8}.jpg", folder / f"{number}.jpg")
    command = [sys.executable, str(ROOT / "extract_rop1m.py"), "--weight", str(run.checkpoint), "--depth", "50"]
    command += ["--data-dir", str(folder), "TEST.DEVICE", str(run.device), "TEST.PRECISION", "bf16", "--out"]

    def extract_files(count: int, workers: int) -> None:
        (folder / "revisitop1m.txt").write_text("".join(f"{number}.jpg\n" for number in range(count)))
        options = [f"{count}_{workers}.npy", "DATA_LOADER.NUM_WORKERS", str(workers)]
        done = subprocess.run([*command, *options], cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"extract_rop1m.py: {done.stderr.splitlines()[-1]}")

    for workers in run.sizes.workers:
        with run.attempt(name := f"files, bf16, {workers} workers"):
            first, second = (timed(partial(extract_files, count, workers), CPU) for count in (few, many))
            run.figure(name, (many - few) / (second - first), "img/s")


PARTS: dict[str, Callable[[Run], None]] = {
    "parity": parity,
    "extraction": extraction,
    "reranking": reranking,
    "search": searching,
    "pairs": pairs,
    "waits": waits,
    "out_of_memory": out_of_memory,
    "kernels": kernels,
    "files": files,
}
NEED_A_GPU = ("waits", "out_of_memory")

if __name__ == "__main__":
    run_command(main)
