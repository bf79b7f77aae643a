import numpy as np
import pytest
import torch

from extraction.images import to_network_input
from model.checkpoint import load_encoder
from model.cvnet import ResNet
from model.folding import FoldedConv, FoldedResNet, has_fused_kernels
from model.recipe import Recipe


@pytest.fixture(scope="module")
def pixels(reference):
    return to_network_input(torch.from_numpy(reference["image_0"])[None, :96, :130])


def use_kernels_of_a_gpu(network: torch.nn.Module) -> None:
    """Applies convolution, shortcut and rectifier one after the other, as without a fused kernel."""
    for module in network.modules():
        if isinstance(module, FoldedConv):
            module.fused = False


@pytest.mark.parametrize("kernels", ["cpu", "gpu"])
@pytest.mark.parametrize("relup", [0.014, 0.3, None])
def test_the_folded_network_computes_what_the_trained_one_does(checkpoint_50, pixels, relup, kernels):
    encoder = load_encoder(ResNet(50, relup=relup), checkpoint_50).eval()
    folded = FoldedResNet(encoder)
    if kernels == "gpu":
        use_kernels_of_a_gpu(folded)
    with torch.inference_mode():
        expected, out = encoder(pixels), folded(pixels)
    assert expected.std() > 0
    torch.testing.assert_close(out, expected, atol=1e-5 * float(expected.max()), rtol=1e-5)


@pytest.mark.parametrize("kernels", ["cpu", "gpu"])
@pytest.mark.parametrize("relup", [0.3, None])
def test_a_network_that_stops_in_a_stage_returns_the_input_of_its_last_rectifier(checkpoint_50, pixels, relup, kernels):
    encoder = load_encoder(ResNet(50, relup=relup), checkpoint_50)
    folded = FoldedResNet(encoder, stop_in=3)
    if kernels == "gpu":
        use_kernels_of_a_gpu(folded)
    encoder.s3[-1].relu = torch.nn.Identity()
    with torch.inference_mode():
        expected, out = encoder.s3(encoder.s2(encoder.s1(encoder.stem(pixels)))), folded(pixels)
    assert expected.min() < 0
    torch.testing.assert_close(out, expected, atol=1e-5 * float(expected.max()), rtol=1e-5)


def test_the_other_layout_gives_the_same_map(checkpoint_50, pixels):
    folded = FoldedResNet(load_encoder(ResNet(50), checkpoint_50).eval())
    with torch.inference_mode():
        expected = folded(pixels)
        folded.set_memory_format(torch.contiguous_format)
        out = folded(pixels)
    assert all(module.weight.is_contiguous() for module in folded.modules() if isinstance(module, FoldedConv))
    torch.testing.assert_close(out, expected, atol=1e-5 * float(expected.max()), rtol=1e-5)


def test_folding_leaves_the_trained_network_as_it_is(checkpoint_50):
    encoder = load_encoder(ResNet(50), checkpoint_50)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    FoldedResNet(encoder, "bf16")
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("kernels", ["cpu", "gpu"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_the_direction_of_a_descriptor(checkpoint_50, reference, precision, kernels):
    model = Recipe(checkpoint_50, scales=(1.0,), precision=precision).network()
    if kernels == "gpu":
        use_kernels_of_a_gpu(model)
    for i in (0, 1):
        with torch.inference_mode():
            out = model(to_network_input(torch.from_numpy(reference[f"image_{i}"])[None]))[0].numpy()
        exact = reference[f"descriptor_all_1_image_{i}"]
        assert out.dtype == np.float32
        assert np.linalg.norm(out) == pytest.approx(1, abs=1e-6)
        assert out @ exact >= 0.9999
        assert np.abs(out - exact).max() > 2e-6  # otherwise nothing was computed in half precision


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_runs_on_a_device_without_numbers(checkpoint_50, precision):
    model = Recipe(checkpoint_50, precision=precision).network("meta")
    out = model(torch.empty(5, 3, 70, 90, device="meta"))
    assert out.shape == (5, 2048)
    assert out.dtype == torch.float32


def test_an_unknown_precision_is_rejected(checkpoint_50):
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, fp16, got 'fp8'"):
        Recipe(checkpoint_50, precision="fp8").network()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_the_fused_kernels_are_used_if_available(checkpoint_50):
    assert has_fused_kernels(torch.float32)
    encoder = Recipe(checkpoint_50).network().encoder
    assert all(module.fused for module in encoder.modules() if isinstance(module, FoldedConv))
