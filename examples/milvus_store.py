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
    rows, query = draw_descriptors()
    with tempfile.TemporaryDirectory() as folder:
        client = MilvusClient(sys.argv[1] if len(sys.argv) > 1 else f"{folder}/images.db")
        store(client, rows)

        (hits,) = client.search("images", data=[query], limit=M, output_fields=["landmark"])
        ids = np.array([[hit["id"] for hit in hits]])

        def fetch(wanted: np.ndarray) -> np.ndarray:
            found = client.get("images", ids=wanted.tolist(), output_fields=["vector"])
            vectors = {row["id"]: row["vector"] for row in found}  # they are returned in another order
            return np.array([vectors[number] for number in wanted.tolist()], dtype=np.float32)

        order = SuperGlobalReranker(m=M).rerank(query[None], ids, fetch).order[0]
        client.close()
    for title, found in (("hits", hits), ("reranked", [hits[place] for place in order])):
        landmarks = [hit["entity"]["landmark"] for hit in found[:VIEWS]]
        print(f"{title}: {landmarks.count(7)} of the first {VIEWS} are right: {landmarks}")


def store(client: MilvusClient, rows: np.ndarray) -> None:
    """Puts the rows into a new collection; with upsert, repeating this makes no duplicates."""
    if client.has_collection("images"):
        client.drop_collection("images")
    client.create_collection("images", dimension=D, metric_type="COSINE", consistency_level="Strong")
    for start in range(0, len(rows), 200):
        block = enumerate(rows[start : start + 200], start)
        client.upsert("images", [{"id": i, "vector": row, "landmark": i // VIEWS} for i, row in block])


def draw_descriptors() -> tuple[np.ndarray, np.ndarray]:
    """Draws unit descriptors, (LANDMARKS * VIEWS, D), and a further view of landmark 7."""
    rng = np.random.default_rng(0)
    views = rng.standard_normal((LANDMARKS, 1, D)) + 1.5 * rng.standard_normal((LANDMARKS, VIEWS + 1, D))
    views = (views / np.linalg.norm(views, axis=2, keepdims=True)).astype(np.float32)
    return views[:, 1:].reshape(-1, D), views[7, 0]


if __name__ == "__main__":
    main()
