"""Time reranking: the textbook formulation of each reranker compared with this project.

    python benchmarks/rerank.py
    python benchmarks/rerank.py --reranker k-reciprocal diffusion

SuperGlobal's baseline processes all queries at once: descriptors of the candidates, Gram matrices, a full
argsort of their rows, the gathered (K+1) x D neighbours of each candidate. The other baselines process a
query at a time: query expansion row by row as in its formula, k-reciprocal encoding set by set, diffusion
with a dense solver. "ours" is the `rerank` of each reranker. All start from the ranking and the database's
rows on the device. Rows are random around centres, like landmarks. "of the floor" is the time of the Gram
matrices at the device's measured float32 matrix rate, divided by the measured time.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from alternate import alternate, machine, matrix_rate, positive, report
from torch import Tensor

from model.device import choose_device, prepare_process
from modules.diffusion import ALPHA, GAMMA, KQ, DiffusionReranker
from modules.diffusion import K as DIFFUSION_K
from modules.expansion import QE_ALPHA, QE_N, QueryExpansion
from modules.reciprocal import K1, K2, LAMBDA, KReciprocalReranker
from modules.reranking import RERANK_BETA, RERANK_K, RERANK_M, SuperGlobalReranker
from modules.search import Database
from report.command import run_command

CENTRES = 200
RERANKERS = {
    "superglobal": lambda m, k: SuperGlobalReranker(m, k),
    "superglobal-original": lambda m, k: SuperGlobalReranker(m, k, s2="original"),
    "aqe": lambda m, k: QueryExpansion(min(QE_N, m), alpha=0, m=m),
    "alpha-qe": lambda m, k: QueryExpansion(min(QE_N, m), m=m),
    "k-reciprocal": lambda m, k: KReciprocalReranker(m),
    "diffusion": lambda m, k: DiffusionReranker(m),
}
WITH_GRAM_MATRICES = ("superglobal", "superglobal-original", "k-reciprocal", "diffusion")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    parser.add_argument("--reranker", nargs="+", default=list(RERANKERS), choices=RERANKERS, help="[all]")
    parser.add_argument("--queries", type=positive, default=70, help="Q [70]")
    parser.add_argument("--database", type=positive, default=5000, help="N [5000]")
    parser.add_argument("--dim", type=positive, default=2048, help="D [2048]")
    parser.add_argument("--m", type=positive, default=RERANK_M, help=f"M, candidates [{RERANK_M}]")
    parser.add_argument("--k", type=positive, default=RERANK_K, help=f"K, SuperGlobal's neighbours [{RERANK_K}]")
    parser.add_argument("--repeat", type=positive, default=9, help="runs of each, whose median is used [9]")
    args = parser.parse_args(argv)
    if not args.k < args.m <= args.database:
        parser.error("K must be below M, and M not above N")
    device = choose_device(args.device)
    prepare_process(device)
    q, x, ids = problem(args.queries, args.database, args.dim, args.m, device)
    print(f"{args.queries} queries, N = {args.database}, M = {args.m}, K = {args.k}, D = {args.dim}, {machine(device)}")
    for name in args.reranker:
        rate = matrix_rate(device, torch.float32)
        contenders = {"baseline": partial(baseline, name, q, x, ids, args.k), "ours": ours(name, q, x, ids, args.k)}
        timings = alternate(contenders, device, args.repeat)
        print(f"\n{RERANKERS[name](args.m, args.k)}")
        report(timings, "baseline", "ms/query", lambda seconds: 1000 * seconds / args.queries)
        if name in WITH_GRAM_MATRICES:
            floor = args.queries * 2 * args.m**2 * args.dim / max(rate, matrix_rate(device, torch.float32))
            share, each = 100 * floor / timings["ours"].median, 1000 * floor / args.queries
            print(f"ours        {share:.0f}% of the floor ({each:.2f} ms/query)")
        same = (timings["baseline"].value == timings["ours"].value).float().mean()
        print(f"{100 * same:.3f}% of the places are the same", flush=True)


def problem(queries: int, database: int, dim: int, m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns queries, rows, and the first m of each ranking."""
    random = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(CENTRES, dim, generator=random), dim=1)

    def around_centres(count: int) -> Tensor:
        noise = F.normalize(torch.randn(count, dim, generator=random), dim=1)
        return F.normalize(centres[torch.randint(CENTRES, (count,), generator=random)] + 0.9 * noise, dim=1)

    q, x = around_centres(queries), around_centres(database)
    ids = (q @ x.T).argsort(dim=1, descending=True)[:, :m].clone()  # on the CPU: the same for every device
    return q.to(device), x.to(device), ids.to(device)


def ours(name: str, q: Tensor, x: Tensor, ids: Tensor, k: int, rows_on: str | None = None) -> Callable[[], Tensor]:
    """Returns `rerank` with the rows on the device of the queries, or in a Database on the device `rows_on`."""
    reranker = RERANKERS[name](ids.shape[1], k)

    def fetch(numbers: Tensor) -> Tensor:
        return x.index_select(0, numbers.flatten()).view(*numbers.shape, -1)

    rows = fetch if rows_on is None else Database(x.to(rows_on)).rows
    return torch.inference_mode()(lambda: reranker.rerank(q, ids, rows, q.device).order.cpu())


@torch.inference_mode()
def baseline(name: str, q: Tensor, x: Tensor, ids: Tensor, k: int) -> Tensor:
    """Returns the new order (Q, M) by the textbook formulation."""
    if name.startswith("superglobal"):
        scores = superglobal(q, x[ids], k, original=name == "superglobal-original")
    else:
        scores = torch.stack([ONE_QUERY[name](query, x[row]) for query, row in zip(q, ids, strict=True)])
    return scores.argsort(dim=1, descending=True).cpu()


def superglobal(q: Tensor, candidates: Tensor, k: int, original: bool) -> Tensor:
    """Returns (S1 + S2) / 2 of all queries at once. (Q, D), (Q, M, D) -> (Q, M)."""
    gram = candidates @ candidates.transpose(1, 2)
    similarity, neighbours = (part[..., : k + 1] for part in gram.sort(dim=-1, descending=True))
    weights = similarity * RERANK_BETA
    weights[..., 0] = 1
    rows = candidates[torch.arange(len(q))[:, None, None], neighbours]  # (Q, M, K+1, D)
    refined = (rows * weights[..., None]).sum(dim=2) / weights.sum(dim=2, keepdim=True)
    s1 = (refined @ q[:, :, None]).squeeze(2)
    first = s1.argsort(dim=1, descending=True)[:, : k + 1]
    expanded = refined.gather(1, first[..., None].expand(-1, -1, q.shape[1])).amax(dim=1)
    s2 = ((candidates if original else refined) @ expanded[:, :, None]).squeeze(2)
    return (s1 + s2) / 2


def query_expansion(query: Tensor, candidates: Tensor, alpha: float) -> Tensor:
    """Returns the similarities to the expanded query. (D,), (M, D) -> (M,)."""
    total = query.clone()
    for x in candidates[:QE_N]:
        total += (query @ x).clamp(min=0) ** alpha * x
    return candidates @ (total / total.norm())


def k_reciprocal(query: Tensor, candidates: Tensor) -> Tensor:
    """Returns -((1 - lambda) Jaccard distance + lambda (1 - q . x)), set by set. (D,), (M, D) -> (M,)."""
    nodes = torch.cat([query[None], candidates])
    gram = nodes @ nodes.T
    ranking = gram.argsort(dim=1, descending=True)

    def reciprocal(k: int) -> list[set[int]]:
        near = [set(row) for row in ranking[:, : k + 1].tolist()]
        return [{j for j in near[i] if i in near[j]} for i in range(len(near))]

    encodings = torch.zeros_like(gram)
    whole, half = reciprocal(K1), reciprocal(round(K1 / 2))
    for i in range(len(nodes)):
        members = set(whole[i])
        for j in whole[i]:
            if 3 * len(half[j] & whole[i]) >= 2 * len(half[j]):
                members |= half[j]
        numbers = torch.tensor(sorted(members), device=gram.device)
        encodings[i, numbers] = (gram[i, numbers] - 1).exp()
    encodings = encodings[ranking[:, :K2]].mean(dim=1)
    shared = torch.minimum(encodings[:1], encodings[1:]).sum(dim=1)
    jaccard = 1 - shared / torch.maximum(encodings[:1], encodings[1:]).sum(dim=1)
    return -((1 - LAMBDA) * jaccard + LAMBDA * (1 - gram[0, 1:]))


def diffusion(query: Tensor, candidates: Tensor) -> Tensor:
    """Solves (I - alpha S) f = y for f with a dense solver. (D,), (M, D) -> (M,)."""
    gram = candidates @ candidates.T
    others = gram.clone().fill_diagonal_(-torch.inf).argsort(dim=1, descending=True)[:, :DIFFUSION_K]
    near = torch.zeros_like(gram).scatter_(1, others, 1)
    affinities = gram.clamp(min=0).pow(GAMMA).fill_diagonal_(0) * near * near.T
    degrees = affinities.sum(dim=1)
    scale = torch.diag(torch.where(degrees > 0, degrees.rsqrt(), 0))
    y = (candidates @ query).clamp(min=0).pow(GAMMA)
    y[KQ:] = 0
    return torch.linalg.solve(torch.eye(len(gram), device=gram.device) - ALPHA * scale @ affinities @ scale, y)


ONE_QUERY = {
    "aqe": partial(query_expansion, alpha=0),
    "alpha-qe": partial(query_expansion, alpha=QE_ALPHA),
    "k-reciprocal": k_reciprocal,
    "diffusion": diffusion,
}


if __name__ == "__main__":
    run_command(main)
