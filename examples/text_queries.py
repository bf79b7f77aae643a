"""Search images by text in the common space of CLIP or SigLIP, and rerank the results, given only the vectors.

python examples/text_queries.py

With a real model, for example from open_clip (which the project itself does not need), the vectors are:

    texts = model.encode_text(tokenizer(["a red bridge", "a church at night"]))
    images = torch.cat([model.encode_image(batch) for batch in loader])

Here they are drawn: 50 subjects with 20 images each, and a text for each subject; as in CLIP's space, texts lie apart
from images, and lengths vary. The results are for synthetic data and say nothing about a real model.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

SUBJECTS, IMAGES, D = 50, 20, 64
CHECKOUT = Path(__file__).parents[1]


def main() -> None:
    texts, images = draw_vectors()
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/texts.npy", texts)
        np.save(f"{folder}/images.npy", images)
        for name in ("none", "superglobal"):
            files = ["--queries", f"{folder}/texts.npy", "--database", f"{folder}/images.npy", "--out"]
            command = [sys.executable, "-m", "tools.rerank", *files, f"{folder}/{name}.npy", "--normalize"]
            environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
            subprocess.run([*command, "--reranker", name], check=True, capture_output=True, cwd=folder, env=environment)
            print(f"mAP, {name + ':':<12} {100 * mean_average_precision(np.load(f'{folder}/{name}.npy')):.1f}")


def draw_vectors() -> tuple[np.ndarray, np.ndarray]:
    """Draws vectors of texts (SUBJECTS, D) and images (SUBJECTS * IMAGES, D), float32, of various lengths."""
    rng = np.random.default_rng(0)
    subjects, gap = rng.standard_normal((SUBJECTS, 1, D)), 2 * rng.standard_normal(D)
    images = subjects + 1.5 * rng.standard_normal((SUBJECTS, IMAGES, D)) + gap
    texts = subjects[:, 0] + 1.5 * rng.standard_normal((SUBJECTS, D)) - gap
    return (5 * texts).astype(np.float32), (9 * images).reshape(-1, D).astype(np.float32)


def mean_average_precision(order: np.ndarray) -> float:
    """Returns the mAP of the first 400 results; the images of query i are rows IMAGES * i to IMAGES * (i + 1)."""
    right = order // IMAGES == np.arange(SUBJECTS)[:, None]
    precision = right.cumsum(axis=1) / np.arange(1, order.shape[1] + 1)
    return float((precision * right).sum(axis=1).mean() / IMAGES)


if __name__ == "__main__":
    main()
