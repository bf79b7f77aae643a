import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image


@pytest.fixture(scope="module")
def hub_model(checkpoint_50):
    return torch.hub.load(str(ROOT), "superglobal_resnet50", source="local", weights=checkpoint_50)


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
    size = image.size
    out = hub_model(image)
    assert image.size == size
    torch.testing.assert_close(out, hub_model(as_tensor(reference["image_1"][:60, :80])), atol=2e-6, rtol=0)


def test_depth_101_takes_a_folder_and_options(checkpoint_101):
    model = torch.hub.load(
        str(ROOT), "superglobal_resnet101", source="local", weights=checkpoint_101.parent, scales=(1.0,), relup=None
    )
    assert model(torch.rand(2, 3, 64, 48)).shape == (2, 2048)
    assert model([]).shape == (0, 2048)


def test_modules_are_switched_as_on_the_command_line(checkpoint_50):
    def load(**options):
        return torch.hub.load(
            str(ROOT), "superglobal_resnet50", source="local", weights=checkpoint_50, **options
        ).extractor.network

    model = load(gemp=True, relup=True, rgem=False, sgem=None, scales=5)
    assert (model.pooling.p, model.encoder.relup, model.rgem, model.sgem, len(model.scales)) == (
        4.6,
        0.014,
        None,
        None,
        5,
    )
    with pytest.raises(ValueError, match="scales must be one of 1, 3, 5, or factors, got 4"):
        load(scales=4)


def test_another_module_with_the_name_of_ours_is_reported(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "model"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "model", types.ModuleType("model"))
    with pytest.raises(ImportError, match="another module named 'model' is imported already"):
        torch.hub.load(str(ROOT), "reranker", source="local")


def test_the_reranker_comes_with_its_settings():
    reranker = torch.hub.load(str(ROOT), "reranker", source="local", k=5)
    assert (reranker.m, reranker.k, reranker.beta) == (400, 5, 0.15)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.rand(2, 64, 64), r"image 0 must have shape \(3, H, W\), got \(2, 64, 64\)"),
        (torch.rand(1, 3, 0, 64), r"got \(3, 0, 64\)"),
        (torch.zeros(3, 64, 64, dtype=torch.uint8), "must be RGB in 0..1, got torch.uint8; divide it by 255"),
        (255 * torch.rand(3, 64, 64), r"must be RGB in 0..1, \(3, 64, 64\) has .* to 25"),
        (torch.full((3, 64, 64), float("nan")), "must be RGB in 0..1, .* has nan to nan"),
        ([torch.rand(3, 64, 64), "a.jpg"], "image 1 must be a tensor .* or a PIL image, got str"),
        ("a.jpg", "image 0 must be a tensor .* got str"),
        (Image.new("F", (8, 8)), "image 0: floating-point image"),
        (3, "got int"),
    ],
)
def test_invalid_images_are_rejected(hub_model, image, message):
    with pytest.raises(ValueError, match=message):
        hub_model(image)


def test_missing_weights_are_reported():
    with pytest.raises(ValueError, match=r"no file or folder nowhere\.pyth; see weights/README\.md"):
        torch.hub.load(str(ROOT), "superglobal_resnet50", source="local", weights="nowhere.pyth")


def test_any_network_has_an_entry_point(reference):
    model = torch.hub.load(
        str(ROOT), "superglobal", source="local", network="torchvision:resnet18", weights="untrained", scales=1
    )
    rows = model([as_tensor(reference["image_1"][:60, :80]), Image.fromarray(reference["image_0"][:50, :70])])
    assert rows.shape == (2, 512)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))
