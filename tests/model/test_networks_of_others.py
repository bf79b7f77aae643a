"""Networks of PyTorch Hub and networks that return descriptors, and checkpoints as others save them."""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NETWORK
from safetensors.torch import save_file
from torch.nn.functional import normalize

from assembly import find_recipe, log_recipe
from config import make_config, pair_options
from extraction.extract import extract_batch
from model.backbone import IMAGENET_MEAN, IMAGENET_STD
from model.errors import InputError
from model.libraries import build_backbone
from model.recipe import Recipe

HUBCONF = """
import torch
from helper import Descriptor

dependencies = ["torch"]

def place(dim=8, scale=1.0, name="small"):
    torch.manual_seed(dim)
    return Descriptor(dim)

def two():
    class Two(Descriptor):
        def forward(self, x):
            return super().forward(x), x
    return Two(8)

def fixed():
    class Fixed(Descriptor):
        def forward(self, x):
            assert x.shape[2:] == (32, 48), f"images must be 32 x 48, got {tuple(x.shape[2:])}"
            return super().forward(x)
    return Fixed(8)

def patches():
    class Patches(Descriptor):
        def forward(self, x):
            assert x.shape[2] % 14 == x.shape[3] % 14 == 0, "sides must be multiples of 14"
            return super().forward(x)
    return Patches(8)

def sized():
    return {"network": Descriptor(8).backbone, "size": (32, 48)}

def tokens():
    return {"network": Descriptor(8).backbone, "tokens": True}

def nothing():
    return 5

def fails():
    raise KeyError("weights")
"""
HELPER = """
import torch

class Descriptor(torch.nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.backbone = torch.nn.Conv2d(3, 6, 3)
        self.head = torch.nn.Linear(6, dim)

    def forward(self, x):
        return self.head(self.backbone(x).mean((2, 3)))
"""
WHOLE = {"pooling": "none", "rgem_p": None, "scales": (1.0,)}


@pytest.fixture
def clone(tmp_path) -> Path:
    """A clone of a repository of PyTorch Hub, whose network returns descriptors."""
    folder = tmp_path / "place-net"
    folder.mkdir()
    (folder / "hubconf.py").write_text(HUBCONF)
    (folder / "helper.py").write_text(HELPER)
    return folder


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


@torch.inference_mode()
def test_a_network_of_the_hub_that_returns_descriptors_is_used_as_it_is(clone, pixels):
    recipe = Recipe(f"hub:{clone}:place:dim=5,scale=2.0,name=large", **WHOLE, mean=(0.5,) * 3, std=(0.25,) * 3)
    network = recipe.backbone.network
    expected = normalize(network((pixels.permute(2, 0, 1)[None] / 255 - 0.5) / 0.25))
    torch.testing.assert_close(extract_batch(recipe.extractor(), [pixels]), expected, atol=1e-6, rtol=0)
    assert recipe.dim == 5
    assert recipe.provenance()["network"] == "hub:place-net:place:dim=5,scale=2.0,name=large"
    assert Recipe(f"hub:{clone}:place", **WHOLE).provenance()["mean"] != recipe.provenance()["mean"]


@torch.inference_mode()
def test_a_network_that_is_used_as_it_is_has_no_relup_by_default(pixels):
    import torchvision

    recipe = Recipe("torchvision:resnet18", "untrained", **WHOLE)
    network = torchvision.models.resnet18().eval()
    network.load_state_dict(recipe.backbone.network.state_dict())
    mean, std = (torch.tensor(each)[:, None, None] for each in (IMAGENET_MEAN, IMAGENET_STD))
    expected = normalize(network((pixels.permute(2, 0, 1)[None] / 255 - mean) / std))
    torch.testing.assert_close(extract_batch(recipe.extractor(), [pixels]), expected, atol=1e-6, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize(("entry", "settings"), [("fixed", {"size": (32, 48)}), ("patches", {"multiple": 14})])
def test_images_get_the_size_that_a_network_needs(clone, pixels, entry, settings):
    recipe = Recipe(f"hub:{clone}:{entry}", **WHOLE, **settings)
    assert extract_batch(recipe.extractor(), [pixels]).shape == (1, 8)
    with pytest.raises(InputError, match="size"):
        Recipe(f"hub:{clone}:{entry}", **WHOLE).check()


@pytest.mark.parametrize(
    ("name", "settings", "noun"),
    [
        ("CLONE:two", {}, "tuple"),
        ("CLONE:nothing", {}, "int"),
        ("CLONE:fails", {}, "KeyError"),
        ("CLONE:plaice", {}, "plaice"),
        ("CLONE:place:size=3", {}, "size"),
        ("CLONE:place", {"rgem_p": 2.5}, "Regional-GeM"),
        ("CLONE:place", {"pooling": "gem"}, "feature map"),
        ("CLONE", {}, "ENTRY"),
        ("CLONE:main:place", {}, "branch"),
        ("nowhere:place", {}, "OWNER/REPO"),
    ],
)
def test_networks_that_do_not_fit_are_refused(clone, name, settings, noun):
    with pytest.raises(InputError, match=noun):
        Recipe(f"hub:{name.replace('CLONE', str(clone))}", **{**WHOLE, **settings}).check()


def test_repositories_may_have_modules_with_the_names_of_ours_and_of_each_other(clone, tmp_path):
    ours = {
        name: module for name, module in sys.modules.items() if name.split(".")[0] in ("model", "modules", "config")
    }
    for dim in (3, 4):
        folder = shutil.copytree(clone, tmp_path / str(dim))
        for name in ("model", "modules"):
            (folder / name).mkdir()
            (folder / name / "__init__.py").touch()
        (folder / "model/net.py").write_text("from helper import Descriptor\nfrom modules.size import SIZE\n")
        (folder / "modules/size.py").write_text("from config import SIZE\n")
        (folder / "config.py").write_text(f"SIZE = {dim}\n")
        (folder / "hubconf.py").write_text("from model.net import *\ndef place(): return Descriptor(SIZE)\n")
        assert Recipe(f"hub:{folder}:place", **WHOLE).dim == dim
    assert {name: sys.modules[name] for name in ours} == ours


@pytest.mark.parametrize("entry", ["place", "sized", "tokens"])
def test_options_that_suit_a_network_are_named_and_work(clone, entry):
    words = ["MODEL.NAME", f"hub:{clone}:{entry}"]
    with pytest.raises(InputError, match="needs ") as raised:
        find_recipe(make_config([*pair_options(words)]))
    advice = str(raised.value).partition("needs ")[2].partition(": ")[0]
    find_recipe(make_config([*pair_options([*words, *advice.split()])]))


def test_the_log_names_where_relup_can_go(tmp_path, caplog):
    (tmp_path / "mine.py").write_text(NETWORK)
    words = ["MODEL.NAME", f"{tmp_path}/mine.py:build", "TEST.SCALE_LIST", "1"]
    with caplog.at_level("INFO"):
        log_recipe(find_recipe(make_config([*pair_options(words)])))
    advice = caplog.messages[-1].rpartition("add ")[2].split()
    assert find_recipe(make_config([*pair_options([*words, *advice])])).descriptor.changes


def test_the_requirements_of_cvnet_are_its_own(checkpoint_50):
    for settings in ({"mean": (0.5,) * 3}, {"size": (224, 224)}):
        with pytest.raises(InputError, match="CVNet"):
            Recipe("cvnet", checkpoint_50, **settings).check()
    with pytest.raises(InputError, match="feature map"):
        Recipe("cvnet", checkpoint_50, pooling="none", rgem_p=None).check()


# ---- checkpoints ----


STATE = {"0.weight": torch.rand(16, 3, 5, 5), "0.bias": torch.rand(16)}


@pytest.fixture
def loaded(tmp_path):
    """Loads a file into a network with the layers of STATE; returns its first parameter."""
    (tmp_path / "mine.py").write_text(NETWORK)
    return lambda path: build_backbone(f"{tmp_path / 'mine.py'}:build", path).network[0].weight


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "model.", "backbone.", "encoder_q.", "module._orig_mod.", "model.backbone."]
)
def test_prefixes_of_what_wrapped_a_network_are_removed(tmp_path, loaded, prefix, suffix):
    state = {f"{prefix}{key}": value for key, value in STATE.items()}
    if prefix:  # another network in the same file
        state["teacher.conv1.weight"] = torch.zeros(3)
    path = tmp_path / f"trained{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert torch.equal(loaded(path), STATE["0.weight"])


def test_what_the_descriptor_uses_must_come_from_the_file(tmp_path, clone):
    name, path = f"hub:{clone}:place", tmp_path / "trained.pth"
    state = build_backbone(name, "pretrained").network.state_dict()
    for change in ({"head.weight": torch.zeros(7, 6)}, {"head.weight": None}, {"backbone.bias": None}):
        changed = {key: value for key, value in (state | change).items() if value is not None}
        torch.save(changed, path)
        with pytest.raises(InputError, match=next(iter(change))):
            build_backbone(name, path, whole=True)
    torch.save({f"module.{key}": value for key, value in state.items()} | {"module.fc.weight": torch.zeros(3)}, path)
    assert build_backbone(name, path, whole=True).network.head.weight.shape == (8, 6)


@pytest.mark.slow  # starts the command
def test_an_object_in_a_checkpoint_is_named_with_the_command_that_converts_the_file(tmp_path, loaded):
    path = tmp_path / "it's trained.pth"
    torch.save({"state_dict": STATE, "args": argparse.Namespace(lr=0.1)}, path)
    with pytest.raises(InputError, match=r"argparse\.Namespace") as raised:
        loaded(path)
    assert "\n" not in str(raised.value)
    command = str(raised.value).partition("convert it: python")[2]
    subprocess.run(f"{sys.executable}{command}", shell=True, check=True)
    assert torch.equal(loaded(path.with_suffix(".tensors.pth")), STATE["0.weight"])


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state", "model_state_dict", "model"])
def test_wrappers_of_tensors_are_removed_and_others_are_named(tmp_path, loaded, wrapper):
    path = tmp_path / "trained.pth"
    torch.save({wrapper: STATE, "epoch": 3, "args": {"lr": 0.1}, "optimizer": {"state": {}}}, path)
    assert torch.equal(loaded(path), STATE["0.weight"])
    torch.save({f"my_{wrapper}": STATE, "epoch": 3}, path)
    with pytest.raises(InputError, match=f"my_{wrapper}"):
        loaded(path)


def test_a_damaged_file_of_safetensors_is_refused(tmp_path, loaded):
    path = tmp_path / "trained.safetensors"
    save_file(STATE, path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match="damaged"):
        loaded(path)
