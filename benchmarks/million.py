"""Evaluation over a million distractors: time and memory of the streamed search and reranking, beside a dense baseline.

    python benchmarks/million.py --folder /tmp/million

Writes random unit descriptors (8.2 GB for a million) into the folder once. The baseline multiplies
everything, argsorts the N x Q scores and builds each query's (M, K+1, D) neighbours. Each runs in
processes of its own, in turn; medians are printed, and the peak of the anonymous memory, which
leaves out the file's page cache.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from modules.reranking import SuperGlobalReranker
from modules.search import Database
from revisitop.dataset import GroundTruth
from revisitop.evaluate import evaluate_ranks
from revisitop.run import retrieve

M, K, BETA = 400, 9, 0.15
DIM, LISTED = 2048, 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the descriptors are written, once")
    parser.add_argument("--rows", type=int, default=1_000_000, help="distractors [1000000]")
    parser.add_argument("--queries", type=int, default=70, help="queries [70]")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each, of which the median counts [3]")
    parser.add_argument("--only", choices=("streamed", "dense"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    path = args.folder / f"random_{args.rows}.npy"
    if args.only:
        print(json.dumps(measure({"streamed": streamed, "dense": dense}[args.only], path, args.queries)))
        return
    if not path.exists():
        write_rows(path, args.rows)
    runs = {"dense": [], "streamed": []}
    for _ in range(args.repeat):
        for name, results in runs.items():
            command = [sys.executable, __file__, "--only", name, *sys.argv[1:]]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            results.append(json.loads(done.stdout))
            print(f"{name:<9} {results[-1]['seconds']:7.1f} s   {results[-1]['anonymous_mb']:7.0f} MB", flush=True)
    seconds = {name: statistics.median(run["seconds"] for run in results) for name, results in runs.items()}
    memory = {name: statistics.median(run["anonymous_mb"] for run in results) for name, results in runs.items()}
    print(f"\n{args.queries} queries, {args.rows} distractors of {DIM} dimensions, {torch.get_num_threads()} threads")
    for name in runs:
        print(f"{name:<9} {seconds[name]:7.1f} s   {memory[name]:7.0f} MB of anonymous memory at the peak")
    print(f"ratio     {seconds['dense'] / seconds['streamed']:7.1f}     {memory['dense'] / memory['streamed']:7.1f}")
    figures = [run["map"] for results in runs.values() for run in results]
    print(f"largest difference in mAP: {np.ptp(np.array(figures), axis=0).max():.1e}")


def write_rows(path: Path, count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new.npy")
    rows = np.lib.format.open_memmap(new, mode="w+", dtype=np.float32, shape=(count, DIM))
    rng = np.random.default_rng(0)
    for start in tqdm(range(0, count, 8192), desc=f"writing {path}", unit="chunk"):
        block = rng.standard_normal((min(8192, count - start), DIM), dtype=np.float32)
        rows[start : start + len(block)] = block / np.linalg.norm(block, axis=1, keepdims=True)
    rows.flush()
    new.rename(path)


def problem(path: Path, count: int) -> tuple[np.ndarray, np.ndarray, list[GroundTruth]]:
    """Queries that resemble their listed pictures more or less: the last of them no more than any distractor."""
    rows = np.load(path, mmap_mode="c")
    rng = np.random.default_rng(1)
    truths = [GroundTruth(*np.split(rng.choice(5000, LISTED, replace=False), (40, 90))) for _ in range(count)]
    weights = np.linspace(1, 0, LISTED, dtype=np.float32)
    queries = np.stack([weights @ rows[truth.listed] for truth in truths])
    return queries / np.linalg.norm(queries, axis=1, keepdims=True), rows, truths


def streamed(path: Path, count: int) -> list[float]:
    queries, rows, truths = problem(path, count)
    database = Database(torch.from_numpy(rows))
    stages = retrieve(torch.from_numpy(queries), database, truths, SuperGlobalReranker(M, K, BETA))
    return [stage.figures[name].map for stage in stages.values() for name in "EMH"]


def dense(path: Path, count: int) -> list[float]:
    queries, rows, truths = problem(path, count)
    queries, rows = torch.from_numpy(queries), torch.from_numpy(np.array(rows))
    ranks = np.argsort(-(rows @ queries.T).numpy(), axis=0)
    figures = [evaluate_ranks(ranks, truths)]
    for column, query in zip(ranks.T, queries, strict=True):
        candidates = rows[column[:M].copy()]
        gram = candidates @ candidates.T
        values, near = gram.topk(K + 1, dim=1)
        values = values * BETA
        values[:, 0] = 1
        neighbours = candidates[near]  # (M, K+1, D)
        refined = (values[:, :, None] * neighbours).sum(dim=1) / values.sum(dim=1, keepdim=True)
        s1 = refined @ query
        expanded = refined[s1.argsort(descending=True)[: K + 1]].amax(dim=0)
        column[:M] = column[:M][((s1 + refined @ expanded) / 2).argsort(descending=True).numpy()]
    figures.append(evaluate_ranks(ranks, truths))
    return [stage[name].map for stage in figures for name in "EMH"]


def measure(run, path: Path, count: int) -> dict:
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            peak[0] = max(peak[0], int(status["RssAnon"].split()[0]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    figures = run(path, count)
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    return {"seconds": seconds, "anonymous_mb": peak[0] / 1024, "map": figures}


if __name__ == "__main__":
    main()
