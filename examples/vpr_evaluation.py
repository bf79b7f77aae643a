"""A model, and an index that reranks, for VPR-methods-evaluation (visual place recognition).

pip install . torchvision faiss-cpu
python examples/vpr_evaluation.py

In a clone of VPR-methods-evaluation, get_model is a branch of vpr_models/__init__.py, and RerankedIndex replaces
faiss.IndexFlatL2 in main.py. That program is not a package: main() below is a stand-in with the steps of its main.py,
on drawn places with their coordinates in the file names. The weights are random: the recalls say nothing of the method.
"""

import faiss
import numpy as np
import torch
from superglobal import SuperGlobalReranker, attach
from torchvision.models import resnet18


def get_model() -> torch.nn.Module:
    """Returns a model of normalised images: (N, 3, H, W) -> (N, 512), unit descriptors."""
    return attach(resnet18(weights=None).eval(), relup="layer1", relup_ends=("layer2", "layer3"))


class RerankedIndex:
    """Takes the place of faiss.IndexFlatL2: distances and predictions come from the reranked results."""

    def __init__(self, dim: int):
        self.index, self.reranker = faiss.IndexFlatIP(dim), SuperGlobalReranker(m=400)

    def add(self, rows: np.ndarray) -> None:
        self.index.add(rows)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, ids = self.index.search(queries, max(k, self.reranker.m))
        found = self.reranker.rerank(queries, ids, self.index.reconstruct_batch, scores=scores)
        return -found.scores[:, :k], found.ids[:, :k]


def main(values: tuple[int, ...] = (1, 5, 10)) -> None:
    torch.manual_seed(0)
    places = torch.randn(20, 3, 12, 16)
    paths = [f"@{100 * place}@{5 * view}@.jpg" for place in range(20) for view in range(6)]  # @UTM_east@UTM_north@
    views = places.repeat_interleave(6, dim=0) + 1.2 * torch.randn(120, 3, 12, 16)
    images = torch.nn.functional.interpolate(views, size=(96, 128), mode="bilinear")
    with torch.inference_mode():
        rows = get_model()(images).numpy()
    utm = np.array([path.split("@")[1:3] for path in paths], dtype=float)
    queries = np.arange(0, 120, 6)
    database = np.setdiff1d(np.arange(120), queries)
    positives = np.linalg.norm(utm[queries, None] - utm[database], axis=2) <= 25
    for title, index in (("IndexFlatL2", faiss.IndexFlatL2(512)), ("RerankedIndex", RerankedIndex(512))):
        index.add(rows[database])
        _, predictions = index.search(rows[queries], max(values))
        hits = np.take_along_axis(positives, predictions, axis=1)
        print(f"{title}: " + ", ".join(f"R@{k}: {100 * hits[:, :k].any(axis=1).mean():.1f}" for k in values))


if __name__ == "__main__":
    main()
