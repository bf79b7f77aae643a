"""Search with a FAISS index, and rerank its first 400 results with the vectors in the index.

pip install . faiss-cpu
python examples/faiss_index.py

The descriptors are drawn: 200 landmarks with 100 noisy views each. Prints the mean average precision
before and after reranking; it is for synthetic data and says nothing about real images.
"""

import faiss
import numpy as np
from superglobal import SuperGlobalReranker

LANDMARKS, VIEWS, D, M = 200, 100, 256, 400


def main() -> None:
    rng = np.random.default_rng(0)
    views = rng.standard_normal((LANDMARKS, 1, D)) + 2.2 * rng.standard_normal((LANDMARKS, VIEWS + 1, D))
    views = (views / np.linalg.norm(views, axis=2, keepdims=True)).astype(np.float32)
    queries, rows = np.ascontiguousarray(views[:, 0]), views[:, 1:].reshape(-1, D)

    index = faiss.index_factory(D, "IVF256,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(rows)
    index.add(rows)
    index.nprobe = 8
    index.make_direct_map()  # so that vectors can be reconstructed by id

    _, ids = index.search(queries, M)  # -1 if the visited lists contain fewer than M
    order = SuperGlobalReranker(m=M).rerank(queries, ids, index.reconstruct_batch).order
    reranked = np.take_along_axis(ids, order, axis=1)

    print(f"index of {index.ntotal} vectors, {M} candidates, {(ids < 0).sum()} of them missing")
    print(f"mAP, index:     {100 * mean_average_precision(ids):.1f}")
    print(f"mAP, reranked:  {100 * mean_average_precision(reranked):.1f}")


def mean_average_precision(ids: np.ndarray) -> float:
    """Returns the mAP of the queries; the views of landmark i have the ids from i * VIEWS."""
    right = (ids // VIEWS == np.arange(LANDMARKS)[:, None]) & (ids >= 0)
    precision = right.cumsum(axis=1) / np.arange(1, ids.shape[1] + 1)
    return float((precision * right).sum(axis=1).mean() / VIEWS)


if __name__ == "__main__":
    main()
