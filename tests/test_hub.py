import sys
import types
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from extraction.images import limit_side

pytestmark = pytest.mark.slow  # CVNet's network

load = partial(torch.hub.load, str(ROOT), source="local")


@pytest.fixture(scope="module")
def hub_model(checkpoint_50):
    return load("superglobal_resnet50", weights=checkpoint_50)


def as_tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


def test_tensors_and_pil_images_have_the_papers_descriptors(hub_model, reference):
    pixels, expected = reference["image_1"], reference["descriptor_all_3_image_1"][None]
    for image in (as_tensor(pixels), as_tensor(pixels)[None], Image.fromarray(pixels), [Image.fromarray(pixels)]):
        np.testing.assert_allclose(hub_model(image).numpy(), expected, atol=2e-6, rtol=0)


def test_a_list_of_mixed_sizes_and_kinds_keeps_its_order(hub_model, reference):
    pixels = [reference["image_1"][:60, :80], reference["image_0"][:50, :70], reference["image_1"][10:70, 10:90]]
    together = hub_model([as_tensor(pixels[0]), Image.fromarray(pixels[1]), Image.fromarray(pixels[2])])
    alone = torch.cat([hub_model(as_tensor(each)) for each in pixels])
    torch.testing.assert_close(together, alone, atol=2e-6, rtol=0)


def test_pil_images_are_turned_upright_without_changing_them(hub_model, reference):
    image = Image.fromarray(reference["image_1"][:60, :80]).rotate(90, expand=True)
    image.getexif()[0x0112] = 6  # to be turned by 90 degrees clockwise
    found = hub_model(image)
    assert image.size == (60, 80)
    torch.testing.assert_close(found, hub_model(as_tensor(reference["image_1"][:60, :80])), atol=2e-6, rtol=0)


def test_settings_are_those_of_a_recipe(checkpoint_50, checkpoint_101, reference):
    model = load("superglobal_resnet101", weights=checkpoint_101.parent, scales=(1.0,), relup_threshold=None)
    assert not model.extractor.network.changes
    assert model(torch.rand(2, 3, 64, 48)).shape == (2, 2048)
    assert model([]).shape == (0, 2048)

    model = load("superglobal_resnet50", weights=checkpoint_50, gemp_p=True, rgem_p=False, sgem_p=None, scales=5)
    network = model.extractor.network
    assert (network.pooling.p, network.rgem, network.sgem) == (4.6, None, None)
    assert network.scales == (0.5, 0.7071, 1, 1.4142, 2)
    with pytest.raises(ValueError, match="1, 3, 5"):
        load("superglobal_resnet50", weights=checkpoint_50, scales=4)
    with pytest.raises(ValueError, match=r"nowhere\.pyth"):
        load("superglobal_resnet50", weights="nowhere.pyth")


def test_any_network_has_an_entry_point_and_large_images_are_reduced(reference):
    model = load("superglobal", network="torchvision:resnet18", weights="untrained", scales=1, max_side=60)
    pixels = reference["image_1"][:60, :80]
    smaller = limit_side(torch.from_numpy(pixels), 60).permute(2, 0, 1)
    rows = model([as_tensor(pixels), Image.fromarray(pixels), smaller])
    assert rows.shape == (3, 512)
    torch.testing.assert_close(rows[:2], rows[2:].expand(2, -1), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["extraction", "model", "modules"])
def test_another_module_with_the_name_of_ours_is_reported(monkeypatch, name):
    for other in [other for other in sys.modules if other.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, other)
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with pytest.raises(ImportError, match=f"'{name}'"):
        load("reranker")


@pytest.mark.parametrize(
    ("image", "noun"),
    [
        (torch.rand(2, 64, 64), r"\(2, 64, 64\)"),
        (torch.zeros(3, 64, 64, dtype=torch.uint8), "uint8"),
        (255 * torch.rand(3, 64, 64), r"to 25"),
        (torch.full((3, 64, 64), float("nan")), "nan"),
        ([torch.rand(3, 64, 64), "a.jpg"], "image 1"),
        (Image.new("F", (8, 8)), "image 0"),
    ],
)
def test_invalid_images_are_rejected(hub_model, image, noun):
    with pytest.raises(ValueError, match=noun):
        hub_model(image)
