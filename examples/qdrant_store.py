"""A vector database finds the first hits, SuperGlobal reranks them with the vectors that come with them.

pip install . qdrant-client
python examples/qdrant_store.py

Qdrant, because its client runs inside this process (``:memory:``, or ``path=``) with the calls that
a server takes, and because a hit brings its vector along: reranking asks the database nothing more.
The descriptors are drawn; in an application they come from attach.
"""

import numpy as np
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, PointStruct, VectorParams
from superglobal import SuperGlobalReranker

LANDMARKS, VIEWS, D = 40, 15, 64


def main() -> None:
    rng = np.random.default_rng(0)
    views = rng.standard_normal((LANDMARKS, 1, D)) + 1.5 * rng.standard_normal((LANDMARKS, VIEWS + 1, D))
    views /= np.linalg.norm(views, axis=2, keepdims=True)
    query = views[7, 0]

    client = QdrantClient(":memory:")  # QdrantClient(url="http://localhost:6333") for a server
    client.create_collection("images", VectorParams(size=D, distance=Distance.COSINE))
    client.upsert(
        "images",
        [
            PointStruct(id=i, vector=row.tolist(), payload={"landmark": i // VIEWS})
            for i, row in enumerate(views[:, 1:].reshape(-1, D))
        ],
    )

    hits = client.query_points("images", query=query.tolist(), limit=400, with_vectors=True).points
    candidates = np.array([hit.vector for hit in hits])
    order = SuperGlobalReranker(m=400).forward(query[None], candidates[None]).order[0]
    reranked = [hits[place] for place in order]

    for title, found in (("hits", hits), ("reranked", reranked)):
        landmarks = [hit.payload["landmark"] for hit in found[:VIEWS]]
        print(f"{title}: {landmarks.count(7)} of the first {VIEWS} are right: {landmarks}")


if __name__ == "__main__":
    main()
