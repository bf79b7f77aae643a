"""Compare approximate with exact search: recall, change of the first ten after reranking, time, bytes, build time.

    python benchmarks/index.py --folder /tmp/index                                   # about 15 minutes
    python benchmarks/index.py --folder /tmp/index --dim 2048                        # 8.2 GB on the disk

Writes clustered unit vectors into the folder once: landmarks with 5 to 100 views each around directions with the
spectrum of descriptors. A query is a further view of a landmark. Each index is built from the file block by block.

recall@400    the share of the first 400 of exact search that are among the first 400 of the index
first ten     of the first ten after exact search and SuperGlobal's reranking, how many stay among the first ten
              if the candidates of the index are reranked, with exact rows and with rows decoded from the index
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from alternate import machine, positive

from modules.reranking import SuperGlobalReranker
from modules.search import Database
from report.command import run_command
from revisitop.index import indexed
from revisitop.retrieve import Ranking, rerank, retrieve

M = 400
_BLOCK = 8192


class Measured(NamedTuple):
    """A row of the table."""

    index: str
    parameters: str
    recall: float
    exact_ten: float
    decoded_ten: float | None
    milliseconds: float
    bytes: float
    seconds: float | None

    def cells(self) -> list[str]:
        decoded = "" if self.decoded_ten is None else f"{10 * self.decoded_ten:.2f}"
        built = "" if self.seconds is None else f"{self.seconds:.0f} s"
        return [
            f"`{self.index}`" if self.index != "exact" else "exact search, float32",
            f"`{self.parameters}`" if self.parameters else "",
            f"{self.recall:.3f}", f"{10 * self.exact_ten:.2f}", decoded, f"{self.milliseconds:.2f}",
            f"{self.bytes:,.0f}", built,
        ]  # fmt: skip


HEADING = (
    *("index", "parameters", "recall@400", "first ten, exact rows", "first ten, decoded rows"),
    *("search, ms per query", "bytes per image of the index", "build"),
)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder for the rows and the indexes")
    parser.add_argument("--rows", type=positive, default=1_000_000, help="rows of the database [1000000]")
    parser.add_argument("--dim", type=positive, default=128, help="dimensions [128]")
    parser.add_argument("--queries", type=positive, default=70, help="queries [70]")
    parser.add_argument(
        "--indexes", nargs="+", metavar="FACTORY", help="factory strings [chosen by the size of the database]"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a plot of the trade-off, .svg or .png")
    args = parser.parse_args(argv)
    path = args.folder / f"clustered_{args.rows}x{args.dim}.npy"
    queries = clustered(path, args.rows, args.dim, args.queries)
    database = Database(torch.from_numpy(np.load(path, mmap_mode="c")))
    rows = []
    for row in measure(queries, database, path, args.indexes or usual_indexes(args.rows, args.dim)):
        if not rows:
            print(
                f"{args.queries} queries, {args.rows:,} rows of {args.dim} dimensions, {machine(torch.device('cpu'))}"
            )
            print(f"| {' | '.join(HEADING)} |\n|{' --- |' * len(HEADING)}")
        print(f"| {' | '.join(row.cells())} |", flush=True)
        rows.append(row)
    if args.plot:
        draw(rows, args.plot, f"{args.rows:,} rows of {args.dim} dimensions")


def usual_indexes(rows: int, dim: int) -> list[str]:
    """Returns indexes with about 4 sqrt(N) lists, as in FAISS's guidelines, and codes of D / 8 and D / 4 bytes."""
    lists, short, long = f"IVF{1 << round(np.log2(4 * rows**0.5))}", dim // 8, dim // 4
    codes = ["Flat", "SQ8", f"PQ{short}", f"PQ{long}"]
    return ["Flat", *(f"{lists},{code}" for code in codes), f"OPQ{long},{lists},PQ{long}", "HNSW32"]


def clustered(path: Path, count: int, dim: int, q: int) -> Tensor:
    """Writes the rows if they are missing, block by block; returns the queries (q, dim)."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(5, 101, count // 5 + 1)
    landmark = np.repeat(np.arange(len(sizes)), sizes)[:count]
    spectrum = (1 / np.arange(1, dim + 1) ** 0.35).astype(np.float32)

    def views(numbers: np.ndarray, seed: int) -> np.ndarray:
        own, start = np.empty((len(numbers), dim), dtype=np.float32), 0
        for number, times in zip(*np.unique(numbers, return_counts=True), strict=True):
            own[start : start + times] = np.random.default_rng([1, number]).standard_normal(dim, dtype=np.float32)
            start += times
        own += 0.9 * np.random.default_rng([2, seed]).standard_normal(own.shape, dtype=np.float32)
        own *= spectrum
        return own / np.linalg.norm(own, axis=1, keepdims=True)

    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new.npy")
        rows = np.lib.format.open_memmap(new, mode="w+", dtype=np.float32, shape=(count, dim))
        for start in tqdm(range(0, count, _BLOCK), desc=f"writing {path}", unit="block"):
            block = landmark[start : start + _BLOCK]
            rows[start : start + len(block)] = views(block, start)
        rows.flush()
        new.rename(path)
    asked = np.sort(rng.choice(landmark[-1] + 1, q, replace=False))
    return torch.from_numpy(views(asked, count))


def measure(queries: Tensor, database: Database, path: Path, factories: list[str]) -> Iterator[Measured]:
    """Yields a row for exact search, then for each index, with one or several search parameters."""
    exact = timed(queries, database)
    best = first_ten(exact, queries, database)
    yield Measured("exact", "", 1.0, 1.0, None, 1000 * exact.seconds / len(queries), 4 * database.dim, None)
    for factory in factories:
        for kept in path.parent.glob(f"{path.name}.*"):
            kept.unlink()
        start = time.perf_counter()
        index = indexed(database, factory, path, {"seed": 0})
        built = time.perf_counter() - start
        lists = int(factory.partition("IVF")[2].partition(",")[0] or 0)
        choices = [f"nprobe={max(1, lists // share)}" for share in (64, 16, 4)] if lists else [""]
        choices = [f"efSearch={width}" for width in (400, 1600)] if factory.startswith("HNSW") else choices
        for parameters in choices:
            index = indexed(database, factory, path, {"seed": 0}, parameters)
            found = timed(queries, index)
            decoded = indexed(database, factory, path, {"seed": 0}, parameters, decoded=True)
            own = timed(queries, decoded)
            yield Measured(
                factory, parameters, shared(found.ids, exact.ids), shared(first_ten(found, queries, index), best),
                shared(first_ten(own, queries, decoded), best), 1000 * own.seconds / len(queries),
                index.size / len(database), built if parameters == choices[0] else None,
            )  # fmt: skip


def timed(queries: Tensor, database: Database) -> Ranking:
    """Returns the ranking of the second of two searches; the first one warms the caches."""
    retrieve(queries, database, M)
    return retrieve(queries, database, M)


def first_ten(found: Ranking, queries: Tensor, database: Database) -> Tensor:
    return rerank(found, SuperGlobalReranker(m=M), queries, database).ids[:, :10]


def shared(found: Tensor, wanted: Tensor) -> float:
    """Returns the share of the wanted results that were found, in any order."""
    return float(np.mean([np.isin(b, a).mean() for a, b in zip(found.numpy(), wanted.numpy(), strict=True)]))


def draw(rows: list[Measured], path: Path, title: str) -> None:
    """Plots recall over time per query, with a line per index and the bytes per image in the legend."""
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "superglobal"  # equal results give identical files
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for name in dict.fromkeys(row.index for row in rows):
        own = [row for row in rows if row.index == name]
        label = f"{name}, {own[0].bytes:,.0f} B"
        axes.plot([row.milliseconds for row in own], [row.recall for row in own], marker="o", label=label)
    axes.set_xscale("log")
    axes.set_xlabel("search, ms per query")
    axes.set_ylabel("recall@400")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, title="index, bytes per image")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    run_command(main)
