"""The similarities of a query's candidates to each other, and the nearest neighbours among them.

Shapes: Q queries, M candidates per query, D dimensions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Columns of a Gram matrix computed at a time, and columns in which `largest` lays out a row; the fastest
# values measured for 400 candidates.
_STRIP, _COLUMNS = 80, 40


def similarities(queries: Tensor, candidates: Tensor) -> Tensor:
    """Returns q . x_i for each query and its own candidates. (Q, D), (Q, M, D) -> (Q, M)."""
    # On a CPU, the product with the vector on the left takes a tenth of the time of X q.
    return (queries[:, None] @ candidates.transpose(1, 2)).squeeze(1)


def gram_matrices(candidates: Tensor) -> Tensor:
    """Returns X X^T per query, computed in strips up to the diagonal. (Q, M, D) -> (Q, M, M), exactly symmetric."""
    q, m = candidates.shape[:2]
    gram = candidates.new_empty(q, m, m)
    for start in range(0, m, _STRIP):
        strip, rows = slice(start, start + _STRIP), slice(start + _STRIP)
        gram[:, rows, strip].baddbmm_(candidates[:, rows], candidates[:, strip].transpose(1, 2), beta=0)
    upper = torch.ones(m, m, dtype=torch.bool, device=gram.device).triu()
    return torch.where(upper, gram, gram.transpose(1, 2))  # the squares are not symmetric to the last bit on some CPUs


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


def nearest(similarity: Tensor, k: int) -> Tensor:
    """Returns the places of the k largest entries of each row, descending. (..., M) -> int64 (..., min(k, M)).

    Equal entries are in the order of their places, so that the result does not depend on a sorting algorithm.
    """
    similarity, k = similarity.detach(), min(k, similarity.shape[-1])
    if similarity.is_cuda:  # sorting costs less than waiting to find out whether entries are equal
        return similarity.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    values, places = largest(similarity, min(k + 1, similarity.shape[-1]))
    tied, places = (values[..., 1:] == values[..., :-1]).any(dim=-1), places[..., :k]
    places[tied] = similarity[tied].sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return places


def membership(similarity: Tensor, places: Tensor) -> Tensor:
    """Returns whether an entry is above -inf and at one of the places of its row. (..., M), (..., K) -> (..., M)."""
    present = similarity.gather(-1, places) > -torch.inf
    return torch.zeros_like(similarity, dtype=torch.bool).scatter_(-1, places, present)


def weighted_sums(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Returns W X per query, W sparse: sum over k of w_ik x_j with j = places_ik.

    rows (Q, M, D), places and weights (Q, N, K) -> (Q, N, D).
    """
    q, m, d = rows.shape
    numbers = (places + torch.arange(0, q * m, m, device=places.device)[:, None, None]).flatten(0, 1)
    weights = weights.to(rows.dtype).flatten(0, 1)
    return F.embedding_bag(numbers, rows.flatten(0, 1), mode="sum", per_sample_weights=weights).view(q, -1, d)
