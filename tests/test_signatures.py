"""Mistakes that are made on purpose are named; benchmarks/signatures.py makes and measures all of them."""

import numpy as np
import pytest
import torch
from conftest import ROOT

from model.recipe import Recipe
from revisitop import toy
from revisitop.layouts import load_dataset
from tools.causes import causes

pytestmark = pytest.mark.slow  # toy's first run, and some more of its images


@pytest.fixture
def base(monkeypatch, toy_data, toy_run):
    """The module, toy, its recipe at one scale, and the descriptors of a run."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import signatures as benchmark

    dataset = load_dataset("toy", toy_data)
    recipe = Recipe(weights=toy.ensure_weights(toy_data / "toy", 50), scales=(1.0,))
    vectors = [*np.load(toy_run[0] / "toy_query.npy"), *np.load(toy_run[0] / "toy_db.npy")]
    keys = ((((str(recipe.settings()), False), image)) for image in dataset.images())
    return benchmark, dataset, recipe, dict(zip(keys, map(torch.from_numpy, vectors), strict=True))


@pytest.mark.parametrize("name", ["S2", "EXIF"])
def test_a_mistake_that_is_made_is_named(base, tmp_path, name):
    benchmark, dataset, recipe, rows = base
    mistake = benchmark.MISTAKES[name]
    correct = benchmark.maps(dataset, recipe, benchmark.Mistake(), rows)
    found = benchmark.maps(mistake.data(dataset, tmp_path), recipe, mistake, rows)
    pattern = {key: value - correct[key] for key, value in found.items()}
    assert name in causes([("toy", pattern)])[:2]
