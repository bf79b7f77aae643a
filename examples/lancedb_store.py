"""Search with LanceDB, a vector database in a folder, and rerank the results with the vectors that it returns.

pip install . lancedb
python examples/lancedb_store.py

The descriptors are drawn; in an application they come from attach.
"""

import tempfile

import lancedb
import numpy as np
from superglobal import SuperGlobalReranker

LANDMARKS, VIEWS, D, M = 40, 15, 64, 400


def main() -> None:
    rng = np.random.default_rng(0)
    views = rng.standard_normal((LANDMARKS, 1, D)) + 1.5 * rng.standard_normal((LANDMARKS, VIEWS + 1, D))
    views = (views / np.linalg.norm(views, axis=2, keepdims=True)).astype(np.float32)
    query, rows = views[7, 0], views[:, 1:].reshape(-1, D)

    with tempfile.TemporaryDirectory() as folder:
        data = [{"landmark": i // VIEWS, "vector": row} for i, row in enumerate(rows)]
        table = lancedb.connect(folder).create_table("images", data)
        hits = table.search(query).distance_type("cosine").limit(M).to_list()
    candidates = np.array([hit["vector"] for hit in hits], dtype=np.float32)
    order = SuperGlobalReranker(m=M)(query[None], candidates[None]).order[0]

    for title, found in (("hits", hits), ("reranked", [hits[place] for place in order])):
        landmarks = [hit["landmark"] for hit in found[:VIEWS]]
        print(f"{title}: {landmarks.count(7)} of the first {VIEWS} are right: {landmarks}")


if __name__ == "__main__":
    main()
