"""Textbook formulations, slow and dense, that the fast ones are held against."""

import numpy as np


def full_ranking(queries: np.ndarray, database: np.ndarray) -> np.ndarray:
    """(Q, N): every row of the database, best first, equal scores by row number."""
    scores = (queries.astype(np.float64) @ database.astype(np.float64).T).astype(np.float32)
    return np.argsort(-scores, axis=1, kind="stable")


def dense_reranking(query: np.ndarray, candidates: np.ndarray, k: int, beta: float, s2: str = "refined") -> np.ndarray:
    """The new order of the candidates, with all refined rows and their neighbours built. (D,), (M, D) -> (M,)."""
    gram = candidates @ candidates.T
    itself_first = np.where(np.eye(len(gram)), np.inf, gram)
    near = np.argsort(-itself_first, axis=1, kind="stable")[:, : k + 1]
    weights = beta * np.take_along_axis(gram, near, axis=1)
    weights[:, 0] = 1
    refined = (weights[:, :, None] * candidates[near]).sum(axis=1) / weights.sum(axis=1, keepdims=True)
    s1 = refined @ query
    expanded = refined[np.argsort(-s1, kind="stable")[: k + 1]].max(axis=0)
    compared = refined if s2 == "refined" else candidates
    return np.argsort(-(s1 + compared @ expanded) / 2, kind="stable")


def mean_average_precision(rankings: np.ndarray, ground_truth: list[dict], positive: tuple, ignored: tuple) -> float:
    """The revisited protocol, walking down each ranking. rankings (Q, N) -> mAP in percent."""
    values = []
    for ranking, lists in zip(rankings, ground_truth, strict=True):
        good = {number for kind in positive for number in lists[kind]}
        skipped = {number for kind in ignored for number in lists[kind]}
        if not good:
            continue
        found, rank, ap = 0, 0, 0.0
        for number in ranking:
            if number in skipped:
                continue
            if number in good:
                before = 1.0 if rank == 0 else found / rank
                found += 1
                ap += (before + found / (rank + 1)) / 2 / len(good)
            rank += 1
        values.append(ap)
    return 100 * float(np.mean(values))


def all_protocols(rankings: np.ndarray, ground_truth: list[dict]) -> dict[str, float]:
    return {
        "E": mean_average_precision(rankings, ground_truth, ("easy",), ("junk", "hard")),
        "M": mean_average_precision(rankings, ground_truth, ("easy", "hard"), ("junk",)),
        "H": mean_average_precision(rankings, ground_truth, ("hard",), ("junk", "easy")),
    }


def challenge_map(predictions: dict[str, list[str]], solution: dict[str, set[str]]) -> float:
    """GLDv2's mAP@100 in percent, prediction by prediction. A query without predictions counts 0."""
    total = 0.0
    for query, positives in solution.items():
        seen, good, ap = set(), 0, 0.0
        for place, image in enumerate(predictions.get(query, [])[:100], start=1):
            if image in positives and image not in seen:
                good += 1
                ap += good / place
            seen.add(image)
        total += ap / min(len(positives), 100)
    return 100 * total / len(solution)


def recall_at(rankings: np.ndarray, positives: list[set[int]], ignored: list[set[int]], k: int) -> float:
    """The share, in percent, of the queries with a positive that have one within the first k that are not ignored."""
    values = []
    for ranking, good, out in zip(rankings, positives, ignored, strict=True):
        if good:
            kept = [number for number in ranking if number not in out]
            values.append(any(number in good for number in kept[:k]))
    return 100 * float(np.mean(values))


def discriminative_projection(rows: np.ndarray, labels: np.ndarray, dim: int, balanced: bool) -> np.ndarray:
    """(dim, D), up to a factor and signs: eig(C_S^-1/2 C_D C_S^-1/2)^T C_S^-1/2 over explicit pairs. (N, D), (N,).

    The paper's: C_S sums d d^T over matching pairs, C_D over those that do not match. Balanced: a matching pair
    of a class of n counts 1/n, and C_D sums over all pairs.
    """
    rows, width = rows.astype(np.float64), rows.shape[1]
    intraclass, interclass = np.zeros((width, width)), np.zeros((width, width))
    for i in range(len(rows)):
        for j in range(i):
            outer = np.outer(rows[i] - rows[j], rows[i] - rows[j])
            matching = labels[i] == labels[j]
            if matching:
                intraclass += outer / (labels == labels[i]).sum() if balanced else outer
            if balanced or not matching:
                interclass += outer
    values, axes = np.linalg.eigh(intraclass)
    root = axes @ np.diag(values**-0.5) @ axes.T
    values, axes = np.linalg.eigh(root @ interclass @ root)
    return axes[:, np.argsort(-values)[:dim]].T @ root
