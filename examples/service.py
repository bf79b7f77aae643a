"""A service: put, search, rerank and delete images. FAISS keeps the descriptors in a file: a restart loses nothing.

pip install . torchvision fastapi uvicorn faiss-cpu
uvicorn --factory --app-dir examples service:application
curl -X PUT --data-binary @tower.jpg localhost:8000/images/17; curl -X DELETE localhost:8000/images/17
curl -X POST --data-binary @query.jpg "localhost:8000/search?top=10&rerank=true"
"""

import io
import os

import faiss
import numpy as np
import torch
import torchvision
from fastapi import FastAPI, HTTPException, Path, Request
from PIL import Image
from superglobal import SuperGlobalReranker, attach
from torchvision.transforms.functional import normalize, to_tensor


def application(path: str = "images.faiss") -> FastAPI:
    torch.manual_seed(0)  # this network has random weights, which must be the same after a restart; take yours
    app, extract = FastAPI(), attach(torchvision.models.resnet18().eval().requires_grad_(False))
    index = faiss.read_index(path) if os.path.exists(path) else faiss.IndexIDMap2(faiss.IndexFlatIP(512))

    async def descriptor(request: Request) -> np.ndarray:
        try:
            image = to_tensor(Image.open(io.BytesIO(await request.body())).convert("RGB"))
        except Exception as error:  # decoders raise any exception
            raise HTTPException(400, f"the body is no image: {error}") from None
        return extract(normalize(image, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))[None]).numpy()

    def change(number: int, rows: np.ndarray) -> int:  # writes the whole file; only one change runs at a time
        removed = index.remove_ids(np.array([number]))
        index.add_with_ids(rows, np.full(len(rows), number))
        faiss.write_index(index, f"{path}.new")
        os.replace(f"{path}.new", path)
        return removed

    @app.put("/images/{number}")
    async def put(request: Request, number: int = Path(ge=0, lt=1 << 63)) -> dict:
        return {"replaced": change(number, await descriptor(request))}

    @app.delete("/images/{number}")
    async def delete(number: int = Path(ge=0, lt=1 << 63)) -> dict:
        return {"deleted": change(number, np.empty((0, index.d), np.float32))}

    @app.post("/search")
    async def search(request: Request, top: int = 10, rerank: bool = True) -> list[dict]:
        query = await descriptor(request)
        scores, ids = index.search(query, 400)
        if rerank and index.ntotal:
            ids, scores, _ = SuperGlobalReranker().rerank(query, ids, index.reconstruct_batch, scores=scores)
        found = zip(ids[0, :top].tolist(), scores[0, :top].tolist(), strict=True)
        return [{"id": number, "score": score} for number, score in found if number >= 0]

    return app
