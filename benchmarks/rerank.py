"""Reranking: the textbook formulation beside ours.

    python benchmarks/rerank.py

The baseline takes all queries at once: candidates' rows, Gram matrices, a full argsort of their rows,
the gathered (K+1) x D neighbours of each candidate. Ours is SuperGlobalReranker.rerank. Both start
from the ranking and the database's rows, which are on the device. Rows are random, around centres,
as landmarks are. "of the floor" is the time of the Gram matrices alone at the device's measured
float32 matrix rate, over the time taken.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from alternate import alternate, machine, matrix_rate, positive, report

from model.device import choose_device
from model.errors import run_command
from modules.reranking import RERANK_BETA, RERANK_K, RERANK_M, SuperGlobalReranker

CENTRES = 200


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    parser.add_argument("--queries", type=positive, default=70, help="Q [70]")
    parser.add_argument("--database", type=positive, default=5000, help="N [5000]")
    parser.add_argument("--dim", type=positive, default=2048, help="D [2048]")
    parser.add_argument("--m", type=positive, default=RERANK_M, help=f"M, candidates [{RERANK_M}]")
    parser.add_argument("--k", type=positive, default=RERANK_K, help=f"K, neighbours [{RERANK_K}]")
    parser.add_argument("--repeat", type=positive, default=9, help="runs of each, of which the median counts [9]")
    args = parser.parse_args(argv)
    if not args.k < args.m <= args.database:
        parser.error("K must be below M, and M not above N")
    device = choose_device(args.device)
    sizes = (args.queries, args.database, args.dim, args.m, args.k, device)
    rate = matrix_rate(device, torch.float32)
    timings = alternate({"baseline": partial(baseline, *sizes), "ours": partial(ours, *sizes)}, args.repeat)
    print(f"{args.queries} queries, N = {args.database}, M = {args.m}, K = {args.k}, D = {args.dim}, {machine(device)}")
    report(timings, "baseline", "ms/query", lambda seconds: 1000 * seconds / args.queries)
    floor = args.queries * 2 * args.m**2 * args.dim / max(rate, matrix_rate(device, torch.float32))
    share, each = 100 * floor / timings["ours"].median, 1000 * floor / args.queries
    print(f"ours        {share:.0f}% of the floor ({each:.2f} ms/query)")
    same = (timings["baseline"].value == timings["ours"].value).mean()
    print(f"{100 * same:.3f}% of the places are the same")


def problem(queries: int, database: int, dim: int, m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, rows, and the first m of each ranking."""
    random = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(CENTRES, dim, generator=random), dim=1)

    def around_centres(count: int) -> Tensor:
        noise = F.normalize(torch.randn(count, dim, generator=random), dim=1)
        return F.normalize(centres[torch.randint(CENTRES, (count,), generator=random)] + 0.9 * noise, dim=1).to(device)

    q, x = around_centres(queries), around_centres(database)
    return q, x, (q @ x.T).argsort(dim=1, descending=True)[:, :m].clone()


def ours(queries: int, database: int, dim: int, m: int, k: int, device: torch.device):
    q, x, ids = problem(queries, database, dim, m, device)
    reranker = SuperGlobalReranker(m, k, RERANK_BETA)

    def fetch(numbers: Tensor) -> Tensor:
        return x.index_select(0, numbers.flatten()).view(*numbers.shape, dim)

    @torch.inference_mode()
    def run() -> np.ndarray:
        return reranker.rerank(q, ids, fetch, device).order.numpy()

    return run


def baseline(queries: int, database: int, dim: int, m: int, k: int, device: torch.device):
    q, x, ids = problem(queries, database, dim, m, device)

    @torch.inference_mode()
    def run() -> np.ndarray:
        candidates = x[ids]  # (Q, M, D)
        gram = candidates @ candidates.transpose(1, 2)
        similarity, neighbours = (part[..., : k + 1] for part in gram.sort(dim=-1, descending=True))
        weights = similarity * RERANK_BETA
        weights[..., 0] = 1
        rows = candidates[torch.arange(queries)[:, None, None], neighbours]  # (Q, M, K+1, D)
        refined = (rows * weights[..., None]).sum(dim=2) / weights.sum(dim=2, keepdim=True)
        s1 = (refined @ q[:, :, None]).squeeze(2)
        first = s1.argsort(dim=1, descending=True)[:, : k + 1]
        expanded = refined.gather(1, first[..., None].expand(-1, -1, dim)).amax(dim=1)
        s2 = (refined @ expanded[:, :, None]).squeeze(2)
        return ((s1 + s2) / 2).argsort(dim=1, descending=True).cpu().numpy()

    return run


if __name__ == "__main__":
    run_command(main)
