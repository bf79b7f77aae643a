"""Other networks instead of CVNet's: their descriptors are those of a direct call of attach."""

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from extraction.extract import extract_batch
from model.errors import InputError
from model.libraries import build_backbone
from model.recipe import Recipe
from modules import attach

pytestmark = pytest.mark.slow  # imports timm and torchvision

RESNET, VIT = "torchvision:resnet18", "timm:vit_tiny_patch16_224"
MINE = """
import torch, torchvision, torchvision_cvnet
from model.backbone import Backbone

def build():
    return torchvision.models.resnet18()

def projected():
    return Backbone(build(), projection="fc")

def cvnet():
    network = torchvision_cvnet.network(CHECKPOINT)
    return Backbone(
        network, mean=(0.406, 0.456, 0.485), std=(0.225, 0.224, 0.229), channels="BGR", projection="fc", smallest=1
    )

def fails():
    size = 3
    raise OSError(f"no room for {size}")

def logits():
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())

def nothing():
    return 5

class Headed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Conv2d(3, 8, 3, 4), torch.nn.Conv2d(8, 16, 1)

    def forward(self, x):
        return self.head(self.body(x))

def headed():
    return Headed()

def features_of_headed():
    return Backbone(Headed(), features=("body",))
"""


@pytest.fixture
def pixels(reference) -> Tensor:
    return torch.from_numpy(reference["image_1"])


@pytest.fixture
def mine(tmp_path, checkpoint_50):
    path = tmp_path / "mine.py"
    path.write_text(MINE.replace("CHECKPOINT", repr(str(checkpoint_50))))
    return path


def descriptors(recipe: Recipe, images: list[Tensor]) -> Tensor:
    return extract_batch(recipe.extractor(), images)


def normalised(pixels: Tensor, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)) -> Tensor:
    return torchvision.transforms.functional.normalize(pixels.permute(2, 0, 1)[None] / 255, mean, std)


def save(content, path):
    torch.save(content, path)
    return path


@torch.inference_mode()
def test_torchvisions_resnet_is_attached_as_by_hand(pixels, mine):
    torch.manual_seed(0)
    by_hand = attach(torchvision.models.resnet18().eval(), relup="layer1", relup_ends=("layer2", "layer3"))
    expected = by_hand(normalised(pixels))
    for name in (RESNET, f"{mine}:build"):
        torch.testing.assert_close(descriptors(Recipe(name, "untrained"), [pixels]), expected, atol=1e-6, rtol=0)


@torch.inference_mode()
def test_timms_networks_are_attached_as_by_hand(pixels):
    import timm

    torch.manual_seed(0)
    by_hand = attach(timm.create_model("convnext_atto", num_classes=0).eval(), scales=(1.0,))
    found = descriptors(Recipe("timm:convnext_atto", "untrained", scales=(1.0,)), [pixels])
    torch.testing.assert_close(found, by_hand(normalised(pixels)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("pooling", ["average", "max", "class"])
def test_a_transformers_tokens_are_a_map_at_any_size(pixels, pooling):
    import timm

    torch.manual_seed(0)
    vit = timm.create_model(VIT[5:], num_classes=0, dynamic_img_size=True, dynamic_img_pad=True).eval()
    with torch.inference_mode():
        tokens = vit.forward_features(normalised(pixels[:160, :96], (0.5,) * 3, (0.5,) * 3))
    pooled = {"average": tokens[:, 1:].mean(1), "max": tokens[:, 1:].amax(1), "class": tokens[:, 0]}[pooling]
    found = descriptors(Recipe(VIT, "untrained", scales=(1.0,), pooling=pooling, rgem_p=None), [pixels[:160, :96]])
    torch.testing.assert_close(found, normalize(pooled), atol=1e-6, rtol=0)


def test_torchvisions_transformer_is_itself_at_its_own_size_and_takes_any_other(pixels):
    torch.manual_seed(0)
    vit = torchvision.models.vit_b_32().eval()
    vit.heads = nn.Identity()
    pixels = torch.from_numpy(np.array(Image.fromarray(pixels.numpy()).resize((224, 224))))
    with torch.inference_mode():
        expected = normalize(vit(normalised(pixels)))
    recipe = Recipe("torchvision:vit_b_32", "untrained", scales=(1.0,), pooling="class", rgem_p=None)
    torch.testing.assert_close(descriptors(recipe, [pixels]), expected, atol=1e-6, rtol=0)
    assert descriptors(recipe, [pixels[:100, :60]]).shape == (1, 768)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(RESNET, "untrained"),
        Recipe(VIT, "untrained", pooling="average", rgem_p=None),
        Recipe("timm:swin_tiny_patch4_window7_224", "untrained", scales=(1.0,)),
    ],
    ids=lambda recipe: recipe.network,
)
def test_descriptors_do_not_depend_on_the_batch_and_small_images_have_one(recipe, pixels):
    images = [pixels[:90, start : start + 70].contiguous() for start in (0, 30, 60)]
    alone = torch.cat([descriptors(recipe, [image]) for image in images])
    torch.testing.assert_close(descriptors(recipe, images), alone, atol=2e-6, rtol=0)
    tiny = descriptors(recipe, [pixels[:7, :9].contiguous()])
    torch.testing.assert_close(tiny.norm(dim=1), torch.ones(1))


def test_half_precision_is_close(pixels):
    full, half = (descriptors(Recipe(RESNET, "untrained", precision=name), [pixels]) for name in ("fp32", "bf16"))
    assert 0.999 < float((full * half).sum()) < 0.9999999


def test_cvnet_from_a_users_file_gives_the_papers_descriptors(reference, mine):
    found = descriptors(Recipe(f"{mine}:cvnet"), [torch.from_numpy(reference["image_1"])])[0].numpy()
    np.testing.assert_allclose(found, reference["descriptor_all_3_image_1"], atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "noun"),
    [
        ("timm:resnet5", r"did you mean resnet50\?"),
        ("torchvision:resnet19", r"did you mean resnet18\?"),
        ("resnet18", "torchvision:NAME"),
        ("none.py:build", r"none\.py"),
        ("MINE:buidl", r"did you mean build\?"),
        ("MINE:fails", r"mine\.py, line 19: OSError: no room for 3"),
        ("MINE:logits", "feature map"),
        ("MINE:nothing", "int"),
    ],
)
def test_invalid_networks_are_rejected(mine, name, noun):
    with pytest.raises(InputError, match=noun):
        Recipe(name.replace("MINE", str(mine)), "untrained").check()


@pytest.mark.parametrize(
    ("network", "settings", "noun"),
    [
        (VIT, {}, "pooling average"),
        (VIT, {"pooling": "average"}, "Regional-GeM"),
        (VIT, {"pooling": "average", "rgem_p": None, "relup_stages": ("blocks.9.x",)}, "submodule"),
        (RESNET, {"pooling": "class"}, "class token"),
        ("timm:convnext_atto", {"relup_stages": ("stages.0",)}, r"'stages\.0' has no ReLU"),
    ],
)
def test_modules_that_a_network_cannot_take_are_refused_with_the_reason(network, settings, noun):
    with pytest.raises(InputError, match=noun):
        Recipe(network, "untrained", **settings).check()


def test_weights_come_from_a_file_that_fits(tmp_path):
    torch.manual_seed(1)
    trained = torchvision.models.resnet18().state_dict()
    path = save({"state_dict": {f"module.{key}": value for key, value in trained.items()}}, tmp_path / "trained.pth")
    recipe = Recipe(RESNET, path)
    assert torch.equal(recipe.backbone.network.conv1.weight, trained["conv1.weight"])
    assert recipe.weights_sha256 != Recipe(RESNET, "untrained").weights_sha256
    with pytest.raises(InputError, match=r"layer1\.2\.conv1"):
        Recipe("torchvision:resnet34", path).check()


def test_a_classifier_may_have_another_size_or_be_missing_unless_it_is_the_projection(tmp_path, mine):
    state = torchvision.models.resnet18(num_classes=7).state_dict()
    without = {key: value for key, value in state.items() if not key.startswith("fc.")}
    for number, weights in enumerate((state, without)):
        path = save(weights, tmp_path / f"{number}.pth")
        assert torch.equal(build_backbone(RESNET, path).network.conv1.weight, state["conv1.weight"])
        with pytest.raises(InputError, match=r"fc\.weight"):
            build_backbone(f"{mine}:projected", path)


def test_a_head_that_leads_to_the_map_may_not_be_missing_from_the_weights(tmp_path, mine):
    """As one that leads nowhere may: its random values are named."""
    head = build_backbone(f"{mine}:headed", "untrained").network.state_dict()
    path = save({key: value for key, value in head.items() if key.startswith("body.")}, tmp_path / "body.pth")
    with pytest.raises(InputError, match=r"head\.weight"):
        build_backbone(f"{mine}:headed", path)
    assert list(build_backbone(f"{mine}:features_of_headed", path).unfilled) == ["head.weight", "head.bias"]
