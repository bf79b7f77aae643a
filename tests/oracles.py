"""Textbook formulations, slow and dense, with which the fast ones are compared."""

import numpy as np


def full_ranking(queries: np.ndarray, database: np.ndarray) -> np.ndarray:
    """Returns all rows of the database, best first, equal scores by row number. -> (Q, N)."""
    scores = (queries.astype(np.float64) @ database.astype(np.float64).T).astype(np.float32)
    return np.argsort(-scores, axis=1, kind="stable")


def dense_reranking(query: np.ndarray, candidates: np.ndarray, k: int, beta: float, s2: str = "refined") -> np.ndarray:
    """Returns SuperGlobal's order of the candidates. (D,), (M, D) -> (M,)."""
    return np.argsort(-superglobal_scores(query, candidates, k, beta, s2), kind="stable")


def superglobal_scores(
    query: np.ndarray, candidates: np.ndarray, k: int, beta: float, s2: str = "refined"
) -> np.ndarray:
    """Returns (S1 + S2) / 2 of the candidates, computed from all refined descriptors. (D,), (M, D) -> (M,)."""
    gram = candidates @ candidates.T
    itself_first = np.where(np.eye(len(gram)), np.inf, gram)
    near = np.argsort(-itself_first, axis=1, kind="stable")[:, : k + 1]
    weights = beta * np.take_along_axis(gram, near, axis=1)
    weights[:, 0] = 1
    refined = (weights[:, :, None] * candidates[near]).sum(axis=1) / weights.sum(axis=1, keepdims=True)
    s1 = refined @ query
    expanded = refined[np.argsort(-s1, kind="stable")[: k + 1]].max(axis=0)
    compared = refined if s2 == "refined" else candidates
    return (s1 + compared @ expanded) / 2


def unit(x: np.ndarray) -> np.ndarray:
    """Returns the vector at length 1; a zero vector stays zero."""
    length = np.sqrt((x * x).sum())
    return x / length if length > 0 else x


def query_expansion(query: np.ndarray, candidates: np.ndarray, n: int, alpha: float) -> np.ndarray:
    """Returns the query expanded by the first n candidates (alpha-QE; AQE if alpha = 0). (D,), (M, D) -> (D,)."""
    total = query.copy()
    for x in candidates[:n]:
        total += max(query @ x, 0.0) ** alpha * x
    return unit(total)


def query_expansion_scores(query: np.ndarray, candidates: np.ndarray, n: int, alpha: float) -> np.ndarray:
    """Returns the similarities of the candidates to the expanded query. (D,), (M, D) -> (M,)."""
    return candidates @ query_expansion(query, candidates, n, alpha)


def database_augmentation(rows: np.ndarray, k: int, alpha: float | None = None) -> np.ndarray:
    """Returns the rows after DBA, weighted sums of each row and its k - 1 nearest others. float64 (N, D) -> (N, D)."""
    augmented = []
    for number, (row, ranking) in enumerate(zip(rows, full_ranking(rows, rows), strict=True)):
        near = [number, *(other for other in ranking if other != number)][:k]
        total = np.zeros(rows.shape[1])
        for r, other in enumerate(near):
            weight = (k - r) / k if alpha is None else max(row @ rows[other], 0.0) ** alpha
            total += weight * rows[other]
        augmented.append(unit(total) if row.any() else row)
    return np.array(augmented)


def nearest_others(gram: np.ndarray) -> list[list[int]]:
    """Returns for each node all others, most similar first, equally similar ones by number."""
    return [sorted(set(range(len(gram))) - {i}, key=lambda j, i=i: (-gram[i, j], j)) for i in range(len(gram))]


def k_reciprocal_scores(query: np.ndarray, candidates: np.ndarray, k1: int, k2: int, lambda_value: float) -> np.ndarray:
    """Returns -((1 - lambda) Jaccard distance + lambda (1 - q . x)) of the candidates. (D,), (M, D) -> (M,)."""
    nodes = np.vstack([query, candidates])
    gram = nodes @ nodes.T
    others = nearest_others(gram)
    n = len(nodes)

    def reciprocal(k: int) -> list[set[int]]:
        near = [{i, *others[i][:k]} for i in range(n)]
        return [{j for j in near[i] if i in near[j]} for i in range(n)]

    whole, half = reciprocal(k1), reciprocal(round(k1 / 2))
    encodings = np.zeros((n, n))
    for i in range(n):
        members = set(whole[i])
        for j in whole[i]:
            if 3 * len(half[j] & whole[i]) >= 2 * len(half[j]):
                members |= half[j]
        for j in members:
            encodings[i, j] = np.exp(-(1 - gram[i, j]))
    encodings = np.array([np.mean(encodings[[i, *others[i][: k2 - 1]]], axis=0) for i in range(n)])
    scores = []
    for i in range(1, n):
        jaccard = 1 - np.minimum(encodings[0], encodings[i]).sum() / np.maximum(encodings[0], encodings[i]).sum()
        scores.append(-((1 - lambda_value) * jaccard + lambda_value * (1 - gram[0, i])))
    return np.array(scores)


def diffusion_scores(
    query: np.ndarray, candidates: np.ndarray, k: int, kq: int, gamma: float, alpha: float
) -> np.ndarray:
    """Solves (I - alpha D^(-1/2) A D^(-1/2)) f = y on the graph of the candidates. (D,), (M, D) -> (M,)."""
    m = len(candidates)
    gram = candidates @ candidates.T
    near = [set(others[:k]) for others in nearest_others(gram)]
    affinities = np.zeros((m, m))
    for i in range(m):
        for j in near[i]:
            if i in near[j]:
                affinities[i, j] = max(gram[i, j], 0.0) ** gamma
    degrees = affinities.sum(axis=1)
    scale = np.diag([1 / np.sqrt(degree) if degree > 0 else 0.0 for degree in degrees])
    y = np.array([max(query @ x, 0.0) ** gamma if place < kq else 0.0 for place, x in enumerate(candidates)])
    return np.linalg.solve(np.eye(m) - alpha * scale @ affinities @ scale, y)


def mean_average_precision(rankings: np.ndarray, ground_truth: list[dict], positive: tuple, ignored: tuple) -> float:
    """Evaluates the revisited protocol, walking down each ranking. rankings (Q, N) -> mAP in percent."""
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
    """Returns GLDv2's mAP@100 in percent, prediction by prediction. A query without predictions counts 0."""
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
    """Returns the percentage of queries with a positive among the first k images that are not ignored."""
    values = []
    for ranking, good, out in zip(rankings, positives, ignored, strict=True):
        if good:
            kept = [number for number in ranking if number not in out]
            values.append(any(number in good for number in kept[:k]))
    return 100 * float(np.mean(values))


def discriminative_projection(rows: np.ndarray, labels: np.ndarray, dim: int, balanced: bool) -> np.ndarray:
    """Returns eig(C_S^-1/2 C_D C_S^-1/2)^T C_S^-1/2 from explicit pairs. (N, D), (N,) -> (dim, D), up to a factor.

    In the paper, C_S sums d d^T over matching pairs, C_D over those that do not match. If balanced, a matching
    pair of a class of n has the weight 1/n, and C_D sums over all pairs.
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
