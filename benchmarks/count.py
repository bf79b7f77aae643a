"""Count the bytes that a GPU moves and the kernels that it launches, without a GPU.

    python benchmarks/count.py

Extraction and reranking run on a fake device, operator by operator: shapes and layouts are computed,
values are not. An operator reads its inputs and writes its outputs once each; a bias is added in a
separate pass, because cuDNN's convolutions have none in PyTorch; a gather reads as much as it writes.
Views move nothing. An operator counts as one launch, a lower bound (a sort takes more).
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))

from alternate import positive
from extract import random_checkpoint, sides

from model.recipe import Recipe
from modules.checks import values_unseen
from modules.descriptor import SCALE_SETS
from modules.reranking import RERANK_K, RERANK_M, SuperGlobalReranker
from report.command import run_command

ROOT = Path(__file__).parents[1]
DEVICE = "cuda:0"
FREE = ("empty", "empty_like", "new_empty", "empty_strided", "lift_fresh", "_unsafe_view", "device")
GATHERS = ("index", "index_select", "gather")
POOLED = (6, 6)  # of model/fused_pooling.py, counted by hand: passes over the map, and launches
FUSED = ("cudnn_convolution_relu", "cudnn_convolution_add_relu")  # only on real devices


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scales", type=positive, default=3, choices=SCALE_SETS, help="number of scales [3]")
    parser.add_argument("--size", type=sides, default="1024x768", help="WIDTHxHEIGHT of the images [1024x768]")
    parser.add_argument("--batch", type=positive, default=21, help="images per batch [21]")
    parser.add_argument("--queries", type=positive, default=70, help="queries per block of reranking [70]")
    parser.add_argument("--m", type=positive, default=RERANK_M, help=f"candidates per query [{RERANK_M}]")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(random_checkpoint(folder, 50), scales=SCALE_SETS[args.scales])
        counts = [extraction(replace(recipe, precision=name), args.batch, *args.size) for name in ("fp32", "bf16")]
    width, height = args.size
    print(f"Extraction, ResNet-50, {args.scales} scales, {width}x{height}, {args.batch} images per batch:\n")
    print("| operator | fp32: GB per image | launches per batch | bf16: GB per image | launches per batch |")
    print("| --- | --- | --- | --- | --- |")
    for kind in (*counts[0].moved, "all"):
        cells = [
            f"{count.of(count.moved, kind) / args.batch / 1e9:.2f} | {count.of(count.launches, kind)}"
            for count in counts
        ]
        print(f"| {kind} | {' | '.join(cells)} |")
    count = reranking(args.queries, args.m, recipe.dim)
    print(f"\nReranking, a block of {args.queries} queries, M = {args.m}, D = {recipe.dim}, rows on the device:\n")
    print("| operator | MB per block | launches per block |")
    print("| --- | --- | --- |")
    for kind in (*count.moved, "all"):
        print(f"| {kind} | {count.of(count.moved, kind) / 1e6:,.0f} | {count.of(count.launches, kind)} |")


class Count(TorchDispatchMode):
    """Counts the operators inside the context, on fake tensors.

    Args:
        kinds: the kinds of operators, in the order of the table.
        kind_of: returns the kind of an operator, given its name and the calling file of the project.

    Attributes:
        moved, launches: bytes and kernels by kind.
    """

    def __init__(self, kinds: Sequence[str], kind_of: Callable[[str, str], str]):
        super().__init__()
        self.kind_of = kind_of
        self.moved, self.launches = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 0)

    def of(self, numbers: dict[str, int], kind: str) -> int:
        return sum(numbers.values()) if kind == "all" else numbers[kind]

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        out = output_of_fused(*args) if name in FUSED else operator(*args, **(kwargs or {}))
        if not operator.is_view and name not in FREE:
            inputs, written = tensors(args), sum(map(bytes_of, tensors(out)))
            if name in GATHERS:
                read = written + sum(map(bytes_of, inputs[1:]))
            elif name in ("copy_", "fill_"):
                read = sum(map(bytes_of, inputs[1:]))
            else:
                read = sum(map(bytes_of, inputs))
            if name == "regional_gem":
                passes, launches = POOLED
                self._add("pooling", passes * bytes_of(args[0]), launches)
                return out
            self._add(self.kind_of(name, calling_file()), read + written)
            if name == "convolution" and args[2] is not None:
                self._add("bias", 2 * written)
        return out

    def _add(self, kind: str, moved: int, launches: int = 1) -> None:
        self.moved[kind] += moved
        self.launches[kind] += launches


def output_of_fused(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    bias, stride, padding, dilation, groups = others[-5:]
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0, 0], groups)


def tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def bytes_of(x: Tensor) -> int:
    """Returns the bytes in memory, in which an expanded axis counts once."""
    return x.element_size() * math.prod(side for side, stride in zip(x.shape, x.stride(), strict=True) if stride)


def calling_file() -> str:
    """Returns the name of the innermost running file of the project except this one."""
    frame = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.name != Path(__file__).name:
            return path.name
        frame = frame.f_back
    return ""


@torch.no_grad()
def extraction(recipe: Recipe, batch: int, width: int, height: int) -> Count:
    """Returns the counts for a batch of images, from pixels to descriptors."""

    def kind(name: str, file: str) -> str:
        if "conv" in name:
            return "convolution"
        if file == "pooling.py" or "pool" in name:
            return "pooling"
        in_encoder = {"clamp_": "clamp", "add_": "shortcut"} if file == "folding.py" else {}
        return in_encoder.get(name, "rest")

    extractor = recipe.extractor("meta")
    with FakeTensorMode(), values_unseen():
        pixels = torch.empty(batch, height, width, 3, dtype=torch.uint8, device=DEVICE)
        weights = {
            name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE)
            for name, x in (*extractor.named_parameters(), *extractor.named_buffers())
        }
        with Count(("convolution", "bias", "clamp", "shortcut", "pooling", "rest"), kind) as count:
            functional_call(extractor, weights, (pixels,))
    return count


@torch.no_grad()
def reranking(queries: int, m: int, dim: int) -> Count:
    """Returns the counts for reranking a block of queries, from the numbers of the candidates to the new order."""
    kinds = {"matrix product": ("bmm", "mm"), "gather": GATHERS, "copy": ("copy_", "clone"), "sort": ("sort", "topk")}

    def kind(name: str, _: str) -> str:
        return next((kind for kind, names in kinds.items() if name in names), "rest")

    with FakeTensorMode(), values_unseen():
        database = torch.empty(5000, dim, device=DEVICE)
        q, ids = torch.empty(queries, dim, device=DEVICE), torch.empty(queries, m, dtype=torch.int64, device=DEVICE)
        with Count((*kinds, "rest"), kind) as count:
            SuperGlobalReranker(m, min(RERANK_K, m))(q, database.index_select(0, ids.flatten()).view(queries, m, dim))
    return count


if __name__ == "__main__":
    run_command(main)
