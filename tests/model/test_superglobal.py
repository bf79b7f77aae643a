import numpy as np
import pytest
import torch

from extraction.images import to_network_input
from model.checkpoint import encoder_state, load_encoder
from model.recipe import Recipe
from model.resnet import ResNet
from modules.descriptor import SCALE_SETS

ALL = {"relup": 0.014, "gemp": 4.6, "rgem": 2.5, "sgem": float("inf")}
WITHOUT = {f"no_{name}": {**ALL, name: None} for name in ALL}
CONFIGS = {"all": ALL, "none": dict.fromkeys(ALL), **WITHOUT}


def extract(model, pixels: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(to_network_input(torch.from_numpy(pixels)[None]))[0].numpy()


@pytest.mark.parametrize(
    ("config", "scales"), [("all", 1), ("all", 3), ("all", 5), *((name, 3) for name in [*WITHOUT, "none"])]
)
def test_descriptors_are_the_papers(reference, checkpoint_50, config, scales):
    model = Recipe(checkpoint_50, scales=SCALE_SETS[scales], **CONFIGS[config]).network()
    for i in (0, 1):
        out = extract(model, reference[f"image_{i}"])
        np.testing.assert_allclose(out, reference[f"descriptor_{config}_{scales}_image_{i}"], atol=2e-6, rtol=0)


@pytest.mark.parametrize("prefix", ["globalmodel.", "module.encoder_q.", "module.globalmodel.", "module.", ""])
def test_the_encoder_is_found_under_any_prefix(checkpoint_50, tmp_path, prefix):
    path = tmp_path / "other.pth"
    state = {f"{prefix}{key}": value.clone() for key, value in encoder_state(checkpoint_50).items()}
    state |= {"localmodel.conv.weight": torch.zeros(3), "desc_cls.weight": torch.zeros(3)}
    torch.save(state, path)
    with torch.device("meta"):
        encoder, expected = ResNet(50), ResNet(50)
    load_encoder(expected, checkpoint_50)
    for key, value in load_encoder(encoder, path).state_dict().items():
        assert torch.equal(value, expected.state_dict()[key]), key


def test_depth_101_loads_and_extracts(checkpoint_101, reference):
    out = extract(Recipe(checkpoint_101, 101, **ALL).network(), reference["image_1"][:64, :64])
    assert np.linalg.norm(out) == pytest.approx(1, abs=1e-6)
    assert len(out) == 2048


def test_descriptor_does_not_depend_on_its_batch(checkpoint_50, reference):
    model = Recipe(checkpoint_50, **ALL).network()
    pixels = torch.from_numpy(np.stack([reference["image_0"][:100, i * 40 : i * 40 + 120] for i in range(3)]))
    with torch.inference_mode():
        together = model(to_network_input(pixels))
    for i in range(3):
        np.testing.assert_allclose(extract(model, pixels[i].numpy()), together[i].numpy(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (33, 2000)])
@pytest.mark.parametrize("config", ["all", "none"])
def test_images_of_any_size_have_a_finite_unit_descriptor(checkpoint_50, size, config):
    model = Recipe(checkpoint_50, scales=SCALE_SETS[5], **CONFIGS[config]).network()
    out = extract(model, np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    assert np.linalg.norm(out) == pytest.approx(1, abs=1e-5)
