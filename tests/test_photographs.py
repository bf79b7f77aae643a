import numpy as np
from conftest import ROOT

from revisitop.layouts import load_dataset

FEW = {"camera.png": (1, 1), "chelsea.png": (1, 1), "coffee.png": (1, 2), "motorcycle_left.png": (1, 1)}
FEW |= {"china.jpg": (1, 1), "flower.jpg": (1, 1)}


def test_the_trained_network_finds_the_views_of_a_photograph(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import photographs

    photographs.draw_dataset(tmp_path, 0, FEW, views=6, side=96)
    dataset = load_dataset("photographs_0", tmp_path)
    difference = {"easy": 0.0, "hard": 0.0}
    for query, truth in zip(dataset.queries, dataset.ground_truth, strict=True):
        for kind in difference:
            views = [dataset.database[number].read().astype(float) for number in truth.kinds[kind]]
            difference[kind] += sum(np.abs(view - query.read()).mean() for view in views)
    assert difference["hard"] > 1.2 * difference["easy"]
    (found,) = photographs.evaluate(tmp_path, ["photographs_0"], photographs.SETTINGS["+ ReLU+"])
    assert found["retrieval"]["M"]["mAP"] > 70
