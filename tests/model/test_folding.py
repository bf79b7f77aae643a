import numpy as np
import pytest
import torch
from conftest import network_input
from torch import nn

from model.checkpoint import load_encoder
from model.cvnet import ResNet, cvnet_backbone
from model.folding import FoldedConv, FoldedResNet, has_fused_kernels
from model.recipe import Recipe
from modules.activation import replace_rectifiers


@pytest.fixture
def encoder(checkpoint_50) -> ResNet:
    return load_encoder(ResNet(50), checkpoint_50)


@pytest.fixture(scope="module")
def x(reference):
    return network_input(reference["image_0"][:96, :130])


@pytest.fixture(params=["cpu", "gpu"])
def kernels(request):
    """Returns the network with the kernels of a kind of device; without fused ones, it computes as a GPU does."""

    def selected(network: nn.Module) -> nn.Module:
        for layer in network.modules():
            if isinstance(layer, FoldedConv):
                layer.fused &= request.param == "cpu"
        return network

    return selected


def with_relu_plus(encoder: ResNet, threshold: float | None) -> ResNet:
    if threshold is not None:
        replace_rectifiers(encoder, cvnet_backbone(encoder).relup_stages, (), threshold)
    return encoder


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.max()), rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("threshold", [0.014, 0.3, None])
def test_the_folded_network_computes_what_the_trained_one_does(encoder, x, threshold, kernels):
    expected = with_relu_plus(encoder, threshold)(x)
    assert expected.std() > 0
    assert_close(kernels(FoldedResNet(encoder))(x), expected)


@torch.inference_mode()
def test_the_other_layout_gives_the_same_map(encoder, x):
    folded = FoldedResNet(encoder)
    expected = folded(x)
    folded.set_memory_format(torch.contiguous_format)
    assert_close(folded(x), expected)
    assert all(layer.weight.is_contiguous() for layer in folded.modules() if isinstance(layer, FoldedConv))


def test_folding_leaves_the_trained_network_as_it_is(encoder):
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    FoldedResNet(encoder, "bf16")
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_half_precision_keeps_the_direction_of_a_descriptor(checkpoint_50, reference, precision, kernels):
    model = kernels(Recipe(weights=checkpoint_50, scales=(1.0,), precision=precision).descriptor)
    for i in (0, 1):
        found = model(network_input(reference[f"image_{i}"]))[0].numpy()
        exact = reference[f"descriptor_all_1_image_{i}"]
        assert found.dtype == np.float32
        assert np.linalg.norm(found) == pytest.approx(1, abs=1e-6)
        assert found @ exact >= 0.9999
        assert np.abs(found - exact).max() > 2e-6  # otherwise nothing was computed in half precision


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_the_fused_kernels_are_used_if_available(encoder):
    assert has_fused_kernels(torch.float32)
    assert all(layer.fused for layer in FoldedResNet(encoder).modules() if isinstance(layer, FoldedConv))
