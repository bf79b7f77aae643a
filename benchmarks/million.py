"""Compare evaluation with a million distractors, streamed search and reranking, with a dense baseline: time and memory.

    python benchmarks/million.py --folder /tmp/million

Writes random unit descriptors (8.2 GB for a million) into the folder once. The baseline multiplies
all pairs, argsorts the N x Q scores and builds the (M, K+1, D) neighbours of each query. "ranks" is the streamed
search by several processes, as with torchrun, which share the cores; its memory is that of one of them.
"""

import argparse
import atexit
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from alternate import alternate, machine, positive, report

from extraction.processes import Processes
from modules.reranking import SuperGlobalReranker
from modules.search import Database
from report.command import run_command
from revisitop.dataset import GroundTruth
from revisitop.evaluate import evaluate, evaluate_ranks
from revisitop.retrieve import rerank, retrieve

M, K, BETA = 400, 9, 0.15
DIM, LISTED = 2048, 120


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder for the descriptors")
    parser.add_argument("--rows", type=positive, default=1_000_000, help="distractors [1000000]")
    parser.add_argument("--queries", type=positive, default=70, help="queries [70]")
    parser.add_argument("--repeat", type=positive, default=3, help="runs of each, whose median is used [3]")
    parser.add_argument("--ranks", type=positive, default=2, help="processes that search together [2]")
    args = parser.parse_args(argv)
    path = args.folder / f"random_{args.rows}.npy"
    if not path.exists():
        write_rows(path, args.rows)
    contenders = {run.__name__: partial(partial, run, path, args.queries) for run in (dense, streamed)}
    if args.ranks > 1:
        contenders["ranks"] = partial(first_rank, path, args.queries, args.ranks)
    timings = alternate(contenders, args.repeat)
    print(f"{args.queries} queries, {args.rows} distractors of {DIM} dimensions, {machine(torch.device('cpu'))}")
    report(timings, "dense", "s", lambda seconds: seconds)
    difference = max(np.abs(np.subtract(timings["dense"].value, each.value)).max() for each in timings.values())
    print(f"largest difference in mAP: {difference:.1e}")


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
    """Returns a problem whose queries resemble their listed images to different degrees, the last not at all."""
    rows = np.load(path, mmap_mode="c")
    rng = np.random.default_rng(1)
    kinds, ends = ("easy", "hard", "junk"), (40, 90)

    def truth() -> GroundTruth:
        lists = np.split(rng.choice(5000, LISTED, replace=False), ends)
        return GroundTruth(dict(zip(kinds, lists, strict=True)))

    truths = [truth() for _ in range(count)]
    weights = np.linspace(1, 0, LISTED, dtype=np.float32)
    queries = np.stack([weights @ rows[truth.listed] for truth in truths])
    return queries / np.linalg.norm(queries, axis=1, keepdims=True), rows, truths


def streamed(path: Path, count: int, processes: Processes | None = None) -> list[float]:
    queries, rows, truths = problem(path, count)
    queries, database = torch.from_numpy(queries), Database(torch.from_numpy(rows))
    listed = [torch.from_numpy(truth.listed) for truth in truths]
    searched = retrieve(queries, database, M, listed, processes=processes)
    if processes is not None and processes.rank > 0:
        return []
    reranked = rerank(searched, SuperGlobalReranker(M, K, BETA), queries, database)
    return [evaluate(ranking, truths)[name].map for ranking in (searched, reranked) for name in "EMH"]


def first_rank(path: Path, count: int, ranks: int) -> Callable[[], list[float]]:
    """Starts the other processes, and returns the run of the first process, in which they take part."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(1, ranks):  # not with multiprocessing, whose processes cannot start others
        call = f"from million import *; other_rank(Path({str(path.resolve())!r}), {count}, {rank}, {ranks}, {port})"
        subprocess.Popen([sys.executable, "-c", call], cwd=Path(__file__).parent)
    processes = join(0, ranks, port)

    def say(goes_on: bool) -> None:
        processes.from_first(np.array([goes_on]))

    def run() -> list[float]:
        say(True)
        return streamed(path, count, processes)

    atexit.register(say, False)
    return run


def other_rank(path: Path, count: int, rank: int, ranks: int, port: int) -> None:
    processes = join(rank, ranks, port)
    while processes.from_first(np.array([False]))[0]:
        streamed(path, count, processes)


def join(rank: int, ranks: int, port: int) -> Processes:
    """Joins the processes of a simulated torchrun on this machine, with a share of the cores."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    return Processes()


def dense(path: Path, count: int) -> list[float]:
    queries, rows, truths = problem(path, count)
    queries, rows = torch.from_numpy(queries), torch.from_numpy(np.array(rows))
    ranks = np.argsort(-(rows @ queries.T).numpy(), axis=0)
    metrics = [evaluate_ranks(ranks, truths)]
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
    metrics.append(evaluate_ranks(ranks, truths))
    return [stage[name].map for stage in metrics for name in "EMH"]


if __name__ == "__main__":
    run_command(main)
