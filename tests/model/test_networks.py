"""Other networks instead of CVNet's: their descriptors are those of a direct call of attach."""

import re

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image

from extraction.extract import extract_batch
from model.checkpoint import encoder_state
from model.errors import InputError
from model.network_recipe import NetworkRecipe
from model.networks import build_backbone
from model.recipe import Recipe
from modules import GeMPlus, RegionalGeM, ScaleGeM, attach

MEAN, STD = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1), torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
MINE = """
import torch
from torchvision.models import resnet18

def build():
    return resnet18()

def fails():
    size = 3
    raise OSError(f"no room for {size}")

def logits():
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())

def nothing():
    return 5
"""


@pytest.fixture
def pixels(reference) -> torch.Tensor:
    return torch.from_numpy(reference["image_1"])


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def descriptors(recipe: NetworkRecipe, images: list[torch.Tensor]) -> torch.Tensor:
    return extract_batch(recipe.extractor(), images)


def test_torchvisions_resnet_is_attached_as_by_hand(pixels, mine):
    torch.manual_seed(0)
    network = torchvision.models.resnet18().eval()
    by_hand = attach(network, relup="layer1", relup_ends=("layer2", "layer3"))
    x = (pixels.permute(2, 0, 1)[None] / 255 - MEAN) / STD
    with torch.inference_mode():
        expected = by_hand(x)
    for name in ("torchvision:resnet18", f"{mine}:build"):
        found = descriptors(NetworkRecipe(name, "untrained"), [pixels])
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_timms_networks_are_attached_as_by_hand(pixels):
    torch.manual_seed(0)
    network = timm.create_model("convnext_atto", num_classes=0).eval()
    by_hand = attach(network, scales=(1.0,))
    x = (pixels.permute(2, 0, 1)[None] / 255 - MEAN) / STD
    with torch.inference_mode():
        expected = by_hand(x)
    found = descriptors(NetworkRecipe("timm:convnext_atto", "untrained", scales=(1.0,)), [pixels])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("pooling", ["average", "max", "class"])
def test_a_transformers_tokens_are_a_map_at_any_size(pixels, pooling):
    name = "timm:vit_tiny_patch16_224"
    torch.manual_seed(0)
    vit = timm.create_model(name[5:], num_classes=0, dynamic_img_size=True, dynamic_img_pad=True).eval()
    x = (pixels[:160, :96].permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
    with torch.inference_mode():
        tokens = vit.forward_features(x)
    pooled = {"average": tokens[:, 1:].mean(1), "max": tokens[:, 1:].amax(1), "class": tokens[:, 0]}[pooling]
    recipe = NetworkRecipe(name, "untrained", (1.0,), pooling=pooling, rgem=None)
    found = descriptors(recipe, [pixels[:160, :96]])
    torch.testing.assert_close(found, torch.nn.functional.normalize(pooled, dim=1), atol=1e-6, rtol=0)


def test_torchvisions_transformer_is_itself_at_its_own_size(pixels):
    torch.manual_seed(0)
    vit = torchvision.models.vit_b_32().eval()
    pixels = torch.from_numpy(np.array(Image.fromarray(pixels.numpy()).resize((224, 224))))
    x = (pixels.permute(2, 0, 1)[None] / 255 - MEAN) / STD
    vit.heads = torch.nn.Identity()
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(vit(x), dim=1)
    recipe = NetworkRecipe("torchvision:vit_b_32", "untrained", (1.0,), pooling="class", rgem=None)
    torch.testing.assert_close(descriptors(recipe, [pixels]), expected, atol=1e-6, rtol=0)
    assert descriptors(recipe, [pixels[:100, :60]]).shape == (1, 768)


@pytest.mark.parametrize(
    "recipe",
    [
        NetworkRecipe("torchvision:resnet18", "untrained"),
        NetworkRecipe("timm:vit_tiny_patch16_224", "untrained", pooling="average", rgem=None),
        NetworkRecipe("timm:swin_tiny_patch4_window7_224", "untrained", (1.0,)),
    ],
    ids=lambda recipe: recipe.network,
)
def test_descriptors_do_not_depend_on_the_batch_and_small_images_have_one(recipe, pixels):
    images = [pixels[:90, start : start + 70].contiguous() for start in (0, 30, 60)]
    together = descriptors(recipe, images)
    for image, row in zip(images, together, strict=True):
        torch.testing.assert_close(descriptors(recipe, [image])[0], row, atol=2e-6, rtol=0)
    tiny = descriptors(recipe, [pixels[:7, :9].contiguous()])
    torch.testing.assert_close(tiny.norm(dim=1), torch.ones(1))


@pytest.mark.parametrize("name", ["cvnet", "torchvision:resnet18"])
def test_the_longer_side_is_limited_by_reducing_the_image(checkpoint_50, pixels, name):
    recipes = [
        Recipe(checkpoint_50, max_side=side) if name == "cvnet" else NetworkRecipe(name, "untrained", max_side=side)
        for side in (None, 100, 1000)
    ]
    smaller = torch.nn.functional.interpolate(
        pixels.permute(2, 0, 1)[None] / 255, (100, 63), mode="bilinear", antialias=True
    )
    with torch.inference_mode():
        expected = recipes[0].extractor()(smaller.permute(0, 2, 3, 1))
    torch.testing.assert_close(descriptors(recipes[1], [pixels]), expected, atol=1e-6, rtol=0)
    assert torch.equal(descriptors(recipes[2], [pixels]), descriptors(recipes[0], [pixels]))
    assert recipes[1].provenance() != recipes[0].provenance()


def test_half_precision_is_close(pixels):
    full, half = (
        descriptors(NetworkRecipe("torchvision:resnet18", "untrained", precision=name), [pixels])
        for name in ("fp32", "bf16")
    )
    assert 0.999 < float((full * half).sum()) < 0.9999999


CVNET = """
import re, torch, torchvision
from model.networks import Backbone

def build():
    network = torchvision.models.resnet50(num_classes=2048)
    state = torch.load(PATH)
    network.load_state_dict({renamed(key): value for key, value in state.items() if renamed(key)}, strict=False)
    return Backbone(
        network, mean=(0.406, 0.456, 0.485), std=(0.225, 0.224, 0.229), channels="BGR", projection="fc", smallest=1
    )

def renamed(key):
    key = key.replace("head.fc.", "fc.").replace("stem.conv.", "conv1.").replace("stem.bn.", "bn1.")
    block = re.match(r"s(\\d)\\.b(\\d+)\\.(.*)", key)
    if block is None:
        return key if not key.startswith("head.pool") else None
    stage, number, rest = block.groups()
    rest = rest.replace("proj.", "downsample.0.").replace("f.", "")
    rest = re.sub(r"^bn\\.", "downsample.1.", rest)
    for letter, place in zip("abc", "123"):
        rest = re.sub(rf"^{letter}\\.", f"conv{place}.", rest)
        rest = re.sub(rf"^{letter}_bn\\.", f"bn{place}.", rest)
    return f"layer{stage}.{int(number) - 1}.{rest}"
"""


def test_cvnet_from_a_users_file_gives_the_papers_descriptors(reference, checkpoint_50, tmp_path):
    torch.save(encoder_state(checkpoint_50), tmp_path / "state.pth")
    path = tmp_path / "cvnet.py"
    path.write_text(CVNET.replace("PATH", repr(str(tmp_path / "state.pth"))))
    recipe = NetworkRecipe(f"{path}:build")
    for i in (0, 1):
        (found,) = descriptors(recipe, [torch.from_numpy(reference[f"image_{i}"])]).numpy()
        np.testing.assert_allclose(found, reference[f"descriptor_all_3_image_{i}"], atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet5", "timm has no network 'resnet5'; did you mean resnet50?"),
        ("torchvision:resnet19", "torchvision has no network 'resnet19'; did you mean resnet18?"),
        ("none.py:build", "no file none.py"),
        ("MINE:buidl", "has no function buidl; did you mean build?"),
        ("MINE:fails", "mine.py, line 10: OSError: no room for 3"),
        ("MINE:logits", "it returns shape (1, 3), not a feature map (N, C, H, W)"),
        ("MINE:nothing", "nothing returns int, not a network"),
    ],
)
def test_invalid_networks_are_rejected(mine, name, message):
    with pytest.raises(InputError, match=re.escape(message)):
        NetworkRecipe(name.replace("MINE", str(mine)), "untrained").check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "average pooling"),
        ({"pooling": "average"}, "Regional-GeM"),
        ({"pooling": "average", "rgem": None, "relup_stages": ("network.blocks",)}, "has no submodule"),
    ],
)
def test_modules_that_a_network_cannot_take_are_refused_with_the_reason(options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        NetworkRecipe("timm:vit_tiny_patch16_224", "untrained", **options).check()


def test_relup_without_a_relu_is_rejected():
    with pytest.raises(InputError, match=r"'network\.stages\.0' has no ReLU"):
        NetworkRecipe("timm:convnext_atto", "untrained", relup_stages=("stages.0",)).check()


def test_weights_come_from_a_file_that_fits(tmp_path, pixels):
    torch.manual_seed(1)
    network = torchvision.models.resnet18()
    path = tmp_path / "trained.pth"
    torch.save({"state_dict": {f"module.{key}": value for key, value in network.state_dict().items()}}, path)
    recipe = NetworkRecipe("torchvision:resnet18", str(path))
    assert torch.equal(build_backbone(recipe.network, path).network.conv1.weight, network.conv1.weight)
    assert recipe.checkpoint_sha256 != NetworkRecipe("torchvision:resnet18", "untrained").checkpoint_sha256
    with pytest.raises(InputError, match=r"does not fit torchvision:resnet34: keys \d+ missing \(layer1\.2\.conv1"):
        NetworkRecipe("torchvision:resnet34", str(path)).check()


def test_the_modules_are_the_papers_by_default():
    attached = NetworkRecipe("torchvision:resnet18", "untrained").attached()
    kinds = {type(part) for part in (attached.pooling, attached.rgem, attached.sgem)}
    assert kinds == {GeMPlus, RegionalGeM, ScaleGeM}
    assert sorted({change.layer.split(".")[0] for change in attached.changes}) == ["layer1", "layer2", "layer3"]
