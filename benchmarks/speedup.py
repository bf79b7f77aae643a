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
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from alternate import alternate, machine, positive
from extract import draw_image, random_checkpoint
from rerank import baseline, ours

from cvnet_rerank.network import MAP_DIM, MAP_SCALES, CenterPivotConv4d, CVNetRerank, load_cvnet_rerank
from extraction.images import to_network_input
from model.cvnet import FEATURE_DIM
from model.device import choose_device, prepare_process
from model.folding import PRECISIONS
from modules.reranking import RERANK_K, RERANK_M
from report.command import run_command

SIZE, DEPTH = (1024, 768), 50
QUERIES, DATABASE = 70, 5000
PAPER = 64_865  # CVNet-Rerank's time divided by SuperGlobal's, as published


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    parser.add_argument("--pairs", type=positive, default=2, help="pairs per run of our CVNet-Rerank [2]")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="precision of our CVNet-Rerank [fp32]")
    parser.add_argument("--repeat", type=positive, default=5, help="runs of each, whose median is used [5]")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    sizes = (QUERIES, DATABASE, FEATURE_DIM, RERANK_M, RERANK_K, device)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = random_checkpoint(folder, DEPTH)
        contenders = {
            "CVNet by the book": partial(cvnet_by_the_book, checkpoint, device),
            "CVNet": partial(cvnet, checkpoint, args.precision, device, args.pairs),
            "SuperGlobal by the book": partial(baseline, *sizes),
            "SuperGlobal": partial(ours, *sizes),
            "a map": partial(extraction, checkpoint, args.precision, device),
        }
        timings = alternate(contenders, args.repeat)
    # Factors from the seconds of a run to those of a query.
    per_query = {"CVNet by the book": RERANK_M, "CVNet": RERANK_M / args.pairs}
    per_query |= dict.fromkeys(("SuperGlobal by the book", "SuperGlobal"), 1 / QUERIES)
    print(f"{RERANK_M} candidates per query, images of {SIZE[0]}x{SIZE[1]}, ResNet-{DEPTH}, {machine(device)}")
    fastest = timings["SuperGlobal"].median / QUERIES
    for name, factor in per_query.items():
        seconds = [factor * value for value in (timings[name].median, *sorted(timings[name].seconds))]
        print(
            f"{name:<24}{seconds[0]:11.4f} s/query ({seconds[1]:.4f} to {seconds[-1]:.4f})"
            f"{seconds[0] / fastest:11,.0f} x SuperGlobal's{timings[name].megabytes:7.0f} MB in use"
        )
    print(f"in the paper, CVNet takes {PAPER:,} x SuperGlobal's time")
    (h, w), scores = timings["CVNet"].value
    by_the_book = timings["CVNet by the book"].value[0]
    print(
        f"CVNet's times are those of 1 pair by the book and of {args.pairs} of ours ({args.precision}), scaled to "
        f"{RERANK_M}, without the feature maps: {timings['a map'].median:.3f} s to extract one"
    )
    print(f"score of the first pair: {by_the_book:.6f} by the book, {scores[0]:.6f} ours")
    values = MAP_DIM * h * w
    print(
        f"kept per database image: CVNet {4 * values:,} bytes, a map ({MAP_DIM}, {h}, {w}) in fp32 ({2 * values:,} in "
        f"fp16); SuperGlobal {4 * FEATURE_DIM:,} bytes, the descriptor that the search needs anyway"
    )


def cvnet(checkpoint: Path, precision: str, device: torch.device, pairs: int, size: tuple[int, int] = SIZE):
    prepare_process(device)
    network = load_cvnet_rerank(checkpoint, DEPTH, precision=precision).to(device)
    query_map, *key_maps = maps_in_memory(network, 1 + pairs, device, size)
    query, keys = network.query_inputs(query_map), torch.cat(key_maps)

    @torch.inference_mode()
    def run() -> tuple[tuple[int, ...], np.ndarray]:
        return tuple(keys.shape[2:]), network.score(query, keys).cpu().numpy()

    return run


def cvnet_by_the_book(checkpoint: Path, device: torch.device, size: tuple[int, int] = SIZE):
    prepare_process(device)
    network = load_cvnet_rerank(checkpoint, DEPTH).to(device)
    query, key = (x.contiguous() for x in maps_in_memory(network, 2, device, size))
    network.to(memory_format=torch.contiguous_format)

    @torch.inference_mode()
    def run() -> np.ndarray:
        return score_by_the_book(network, query, key).cpu().numpy()

    return run


def extraction(checkpoint: Path, precision: str, device: torch.device):
    prepare_process(device)
    network = load_cvnet_rerank(checkpoint, DEPTH, precision=precision).to(device)
    return lambda: maps_in_memory(network, 1, device, SIZE)[0][0, 0].cpu().numpy()


@torch.inference_mode()
def maps_in_memory(network: CVNetRerank, count: int, device: torch.device, size: tuple[int, int]) -> list[Tensor]:
    """Returns feature maps of random images, (1, 1024, h, w) each."""
    pixels = (torch.from_numpy(draw_image(*size, seed))[None].to(device) for seed in range(count))
    return [network.feature_map(to_network_input(each)) for each in pixels]


def score_by_the_book(network: CVNetRerank, query: Tensor, key: Tensor) -> Tensor:
    """Scores feature maps (1, 1024, hq, wq) and (1, 1024, hk, wk) step by step as defined. -> (1,)."""
    resize = partial(F.interpolate, mode="bilinear", align_corners=True)
    locals_of = []
    for x in (query, key):
        sizes = [[round(side * math.sqrt(scale)) for side in x.shape[2:]] for scale in MAP_SCALES]
        locals_of.append([conv(resize(x, size)) for size, conv in zip(sizes, network.conv2ds, strict=True)])
    correlations = []
    for q in locals_of[0]:
        for k in locals_of[1]:
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
    return learner.mlp(x.mean(dim=(2, 3, 4, 5))).softmax(dim=1)[:, 1]


if __name__ == "__main__":
    run_command(main)
