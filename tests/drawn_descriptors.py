"""A labelled dataset without images: random descriptors of landmarks, for tests that start from saved descriptors."""

import pickle
from pathlib import Path

import numpy as np


def draw_descriptors(data_dir: Path, features: Path, name: str, seed: int, noise: float = 0.22, dim: int = 32) -> dict:
    """Writes gnd_<name>.pkl, <name>_query.npy and <name>_db.npy; returns the ground truth.

    12 landmarks with 10 views each: 4 easy, 4 hard, 2 junk, with increasing noise.
    """
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((12, dim)) + 0.8
    kinds = {"easy": range(4), "hard": range(4, 8), "junk": range(8, 10)}
    strength = noise * np.array([4.0] * 4 + [6.0] * 4 + [8.0] * 2)
    rows = centres[:, None] + strength[:, None] * rng.standard_normal((12, 10, dim))
    queries = centres + 3 * noise * rng.standard_normal(centres.shape)
    order = rng.permutation(120)  # the place of each view in the database
    truth = [
        {"bbx": [0, 0, 9, 9], **{kind: [int(order[10 * i + j]) for j in places] for kind, places in kinds.items()}}
        for i in range(12)
    ]
    database = np.empty((120, dim))
    database[order] = rows.reshape(120, dim)
    features.mkdir(parents=True, exist_ok=True)
    for kind, values in (("query", queries), ("db", database)):
        unit = values / np.linalg.norm(values, axis=1, keepdims=True)
        np.save(features / f"{name}_{kind}.npy", unit.astype(np.float32))
    (data_dir / name).mkdir(parents=True, exist_ok=True)
    content = {"imlist": [f"{name}_{i}" for i in range(120)], "qimlist": [f"{name}_query_{i}" for i in range(12)]}
    content["gnd"] = truth
    (data_dir / name / f"gnd_{name}.pkl").write_bytes(pickle.dumps(content))
    return content
