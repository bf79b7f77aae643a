import copy
import re

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.functional import normalize

from extraction.images import to_network_input
from model.checkpoint import encoder_state
from modules import GeM, GeMPlus, RegionalGeM, ReLUPlus, ScaleGeM, attach
from modules.descriptor import rescale

IMAGES = torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(3))
PAPER = {"relup": "layer1", "relup_ends": ("layer2", "layer3")}


def resnet18() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18(weights=None).eval()


def cvnet_as_torchvision(checkpoint) -> nn.Module:
    """torchvision's ResNet-50 with the weights of a CVNet checkpoint; its fc is the projection."""
    network = torchvision.models.resnet50(weights=None)
    network.fc = nn.Linear(2048, 2048)
    block = {"proj": "downsample.0", "bn": "downsample.1"}
    block |= {f"f.{a}": f"conv{n}" for n, a in enumerate("abc", 1)} | {
        f"f.{a}_bn": f"bn{n}" for n, a in enumerate("abc", 1)
    }

    def name(key: str) -> str:
        layer, _, kind = key.rpartition(".")
        if layer in ("stem.conv", "stem.bn"):
            return f"{layer.replace('stem.', '')}1.{kind}"
        if layer == "head.fc":
            return f"fc.{kind}"
        stage, number, part = re.fullmatch(r"s(\d)\.b(\d+)\.(.+)", layer).groups()
        return f"layer{stage}.{int(number) - 1}.{block[part]}.{kind}"

    state = encoder_state(checkpoint)
    state.pop("head.pool.p")
    network.load_state_dict({name(key): value for key, value in state.items()})
    return network.eval()


def test_torchvisions_resnet_becomes_the_papers_network(checkpoint_50, reference):
    attached = attach(cvnet_as_torchvision(checkpoint_50), projection="fc", **PAPER)
    pixels = torch.from_numpy(reference["image_1"])[None]
    with torch.inference_mode():
        out = attached(to_network_input(pixels))[0]
    torch.testing.assert_close(out, torch.from_numpy(reference["descriptor_all_3_image_1"]), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["resnext50_32x4d", "convnext_tiny", "efficientnet_b0", "mobilenet_v3_small"])
def test_torchvisions_networks_give_what_enters_their_pooling(name):
    network = getattr(torchvision.models, name)(weights=None).eval()
    seen = []
    network.avgpool.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        network(IMAGES)
        out = attach(network, pooling=GeM(3.0), rgem=None, sgem=None, scales=(1,))(IMAGES)
    torch.testing.assert_close(out, normalize(GeM(3.0)(seen[0]), dim=-1))


def test_a_changed_class_is_not_mistaken_for_a_torchvision_network():
    class Mine(torchvision.models.ResNet):
        def forward(self, x):
            return self.conv1(x)

    network = Mine(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]).eval()
    assert attach(network, scales=(1,))(IMAGES).shape == (2, 64)


def test_a_callable_is_attached_and_each_module_changes_the_descriptor():
    network = nn.Conv2d(3, 8, 3, stride=2)

    def features(x):
        return network(x)

    with torch.inference_mode():
        out = attach(features, scales=(1.0, 0.5))(IMAGES)
        maps = [network(IMAGES), network(rescale(IMAGES, 0.5))]
        vectors = torch.stack([normalize(GeMPlus()(RegionalGeM()(each)), dim=-1) for each in maps])
    torch.testing.assert_close(out, normalize(ScaleGeM()(vectors), dim=-1))


def test_without_scale_gem_the_scales_are_averaged():
    network = nn.Conv2d(3, 8, 3)
    with torch.inference_mode():
        out = attach(network, sgem=None, rgem=None, scales=(1.0, 0.5))(IMAGES)
        maps = [network(IMAGES), network(rescale(IMAGES, 0.5))]
        vectors = torch.stack([normalize(GeMPlus()(each), dim=-1) for each in maps])
    torch.testing.assert_close(out, normalize(vectors.mean(dim=0), dim=-1))


def test_a_named_method_returns_the_map_and_the_networks_own_parts_are_used():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.pool, self.whiten = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)

        def extract(self, x):
            return self.body(x)

    network = Network()
    attached = attach(
        network, features="extract", pooling=network.pool, rgem=None, scales=(1,), projection=network.whiten
    )
    with torch.inference_mode():
        expected = network.whiten(normalize(network.body(IMAGES).mean(dim=(2, 3)), dim=-1))
        torch.testing.assert_close(attached(IMAGES), normalize(expected, dim=-1))
    assert set(attached.state_dict()) == {f"model.{key}" for key in network.state_dict()}


def test_whitening_is_p_times_x_minus_m():
    random = torch.Generator().manual_seed(1)
    p, m = torch.randn(4, 8, generator=random), torch.randn(8, generator=random)
    network = nn.Conv2d(3, 8, 3)
    with torch.inference_mode():
        x = attach(network, scales=(1,))(IMAGES)
        torch.testing.assert_close(
            attach(network, scales=(1,), projection=(p, m))(IMAGES), normalize((x - m) @ p.T, dim=-1)
        )
        for matrix in (p, p.double().numpy()):
            out = attach(network, scales=(1,), projection=matrix)(IMAGES)
            torch.testing.assert_close(out, normalize(x @ p.T, dim=-1))


def test_repr_lists_the_changed_layers():
    text = repr(attach(resnet18(), **PAPER))
    assert "layer1.0.relu: ReLU(inplace=True) -> ReLUPlus(threshold=0.014)" in text
    assert "layer2.1: ends in ReLUPlus(threshold=0.014)" in text
    assert "layer4" not in text.split("changed layers")[1]
    assert "changed layers: none" in repr(attach(resnet18()))


def test_relu6_keeps_its_ceiling():
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU6())
    nn.init.constant_(network[0].weight, 10)
    nn.init.constant_(network[0].bias, -10)
    attach(network, relup="1")
    out = network(IMAGES).detach()
    assert out.min() == pytest.approx(0.014)
    assert out.max() == 6


@pytest.mark.parametrize("way", ["detach", "context"])
def test_detaching_restores_the_original_network(way):
    network = resnet18()
    keys, before = list(network.state_dict()), network(IMAGES)
    attached = attach(network, **PAPER)
    assert not torch.equal(network(IMAGES), before)
    if way == "detach":
        assert attached.detach() is network
    else:
        with attached:
            pass
    assert torch.equal(network(IMAGES), before)
    assert not any(isinstance(module, ReLUPlus) for module in network.modules())
    assert list(network.state_dict()) == keys
    with pytest.raises(RuntimeError, match="detached"):
        attached(IMAGES)


def test_a_copy_is_detached_on_its_own():
    network = resnet18()
    plain = network(IMAGES)
    attached = attach(network, **PAPER)
    copied = copy.deepcopy(attached)
    torch.testing.assert_close(copied.detach()(IMAGES), plain)
    assert not torch.equal(network(IMAGES), plain)


def test_a_checkpoint_loads_after_attaching():
    state = resnet18().state_dict()
    network = torchvision.models.resnet18(weights=None).eval()
    attached = attach(network, **PAPER)
    network.load_state_dict(state)
    assert set(attached.state_dict()) == {f"model.{key}" for key in state}


def test_other_folders_are_kept():
    network = resnet18().train()
    network.layer1.eval()
    with pytest.warns(UserWarning, match="training mode"):
        attached = attach(network, relup="layer2")
    assert network.training
    assert not network.layer1.training
    assert attached.training
    assert all(isinstance(block.relu, nn.ReLU) for block in [*network.layer1, *network.layer3])


def test_half_precision_networks_are_pooled_in_float32():
    network = nn.Conv2d(3, 8, 3).to(torch.bfloat16)
    out = attach(network, projection=nn.Linear(8, 4).to(torch.bfloat16))(IMAGES.to(torch.bfloat16))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.norm(dim=1), torch.ones(2))


def test_descriptors_have_gradients():
    network = nn.Conv2d(3, 8, 3)
    attach(network)(IMAGES).sum().backward()
    assert network.weight.grad.abs().sum() > 0


class Infinite(nn.Module):
    def forward(self, x):
        return x.mean(dim=(2, 3)) + float("inf")


class Tokens(nn.Module):
    def forward_features(self, x):
        return x.flatten(2).mT


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: attach("resnet18"), "a network, or a callable that returns a feature map, got str"),
        (lambda: attach(torchvision.models.ResNet), "returns a feature map, got the class ResNet"),
        (lambda: attach(resnet18(), pooling=None), "pooling must be a module, got NoneType"),
        (
            lambda: attach(resnet18(), pooling=nn.AdaptiveAvgPool2d),
            "pooling must be a module, got the class AdaptiveAvg",
        ),
        (lambda: attach(resnet18(), rgem=True), "rgem must be a module or None, got bool"),
        (lambda: attach(resnet18(), relup=""), "relup must be the name of a submodule, or several names, got ''"),
        (lambda: attach(resnet18(), relup=None), "relup must be the name of a submodule, or several names, got None"),
        (lambda: attach(resnet18(), features=print), "features must be the name of a submodule"),
        (lambda: attach(resnet18(), scales=3), "scales must be one or more positive factors such as .* got 3"),
        (lambda: attach(attach(resnet18(), relup="layer1").model, relup="layer1"), "attached already; call detach"),
        (lambda: attach(resnet18(), features="layer9"), "no method or submodule 'layer9'; it has conv1, bn1"),
        (lambda: attach(resnet18(), projection="head"), "no submodule 'head'; it has conv1"),
        (lambda: attach(resnet18(), relup="layer9"), "no submodule 'layer9'; it has conv1"),
        (lambda: attach(resnet18(), relup="bn1"), "'bn1' has no ReLU, but no activation module"),
        (lambda: attach(nn.Sequential(nn.GELU()), relup="0"), "'0' has no ReLU, but GELU"),
        (lambda: attach(lambda x: x, relup="layer1"), "no submodule 'layer1'"),
        (lambda: attach(resnet18(), relup_ends="layer1.0"), r"layer1.0.conv1 \(Conv2d\) has no ReLU of its own"),
        (lambda: attach(resnet18(), relup="layer1", relup_threshold=-1), "threshold of ReLU. must be 0 or more"),
        (lambda: attach(resnet18(), scales=()), r"one or more positive factors .* got \(\)"),
        (lambda: attach(resnet18(), scales=(1, 0)), r"positive factors .* got \(1, 0\)"),
        (lambda: attach(resnet18(), projection=torch.rand(4)), r"projection takes a tensor \(D, C\), got shape \(4,\)"),
        (lambda: attach(resnet18(), projection=(torch.rand(4, 8), torch.rand(4))), r"shapes \[\(4, 8\), \(4,\)\]"),
        (lambda: attach(resnet18(), projection=torch.rand(4, 8))(IMAGES), r"takes \(N, 8\), .* \(6, 512\)"),
        (lambda: attach(resnet18())(IMAGES[0]), r"\(N, C, H, W\), got shape \(3, 96, 128\)"),
        (lambda: attach(resnet18())((IMAGES * 255).byte()), r"torch.uint8 of shape \(2, 3, 96, 128\)"),
        (lambda: attach(resnet18())(IMAGES * float("nan")), r"NaN: 73728 .* \(2, 3, 96, 128\)"),
        (lambda: attach(nn.Flatten())(IMAGES), r"Flatten returns shape \(2, 18090\), not a feature map"),
        (
            lambda: attach(Tokens())(IMAGES),
            r"Tokens.forward_features returns shape .* not a feature map .*see attach for a ViT",
        ),
        (lambda: attach(lambda x: [x])(IMAGES), "<lambda> returns list, not a feature map"),
        (lambda: attach(resnet18(), pooling=nn.Identity())(IMAGES), r"the pooling returns shape \(2, 512, 3, 3\) for"),
        (lambda: attach(resnet18(), pooling=Infinite())(IMAGES), "is not finite|got NaN"),
    ],
)
def test_arguments_that_do_not_fit_are_rejected(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_invalid_name_changes_nothing():
    network = resnet18()
    with pytest.raises(ValueError, match="layer9"):
        attach(network, relup=("layer1", "layer9"))
    assert not any(isinstance(module, ReLUPlus) for module in network.modules())


def test_a_block_that_does_not_end_in_a_relu_is_rejected():
    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.conv = nn.ReLU(), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return x - 1 + 0 * self.conv(self.relu(x))

    attached = attach(nn.Sequential(nn.Sequential(PreActivation())), relup_ends="0")
    with pytest.raises(ValueError, match=r"0.0 \(PreActivation\) returns negative values"):
        attached(IMAGES)


def test_a_map_with_its_channels_last_is_rejected():
    class ChannelsLast(nn.Module):
        num_features = 3

        def forward_features(self, x):
            return x.permute(0, 2, 3, 1)

    with pytest.raises(ValueError, match=r"returns \(N, H, W, C\), shape \(2, 67, 90, 3\)"):
        attach(ChannelsLast())(IMAGES)
