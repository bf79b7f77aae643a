"""Time exact search, in memory and streamed from a file, and measure what approximate indexes lose.

    python benchmarks/search.py memory                               # --device cuda for a GPU
    python benchmarks/search.py stream --folder /tmp/search --ranks 2            # 8.2 GB on the disk
    python benchmarks/search.py indexes --folder /tmp/search --plot indexes.svg  # about 15 minutes

memory     1, 8 and 70 queries on float32 and float16 rows in memory: a product and topk, FAISS's IndexFlatIP (if it is
           installed, on a CPU), ours, and ours with the ranks of 120 listed rows per query.
stream     a memory-mapped file of more rows: a product block by block and a full argsort, ours, and ours by several
           processes of torchrun, which share the cores.
indexes    FAISS's approximate indexes: recall, change of the first ten after reranking, time, bytes, build time.
           recall@400 is the share of the first 400 of exact search that are among the first 400 of the index; "first
           ten" is how many of the first ten after exact search and SuperGlobal's reranking stay there if the candidates
           of the index are reranked, with exact rows and with rows decoded from the index.

stream and indexes write clustered unit vectors into the folder once: landmarks with 5 to 100 views each around
directions with the spectrum of descriptors. A query is a further view of a landmark.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from alternate import Timing, alternate, machine, positive, report
from torch import Tensor
from tqdm import tqdm

from extraction.processes import Processes
from model.device import choose_device, prepare_process
from modules.reranking import SuperGlobalReranker
from modules.search import Database, search
from report.command import run_command
from revisitop.index import indexed
from revisitop.retrieve import Ranking, rerank, retrieve

M, LISTED = 400, 120
CPU = torch.device("cpu")
BLOCK = 8192
# Rows and dimensions by default.
SIZES = {"memory": (100_000, 2048), "stream": (1_000_000, 2048), "indexes": (1_000_000, 128)}
HEADING = (
    *("index", "parameters", "recall@400", "first ten, exact rows", "first ten, decoded rows"),
    *("search, ms per query", "bytes per image of the index", "build"),
)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=SIZES)
    parser.add_argument("--folder", type=Path, help="folder for the rows and the indexes")
    parser.add_argument("--device", default="cpu", help="of memory: cpu, cuda or cuda:N [cpu]")
    parser.add_argument("--rows", type=positive, help="N [memory 100000, else 1000000]")
    parser.add_argument("--dim", type=positive, help="D [2048, indexes 128]")
    parser.add_argument("--queries", type=positive, nargs="+", help="Q [memory 1 8 70, else 70]")
    parser.add_argument("--repeat", type=positive, default=3, help="runs of each, whose median is used [3]")
    parser.add_argument("--ranks", type=positive, default=2, help="processes that search a file together [2]")
    parser.add_argument("--indexes", nargs="+", metavar="FACTORY", help="factory strings [by the size of the database]")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a plot of the indexes, .svg or .png")
    args = parser.parse_args(argv)
    rows, dim = args.rows or SIZES[args.part][0], args.dim or SIZES[args.part][1]
    queries = args.queries or ([1, 8, 70] if args.part == "memory" else [70])
    device = choose_device(args.device)
    if "RANK" not in os.environ:
        print(f"N = {rows:,}, D = {dim}, M = {min(M, rows)}, {machine(device)}", flush=True)
    if args.part == "memory":
        for dtype in (torch.float32, torch.float16):
            in_memory(random_rows(rows, dim, dtype, device), queries, args.repeat)
        return
    if args.folder is None:
        parser.error(f"{args.part} needs a --folder")
    path = args.folder / f"clustered_{rows}x{dim}.npy"
    q = clustered(path, rows, dim, queries[0])
    database = Database(torch.from_numpy(np.load(path, mmap_mode="c")))
    if args.part == "indexes":
        indexes(q, database, path, args.indexes or usual_indexes(rows, dim), args.plot)
    else:
        streamed(q, database, args.repeat, args.ranks, argv)


def in_memory(rows: Tensor, queries: list[int], repeat: int, at_least: float = 0.5) -> dict[str, Timing]:
    """Prints the times of each contender for each number of queries, and returns those of the last."""
    database, device, m, index = Database(rows), rows.device, min(M, len(rows)), None
    prepare_process(device)
    try:
        import faiss
    except ImportError:
        print("IndexFlatIP: skipped, because FAISS is not installed")
    else:
        if device.type == "cpu" and rows.dtype == torch.float32:
            index = faiss.IndexFlatIP(rows.shape[1])
            index.add(rows.numpy())
    for count in queries:
        q = random_rows(count, rows.shape[1], torch.float32, device, seed=1)
        listed = list(torch.randint(len(rows), (count, LISTED), generator=torch.Generator().manual_seed(2)))
        contenders: dict[str, Callable[[], object]] = {"product, topk": partial(product_topk, q, rows, m)}
        if index is not None:
            contenders["IndexFlatIP"] = partial(index.search, q.numpy(), m)
        contenders["ours"] = partial(search, q, database, m, device=device)
        contenders["ours, listed rows"] = partial(contenders["ours"], listed=listed)
        timings = alternate(contenders, device, repeat, at_least)
        print(f"\n{count} queries, {rows.dtype} rows on {device}")
        report(timings, "product, topk", "ms", lambda seconds: 1000 * seconds)
        same = (timings["ours"].value.ids == timings["product, topk"].value).float().mean()
        print(f"{100 * same:.3f}% of the places are those of the product", flush=True)
    return timings


def product_topk(queries: Tensor, rows: Tensor, m: int) -> Tensor:
    return (queries.to(rows.dtype) @ rows.T).topk(m).indices.cpu()


def streamed(queries: Tensor, database: Database, repeat: int, ranks: int, argv: list[str]) -> None:
    """Prints the times of search with listed rows; in a process of torchrun, only the seconds of all together."""
    listed = list(torch.randint(len(database), (len(queries), LISTED), generator=torch.Generator().manual_seed(2)))
    if "RANK" in os.environ:
        processes = Processes()
        run = partial(retrieve, queries, database, M, listed, processes=processes)
        timing = alternate({"ranks": run}, CPU, repeat, at_least=0)["ranks"]
        if processes.rank == 0:
            print(json.dumps([timing.seconds, timing.megabytes, timing.value.ids.tolist()]))
        processes.end()
        return
    contenders = {
        "dense": partial(dense, queries, database, listed),
        "streamed": partial(retrieve, queries, database, M, listed),
    }
    timings = alternate(contenders, CPU, repeat, at_least=0)
    if ranks > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__, *argv]
        environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // ranks))}
        done = subprocess.run([sys.executable, *launch], env=environment, check=True, stdout=subprocess.PIPE, text=True)
        seconds, megabytes, ids = json.loads(done.stdout.splitlines()[-1])
        timings[f"{ranks} processes"] = Timing(seconds, megabytes)
        print(f"several processes give the same results: {ids == timings['streamed'].value.ids.tolist()}")
    print(f"{len(queries)} queries, {LISTED} listed rows each; the memory of processes is that of the first")
    report(timings, "dense", "s", lambda seconds: seconds)
    (ids, positions), ours = timings["dense"].value, timings["streamed"].value
    moved = max(int((a - b).abs().max()) for a, b in zip(ours.positions, positions, strict=True))
    same = (ours.ids == ids).float().mean()
    print(f"{100 * same:.3f}% of the places are the same, and ranks differ by {moved} at most")


def dense(queries: Tensor, database: Database, listed: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Returns the first results and the ranks of the listed rows, from all scores and a full argsort."""
    (rows,) = database.parts
    order = torch.cat([queries @ block.T for block in rows.split(BLOCK)], dim=1).argsort(dim=1, descending=True)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(len(rows)).expand_as(order))
    return order[:, :M].clone(), [row[numbers] for row, numbers in zip(ranks, listed, strict=True)]


def random_rows(count: int, dim: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Returns random unit descriptors (count, dim), drawn on the device."""
    random, out = torch.Generator(device).manual_seed(seed), torch.empty(count, dim, dtype=dtype, device=device)
    for part in out.split(50_000):
        part.copy_(F.normalize(torch.randn(part.shape, device=device, generator=random), dim=1))
    return out


def clustered(path: Path, count: int, dim: int, q: int) -> Tensor:
    """Writes the rows if they are missing, block by block; returns the queries (q, dim)."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(5, 101, count // 5 + 1)
    landmark = np.repeat(np.arange(len(sizes)), sizes)[:count]
    spectrum = (1 / np.arange(1, dim + 1) ** 0.35).astype(np.float32)

    def views(numbers: np.ndarray, seed: int) -> np.ndarray:
        different, inverse = np.unique(numbers, return_inverse=True)
        centres = [np.random.default_rng([1, number]).standard_normal(dim, dtype=np.float32) for number in different]
        rows = np.random.default_rng([2, seed]).standard_normal((len(numbers), dim), dtype=np.float32)
        rows = (np.stack(centres)[inverse] + 0.9 * rows) * spectrum
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new.npy")
        rows = np.lib.format.open_memmap(new, mode="w+", dtype=np.float32, shape=(count, dim))
        for start in tqdm(range(0, count, BLOCK), desc=f"writing {path}", unit="block"):
            block = landmark[start : start + BLOCK]
            rows[start : start + len(block)] = views(block, start)
        rows.flush()
        new.rename(path)
    return torch.from_numpy(views(np.sort(rng.choice(landmark[-1] + 1, q, replace=False)), count))


def usual_indexes(rows: int, dim: int) -> list[str]:
    """Returns indexes with about 4 sqrt(N) lists, as in FAISS's guidelines, and codes of D / 8 and D / 4 bytes."""
    lists, short, long = f"IVF{1 << round(np.log2(4 * rows**0.5))}", dim // 8, dim // 4
    codes = ["Flat", "SQ8", f"PQ{short}", f"PQ{long}"]
    return ["Flat", *(f"{lists},{code}" for code in codes), f"OPQ{long},{lists},PQ{long}", "HNSW32"]


def indexes(queries: Tensor, database: Database, path: Path, factories: list[str], plot: Path | None) -> None:
    """Prints a row for exact search, then for each index, with one or several search parameters, and plots them."""
    print(f"{len(queries)} queries\n\n| {' | '.join(HEADING)} |\n|{' --- |' * len(HEADING)}")
    exact, seconds = ranked(queries, database)
    best = first_ten(exact, queries, database)
    print_cells("exact search, float32", "", "1.000", "10.00", "", f"{1000 * seconds:.2f}", 4 * database.dim, "")
    points: dict[str, list[tuple[float, float]]] = {}  # seconds per query, and recall
    for factory in factories:
        for file in path.parent.glob(f"{path.name}.*"):
            file.unlink()
        start, build = time.perf_counter(), ""
        lists = int(factory.partition("IVF")[2].partition(",")[0] or 0)
        choices = [f"nprobe={max(1, lists // share)}" for share in (64, 16, 4)] if lists else [""]
        choices = [f"efSearch={width}" for width in (400, 1600)] if factory.startswith("HNSW") else choices
        for parameters in choices:
            index = indexed(database, factory, path, {"seed": 0}, parameters)
            build = f"{time.perf_counter() - start:.0f} s" if parameters == choices[0] else ""
            decoded = indexed(database, factory, path, {"seed": 0}, parameters, decoded=True)
            (found, _), (rough, seconds) = ranked(queries, index), ranked(queries, decoded)
            recall, bytes_each = shared(found.ids, exact.ids), round(index.size / len(database))
            tens = [shared(first_ten(*each), best) for each in ((found, queries, index), (rough, queries, decoded))]
            cells = [f"{recall:.3f}", *(f"{10 * ten:.2f}" for ten in tens), f"{1000 * seconds:.2f}", bytes_each]
            print_cells(f"`{factory}`", f"`{parameters}`" if parameters else "", *cells, build)
            points.setdefault(f"{factory}, {bytes_each:,} B", []).append((seconds, recall))
    if plot:
        draw(points, plot, f"{len(database):,} rows of {database.dim} dimensions")


def print_cells(*cells: str | int) -> None:
    print(f"| {' | '.join(f'{cell:,}' if isinstance(cell, int) else cell for cell in cells)} |", flush=True)


def ranked(queries: Tensor, database: Database) -> tuple[Ranking, float]:
    """Returns the ranking of the second of two searches, and its seconds per query; the first warms the caches."""
    retrieve(queries, database, M)
    start = time.perf_counter()
    return retrieve(queries, database, M), (time.perf_counter() - start) / len(queries)


def first_ten(found: Ranking, queries: Tensor, database: Database) -> Tensor:
    return rerank(found, SuperGlobalReranker(m=M), queries, database).ids[:, :10]


def shared(found: Tensor, expected: Tensor) -> float:
    """Returns the share of the expected results that were found, in any order."""
    return float(np.mean([np.isin(b, a).mean() for a, b in zip(found.numpy(), expected.numpy(), strict=True)]))


def draw(points: dict[str, list[tuple[float, float]]], path: Path, title: str) -> None:
    """Plots recall over milliseconds per query, with a line per index."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "superglobal"  # equal results give identical files
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for name, places in points.items():
        axes.plot([1000 * seconds for seconds, _ in places], [recall for _, recall in places], marker="o", label=name)
    axes.set(xscale="log", xlabel="search, ms per query", ylabel="recall@400", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, title="index, bytes per image")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    run_command(main)
