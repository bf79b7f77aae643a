from dataclasses import replace

import numpy as np
import pytest
import torch

from extraction.extract import extract_batch
from model.errors import InputError
from model.recipe import Recipe
from modules import GeMPlus, RegionalGeM, ScaleGeM
from modules.descriptor import SCALE_SETS
from modules.whitening import Whitening
from tools.whiten import save_whitening

MODULES = {"relup": "relup_threshold", "gemp": "gemp_p", "rgem": "rgem_p", "sgem": "sgem_p"}
WITHOUT = {f"no_{name}": {setting: None} for name, setting in MODULES.items()}
CONFIGS = {"all": {}, "none": dict.fromkeys(MODULES.values()), **WITHOUT}
OTHERS = [("all", 1), ("all", 5), *((name, 3) for name in WITHOUT)]
SMALL = """
from pathlib import Path
from torch import nn

def build():
    with (Path(__file__).parent / "calls").open("a") as calls:
        calls.write("x")
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.{activation}())
"""


@pytest.fixture
def small(tmp_path):
    """The recipe of a small network in a user's file, with a scale, and a maker of others."""

    def recipe(activation: str = "ReLU", **settings) -> Recipe:
        (tmp_path / "mine.py").write_text(SMALL.format(activation=activation))
        return Recipe(f"{tmp_path / 'mine.py'}:build", **{"scales": (1.0,), **settings})

    return recipe


def descriptor(recipe: Recipe, pixels: np.ndarray) -> torch.Tensor:
    return extract_batch(recipe.extractor(), [torch.from_numpy(pixels)])[0]


@pytest.mark.parametrize(
    ("config", "scales"),
    [("all", 3), ("none", 3), *(pytest.param(name, scales, marks=pytest.mark.slow) for name, scales in OTHERS)],
)
def test_descriptors_are_the_papers(reference, checkpoint_50, config, scales):
    recipe = Recipe(weights=checkpoint_50, scales=SCALE_SETS[scales], **CONFIGS[config])
    for i in (0, 1):
        found = descriptor(recipe, reference[f"image_{i}"]).numpy()
        np.testing.assert_allclose(found, reference[f"descriptor_{config}_{scales}_image_{i}"], atol=2e-6, rtol=0)


def test_depth_101_loads_and_extracts(checkpoint_101, reference):
    recipe = Recipe(weights=checkpoint_101, depth=101)
    found = descriptor(recipe, reference["image_1"][:64, :64])
    assert len(found) == recipe.dim == 2048
    assert found.norm() == pytest.approx(1, abs=1e-6)


def test_a_descriptor_does_not_depend_on_its_batch(checkpoint_50, reference):
    extractor = Recipe(weights=checkpoint_50).extractor()
    images = [torch.from_numpy(reference["image_0"][:100, i * 40 : i * 40 + 120].copy()) for i in range(3)]
    together, alone = extract_batch(extractor, images), [extract_batch(extractor, [image])[0] for image in images]
    torch.testing.assert_close(together, torch.stack(alone), atol=2e-6, rtol=0)


@pytest.mark.slow  # five scales of an image of 2,000 pixels
@pytest.mark.parametrize("config", ["all", "none"])
def test_images_of_any_size_have_a_finite_unit_descriptor(checkpoint_50, config):
    recipe = Recipe(weights=checkpoint_50, scales=SCALE_SETS[5], **CONFIGS[config])
    for size in ((1, 1), (1, 500), (33, 2000)):
        pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        assert descriptor(recipe, pixels).norm() == pytest.approx(1, abs=1e-5)


def test_the_modules_are_the_papers_by_default():
    modules = Recipe("torchvision:resnet18", "untrained").descriptor
    assert [type(each) for each in (modules.pooling, modules.rgem, modules.sgem)] == [GeMPlus, RegionalGeM, ScaleGeM]
    assert sorted({change.layer.split(".")[0] for change in modules.changes}) == ["layer1", "layer2", "layer3"]


def test_detaching_the_descriptor_restores_the_network(small):
    recipe, pixels = small(relup_stages=("1",)), torch.rand(2, 3, 40, 40)
    network = recipe.backbone.network
    plain = network(pixels)
    descriptor = recipe.descriptor
    assert not torch.equal(network(pixels), plain)
    descriptor.detach()
    assert torch.equal(network(pixels), plain)


def test_a_users_function_runs_once_for_a_recipe_and_its_weights_are_not_called_pretrained(small, tmp_path):
    recipe = small()
    recipe.check()
    recipe.extractor()
    assert recipe.provenance()["network"] == "mine.py:build"
    assert "pretrained" not in recipe.weights_in_words
    assert "pretrained" in Recipe("timm:resnet18", "pretrained").weights_in_words
    assert (tmp_path / "calls").read_text() == "x"


def test_a_users_file_may_import_another_beside_it(tmp_path):
    (tmp_path / "layers_of_mine.py").write_text("import torch\n\nLAYER = torch.nn.Conv2d(3, 4, 8, 8)\n")
    (tmp_path / "net.py").write_text("from layers_of_mine import LAYER\n\n\ndef build():\n    return LAYER\n")
    assert Recipe(f"{tmp_path / 'net.py'}:build", pooling="average", gemp_p=None, rgem_p=None).dim == 4


def test_relu_plus_that_changes_no_layer_is_not_recorded(small):
    for recipe in (small("GELU"), small(), small(relup_stages=("1",), relup_threshold=None)):
        assert recipe.provenance()["relup_threshold"] is None
        assert ("ReLU+" in recipe.idle_modules) == (recipe.relup_threshold is not None)
        assert not any("layers" in line for line in recipe.in_words())
    recipe = small(relup_stages=("1",))
    assert recipe.provenance()["relup_threshold"] == 0.014
    assert "ReLU+ (0.014) in 1 layers: 1" in recipe.in_words()


@pytest.mark.parametrize("network", ["cvnet", "small"])
def test_every_setting_that_changes_a_descriptor_is_recorded(small, checkpoint_50, network):
    recipe = Recipe(weights=checkpoint_50)
    if network == "small":
        recipe = small(relup_stages=("1",), scales=(1.0, 0.7))
    changes = {"scales": (1.0, 0.5), "relup_threshold": 0.3, "pooling": "average", "gemp_p": None, "rgem_p": 3.0}
    changes |= {"rgem_window": 3, "sgem_p": 2.0, "precision": "bf16", "max_side": 100}
    changes |= {"relup_stages": ()} if network == "small" else {"relup_stages": ("s2",)}
    provenances = [
        recipe.provenance(),
        *(replace(recipe, **{name: value}).provenance() for name, value in changes.items()),
    ]
    assert len({str(each) for each in provenances}) == 1 + len(changes)


def test_a_whitening_of_another_network_is_refused(small, reference, tmp_path):
    recipe, path = small(), tmp_path / "whitening.pth"
    whitening = Whitening(torch.zeros(8), torch.eye(8)[:3])
    expected = whitening(descriptor(recipe, reference["image_1"])[None])[0]

    save_whitening(path, whitening, {"descriptors": recipe.provenance()})
    recipe = replace(recipe, whitening=path)
    torch.testing.assert_close(descriptor(recipe, reference["image_1"]), expected)
    assert recipe.dim == recipe.provenance()["dim"] == 3

    save_whitening(path, whitening, {"descriptors": {**recipe.provenance(), "weights_sha256": "other"}})
    with pytest.raises(InputError, match="another network"):
        replace(recipe).check()
    save_whitening(path, Whitening(torch.zeros(7), torch.eye(7)), {})
    with pytest.raises(InputError, match="7 dimensions"):
        replace(recipe).check()


@pytest.mark.parametrize("network", ["cvnet", "small"])
@pytest.mark.parametrize("settings", [{"precision": "fp8"}, {"pooling": "mean"}, {"scales": ()}, {"gemp_p": -1.0}])
def test_unknown_settings_are_refused(small, checkpoint_50, network, settings):
    recipe = small(**settings) if network == "small" else Recipe(weights=checkpoint_50, **settings)
    with pytest.raises(InputError):
        recipe.check()


def test_the_power_of_gem_is_not_recorded_for_another_pooling(small):
    assert small(pooling="average", gemp_p=3.0).provenance() == small(pooling="average", gemp_p=4.6).provenance()


@pytest.mark.slow  # builds networks of timm and torchvision
@pytest.mark.parametrize("name", ["cvnet", "timm:resnet18", "torchvision:convnext_tiny", "FILE"])
def test_what_applies_to_any_network_is_in_words(name, small, checkpoint_50):
    others = {"cvnet": Recipe(weights=checkpoint_50), "FILE": small(relup_stages=("1",), scales=(1.0,))}
    recipe = others.get(name) or Recipe(name, "untrained", pooling="average", rgem_p=None)
    words = "\n".join(recipe.in_words())
    assert recipe.weights_sha256 in words
    assert (f"in {len(recipe.descriptor.changes)} layers" in words) == bool(recipe.descriptor.changes)
    assert ("Regional" in words, "GeMPlus" in words) == (recipe.rgem_p is not None, recipe.pooling == "gem")
    assert f"normalisation: {recipe.backbone.channels}, mean {recipe.backbone.mean[0]:g}" in words
    assert ("no file: all" in words) == (name in ("timm:resnet18", "torchvision:convnext_tiny"))
    idle = {"cvnet": [], "timm:resnet18": ["GeM+"], "torchvision:convnext_tiny": ["GeM+", "ReLU+"]}
    assert recipe.idle_modules == idle.get(name, ["Scale-GeM"])
    assert ("without effect" in words) == bool(recipe.idle_modules)
