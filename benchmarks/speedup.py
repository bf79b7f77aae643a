"""Compare the time to rerank 400 candidates of a query by local features (CVNet-Rerank) and by SuperGlobal.

    python benchmarks/speedup.py
    python benchmarks/speedup.py --device cuda --pairs 16 --precision fp16

Four contenders, in turn: CVNet-Rerank by the book (whole 4D tensors, resized at their full size, one
pair at a time, float32), our CVNet-Rerank, the textbook formulation of SuperGlobal's reranking, and ours
(both from rerank.py, 70 queries at once). The data of the database is in memory: feature maps of 1024x768
images, or descriptors. CVNet's time is that of a few pairs, scaled to 400; the time to extract a feature
map is given separately. Weights and images are random, because they do not matter for speed.
"""

import argparse
import math
import tempfile
from functools import partial
from pathlib import Path

import rerank
import torch
import torch.nn.functional as F
from alternate import alternate, machine, positive
from extract import HEIGHT, WIDTH, draw_images, random_checkpoint
from torch import Tensor

from cvnet_rerank.network import MAP_DIM, MAP_SCALES, CenterPivotConv4d, CVNetRerank, load_cvnet_rerank
from model.device import choose_device, prepare_process
from model.folding import PRECISIONS
from modules.reranking import RERANK_K, RERANK_M
from report.command import run_command

DEPTH = 50
QUERIES, DATABASE, DIM = 70, 5000, 2048
PAPER = 64_865  # CVNet-Rerank's time divided by SuperGlobal's, as published


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    parser.add_argument("--pairs", type=positive, default=2, help="pairs per run of our CVNet-Rerank [2]")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="precision of our CVNet-Rerank [fp32]")
    parser.add_argument("--repeat", type=positive, default=5, help="runs of each, whose median is used [5]")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    prepare_process(device)
    problem = rerank.problem(QUERIES, DATABASE, DIM, RERANK_M, device)
    with tempfile.TemporaryDirectory() as folder:
        plain, ours = networks(random_checkpoint(folder, DEPTH), args.precision, device)
    images = torch.stack(draw_images(1 + args.pairs, WIDTH, HEIGHT, device)).to(device)
    maps, plain_maps = feature_maps(ours, images), feature_maps(plain, images[:2])
    contenders = {
        "CVNet by the book": partial(score_by_the_book, plain, *plain_maps.split(1)),
        "CVNet": partial(score, ours, maps),
        "SuperGlobal by the book": partial(rerank.baseline, "superglobal", *problem, RERANK_K),
        "SuperGlobal": rerank.ours("superglobal", *problem, RERANK_K),
        "a map": partial(feature_maps, ours, images[:1]),
    }
    timings = alternate(contenders, device, args.repeat)
    # Factors from the seconds of a run to those of a query.
    per_query = {"CVNet by the book": RERANK_M, "CVNet": RERANK_M / args.pairs}
    per_query |= dict.fromkeys(("SuperGlobal by the book", "SuperGlobal"), 1 / QUERIES)
    print(f"{RERANK_M} candidates per query, images of {WIDTH}x{HEIGHT}, ResNet-{DEPTH}, {machine(device)}")
    fastest = timings["SuperGlobal"].median / QUERIES
    for name, factor in per_query.items():
        timing = timings[name]
        seconds = [factor * value for value in (timing.median, min(timing.seconds), max(timing.seconds))]
        print(
            f"{name:<24}{seconds[0]:11.4f} s/query ({seconds[1]:.4f} to {seconds[2]:.4f})"
            f"{seconds[0] / fastest:11,.0f} x SuperGlobal's{timing.megabytes:7.0f} MB"
        )
    print(f"in the paper, CVNet takes {PAPER:,} x SuperGlobal's time")
    print(
        f"CVNet's times are those of 1 pair by the book and of {args.pairs} of ours ({args.precision}), scaled to "
        f"{RERANK_M}, without the feature maps: {timings['a map'].median:.3f} s to extract one"
    )
    by_the_book, scores = timings["CVNet by the book"].value, timings["CVNet"].value
    print(f"score of the first pair: {by_the_book[0]:.6f} by the book, {scores[0]:.6f} ours")
    h, w = maps.shape[2:]
    values = MAP_DIM * h * w
    print(
        f"kept per database image: CVNet {4 * values:,} bytes, a map ({MAP_DIM}, {h}, {w}) in fp32 ({2 * values:,} in "
        f"fp16); SuperGlobal {4 * DIM:,} bytes, the descriptor that the search needs anyway"
    )


def networks(checkpoint: Path, precision: str, device: torch.device) -> tuple[CVNetRerank, CVNetRerank]:
    """Returns CVNet-Rerank in the plain memory format of float32, for score_by_the_book, and ours."""
    plain = load_cvnet_rerank(checkpoint, DEPTH).to(device).to(memory_format=torch.contiguous_format)
    return plain, load_cvnet_rerank(checkpoint, DEPTH, precision=precision).to(device)


@torch.inference_mode()
def feature_maps(network: CVNetRerank, images: Tensor) -> Tensor:
    """Returns the feature maps of images of equal size, one by one. (N, H, W, 3) -> (N, 1024, h, w)."""
    return torch.cat([network.feature_map(network.normalise(each[None])) for each in images])


@torch.inference_mode()
def score(network: CVNetRerank, maps: Tensor) -> Tensor:
    """Returns our scores of the first map with each of the others."""
    return network.score(network.query_inputs(maps[:1]), maps[1:]).cpu()


@torch.inference_mode()
def score_by_the_book(network: CVNetRerank, query: Tensor, key: Tensor) -> Tensor:
    """Scores feature maps (1, 1024, hq, wq) and (1, 1024, hk, wk) step by step as defined. -> (1,)."""
    query, key = query.contiguous(), key.contiguous()
    resize = partial(F.interpolate, mode="bilinear", align_corners=True)
    local_maps = []
    for x in (query, key):
        sizes = [[round(side * math.sqrt(scale)) for side in x.shape[2:]] for scale in MAP_SCALES]
        local_maps.append([conv(resize(x, size)) for size, conv in zip(sizes, network.conv2ds, strict=True)])
    correlations = []
    for q in local_maps[0]:
        for k in local_maps[1]:
            flat_q, flat_k = q.flatten(2), k.flatten(2)
            norms = flat_q.norm(dim=1)[:, :, None] * flat_k.norm(dim=1)[:, None]
            x = (flat_q.mT @ flat_k) / (norms + 1e-8)  # (1, positions of q, positions of k)
            x = resize(x.mT.unflatten(2, q.shape[2:]), query.shape[2:]).flatten(2).mT
            x = resize(x.unflatten(2, k.shape[2:]), key.shape[2:])
            correlations.append(x.unflatten(1, query.shape[2:]))
    x = torch.stack(correlations, dim=1).clamp(min=0)  # (1, 9, hq, wq, hk, wk)
    learner = network.cv_learner
    for layer in (*learner.block1, *learner.block2, *learner.block3, *learner.block4):
        if isinstance(layer, CenterPivotConv4d):
            s = layer.stride
            over_query = layer.conv1(x[..., ::s, ::s].permute(0, 4, 5, 1, 2, 3).flatten(0, 2))
            over_key = layer.conv2(x[:, :, ::s, ::s].permute(0, 2, 3, 1, 4, 5).flatten(0, 2))
            first = over_query.unflatten(0, over_key.shape[2:]).permute(2, 3, 4, 0, 1)
            x = (first + over_key.unflatten(0, over_query.shape[2:]).permute(2, 0, 1, 3, 4))[None]
        else:
            x = layer(x)
    return learner.mlp(x.mean(dim=(2, 3, 4, 5))).softmax(dim=1)[:, 1].cpu()


if __name__ == "__main__":
    run_command(main)
