"""Similarities of a query's candidates to each other, and which are the nearest.

Shapes: Q queries, M candidates per query, D dimensions.
"""

import torch
from torch import Tensor

from .checks import values_can_be_seen

# Rows of a Gram matrix at a time, and columns in which the largest of a row are looked for; measured
# best for 400 candidates.
_STRIP, _COLUMNS = 128, 40


def similarities(queries: Tensor, candidates: Tensor) -> Tensor:
    """q . x_i of each query and its own candidates. (Q, D), (Q, M, D) -> (Q, M)."""
    # On a CPU the product with the vector on the left takes a tenth of the time of X q.
    return (queries[:, None] @ candidates.transpose(1, 2)).squeeze(1)


def gram_matrices(candidates: Tensor) -> Tensor:
    """X X^T of each query, in strips up to the diagonal, mirrored. (Q, M, D) -> (Q, M, M), exactly symmetric."""
    m = candidates.shape[1]
    gram = candidates.new_empty(len(candidates), m, m)
    for start in range(0, m, _STRIP):
        stop = min(start + _STRIP, m)
        strip = candidates[:, start:stop] @ candidates[:, :stop].transpose(1, 2)
        square = strip[:, :, start:]  # on some CPUs not symmetric to the last bit
        square.copy_(square.tril() + square.tril(-1).transpose(1, 2))
        gram[:, start:stop, :stop] = strip
        gram[:, :start, start:stop] = strip[:, :, :start].transpose(1, 2)
    return gram


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x.topk(k) over the last axis, in less time where k is small.

    The row is laid out in columns. The k largest lie in the k columns with the largest maxima, and
    only these are looked through. (..., M) -> values and indices (..., k), descending.
    """
    size = x.shape[-1]
    if k > _COLUMNS or size < 2 * _COLUMNS:
        return x.topk(k, dim=-1)
    whole = size - size % _COLUMNS  # what is left over is looked through as it is: padding might be chosen
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
    """For each size k, whether j is one of the k largest of row i. (..., M, M) -> bool (..., M, M) per size.

    Of equal similarities the lower places are taken, so that the sets depend on no sorting algorithm.
    Entries of -inf are never taken; a row with fewer others has a smaller set.
    """
    size = similarity.shape[-1]
    values = largest(similarity, min(max(sizes), size))[0].detach()
    return [_largest_places(similarity, values[..., min(k, size) - 1, None], k) for k in sizes]


def _largest_places(similarity: Tensor, threshold: Tensor, k: int) -> Tensor:
    """Whether an entry is one of the k largest of its row, of which the threshold (..., 1) is the smallest."""
    threshold = threshold.clamp(min=torch.finfo(similarity.dtype).min)
    chosen = similarity >= threshold
    # Where there are no ties to be decided, the rest changes nothing; a GPU does it sooner than it is waited for.
    if not similarity.is_cuda and values_can_be_seen(similarity) and (chosen.sum(dim=-1) <= k).all():
        return chosen
    tied = similarity == threshold
    room = k - (similarity > threshold).sum(dim=-1, keepdim=True)
    return chosen & ~(tied & (tied.cumsum(dim=-1) > room))
