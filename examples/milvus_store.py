"""Search with Milvus, a vector database, and rerank the results with the vectors that it stores.

pip install . pymilvus milvus-lite
python examples/milvus_store.py [URI]

Without a URI Milvus Lite runs inside this process, in a file that is deleted at the end; with one
(http://localhost:19530) the same calls go to a server. The descriptors are drawn; in an application they come from
attach. ``python -m tools.search --index milvus:URI`` keeps a folder of images in it.
"""

import sys
import tempfile

import numpy as np
from pymilvus import MilvusClient
from superglobal import SuperGlobalReranker

LANDMARKS, VIEWS, D, M = 40, 15, 64, 400


def main() -> None:
    rng = np.random.default_rng(0)
    views = rng.standard_normal((LANDMARKS, 1, D)) + 1.5 * rng.standard_normal((LANDMARKS, VIEWS + 1, D))
    views = (views / np.linalg.norm(views, axis=2, keepdims=True)).astype(np.float32)
    query, rows = views[7, 0], views[:, 1:].reshape(-1, D)

    with tempfile.TemporaryDirectory() as folder:
        client = MilvusClient(sys.argv[1] if len(sys.argv) > 1 else f"{folder}/images.db")
        if client.has_collection("images"):
            client.drop_collection("images")
        client.create_collection("images", dimension=D, metric_type="COSINE", consistency_level="Strong")
        for start in range(0, len(rows), 200):  # repeating an upsert makes no duplicates
            block = enumerate(rows[start : start + 200], start)
            client.upsert("images", [{"id": i, "vector": row, "landmark": i // VIEWS} for i, row in block])
        (hits,) = client.search("images", data=[query], limit=M, output_fields=["landmark"])
        ids = np.array([[hit["id"] for hit in hits]])

        def fetch(numbers: np.ndarray) -> np.ndarray:
            found = client.get("images", ids=numbers.tolist(), output_fields=["vector"])
            vectors = {row["id"]: row["vector"] for row in found}  # they are returned in another order
            return np.array([vectors[number] for number in numbers.tolist()], dtype=np.float32)

        order = SuperGlobalReranker(m=M).rerank(query[None], ids, fetch).order[0]
        client.close()
    for title, found in (("hits", hits), ("reranked", [hits[place] for place in order])):
        landmarks = [hit["entity"]["landmark"] for hit in found[:VIEWS]]
        print(f"{title}: {landmarks.count(7)} of the first {VIEWS} are right: {landmarks}")


if __name__ == "__main__":
    main()
