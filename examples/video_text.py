"""Search key frames of videos by text in the common space of CLIP or SigLIP, and rerank them, given only the vectors.

pip install .
python examples/video_text.py

With a real model, for example from open_clip, the vectors are:

    texts = model.encode_text(tokenizer(["a red bridge", "a church at night"]))
    frames = torch.cat([model.encode_image(batch) for batch in loader])  # a key frame per shot

Here they are drawn: 50 subjects, each in 5 videos of 4 key frames, and a text for each subject; as in CLIP's space,
texts lie apart from images. The results are for synthetic data and say nothing about a real model.
"""

import numpy as np
from superglobal import SuperGlobalReranker, search

SUBJECTS, VIDEOS, FRAMES, D = 50, 5, 4, 64
RELEVANT = VIDEOS * FRAMES  # frames of a subject, with successive numbers


def main() -> None:
    texts, frames = draw_vectors()
    found = search(texts, frames, m=400)
    reranked = SuperGlobalReranker(m=400).rerank(texts, found.ids, frames.__getitem__, scores=found.scores)
    for title, ids in (("search", found.ids), ("reranked", reranked.ids)):
        videos = np.mean(
            [np.isin(best_videos(row), query * VIDEOS + np.arange(VIDEOS)) for query, row in enumerate(ids)]
        )
        print(
            f"{title}: mAP of frames {100 * average_precision(ids):.1f}, {videos:.0%} of the first 5 videos are right"
        )


def draw_vectors() -> tuple[np.ndarray, np.ndarray]:
    """Draws unit vectors of texts (SUBJECTS, D) and of frames (SUBJECTS * RELEVANT, D), float32."""
    rng = np.random.default_rng(0)
    subjects, gap = rng.standard_normal((SUBJECTS, 1, 1, D)), 2 * rng.standard_normal(D)
    videos = subjects + rng.standard_normal((SUBJECTS, VIDEOS, 1, D))
    frames = videos + rng.standard_normal((SUBJECTS, VIDEOS, FRAMES, D)) + gap
    texts = subjects[:, 0, 0] + 1.5 * rng.standard_normal((SUBJECTS, D)) - gap
    pair = texts, frames.reshape(-1, D)
    return tuple((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32) for rows in pair)


def best_videos(frames: np.ndarray) -> list[int]:
    """Returns the first VIDEOS videos in the order of their best frames."""
    return [*dict.fromkeys((frames // FRAMES).tolist())][:VIDEOS]


def average_precision(ids: np.ndarray) -> float:
    right = ids // RELEVANT == np.arange(SUBJECTS)[:, None]
    return float((right.cumsum(axis=1) / np.arange(1, ids.shape[1] + 1) * right).sum(axis=1).mean() / RELEVANT)


if __name__ == "__main__":
    main()
