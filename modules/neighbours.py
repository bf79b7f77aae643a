"""The similarities of a query's candidates to each other, and the nearest neighbours among them.

Shapes: Q queries, M candidates per query, D dimensions.
"""

import torch
from torch import Tensor

from .checks import values_can_be_seen

# Rows of a Gram matrix computed at a time, and columns in which `largest` lays out a row; the fastest
# values measured for 400 candidates.
_STRIP, _COLUMNS = 128, 40


def similarities(queries: Tensor, candidates: Tensor) -> Tensor:
    """Returns q . x_i for each query and its own candidates. (Q, D), (Q, M, D) -> (Q, M)."""
    # On a CPU, the product with the vector on the left takes a tenth of the time of X q.
    return (queries[:, None] @ candidates.transpose(1, 2)).squeeze(1)


def gram_matrices(candidates: Tensor) -> Tensor:
    """Returns X X^T per query, computed in strips up to the diagonal. (Q, M, D) -> (Q, M, M), exactly symmetric."""
    m = candidates.shape[1]
    gram = candidates.new_empty(len(candidates), m, m)
    for start in range(0, m, _STRIP):
        stop = min(start + _STRIP, m)
        strip = candidates[:, start:stop] @ candidates[:, :stop].transpose(1, 2)
        square = strip[:, :, start:]  # not symmetric to the last bit on some CPUs
        square.copy_(square.tril() + square.tril(-1).transpose(1, 2))
        gram[:, start:stop, :stop] = strip
        gram[:, :start, start:stop] = strip[:, :, :start].transpose(1, 2)
    return gram


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns x.topk(k) over the last axis, faster if k is small.

    A row is laid out in columns. The k largest values lie in the k columns with the largest maxima, so
    that only these are searched. (..., M) -> values and indices (..., k), descending.
    """
    size = x.shape[-1]
    if k > _COLUMNS or size < 2 * _COLUMNS:
        return x.topk(k, dim=-1)
    whole = size - size % _COLUMNS  # the remainder is searched as it is, because padding might be chosen
    table = x[..., :whole].unflatten(-1, (-1, _COLUMNS))
    columns = table.amax(dim=-2).topk(k, dim=-1, sorted=False).indices  # (..., k)
    few = table.gather(-1, columns.unsqueeze(-2).expand(*table.shape[:-1], k)).flatten(-2)
    if whole == size:
        values, places = few.topk(k, dim=-1)
        return values, columns.gather(-1, places % k) + places // k * _COLUMNS
    values, places = torch.cat([few, x[..., whole:]], dim=-1).topk(k, dim=-1)
    in_table = columns.gather(-1, places % k) + places // k * _COLUMNS
    return values, torch.where(places < few.shape[-1], in_table, places - few.shape[-1] + whole)


def nearest(similarity: Tensor, *sizes: int) -> list[Tensor]:
    """Returns for each size k whether j is among the k largest of row i. (..., M, M) -> bool (..., M, M) per size.

    Among equal similarities the lower places are taken, so that the sets do not depend on a sorting algorithm.
    Entries of -inf are never taken; a row with fewer than k other entries has a smaller set.
    """
    size = similarity.shape[-1]
    values = largest(similarity, min(max(sizes), size))[0].detach()
    return [_largest_places(similarity, values[..., min(k, size) - 1, None], k) for k in sizes]


def _largest_places(similarity: Tensor, threshold: Tensor, k: int) -> Tensor:
    """Returns whether an entry is among the k largest of its row; the threshold (..., 1) is the smallest of them."""
    threshold = threshold.clamp(min=torch.finfo(similarity.dtype).min)
    chosen = similarity >= threshold
    # Without ties the rest changes nothing; on a GPU it costs less than waiting to find out.
    if not similarity.is_cuda and values_can_be_seen(similarity) and (chosen.sum(dim=-1) <= k).all():
        return chosen
    tied = similarity == threshold
    room = k - (similarity > threshold).sum(dim=-1, keepdim=True)
    return chosen & ~(tied & (tied.cumsum(dim=-1) > room))
