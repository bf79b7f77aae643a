import copy

import pytest
import torch
import torchvision
from conftest import network_input
from torch import nn
from torch.nn.functional import normalize
from torchvision_cvnet import network as torchvision_cvnet

from modules import GeM, GeMPlus, RegionalGeM, ReLUPlus, ScaleGeM, attach
from modules.descriptor import rescale

IMAGES = torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(3))
PAPER = {"relup": "layer1", "relup_ends": ("layer2", "layer3")}


def resnet18() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18().eval()


def relu_plus_layers(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, ReLUPlus)]


@torch.inference_mode()
def test_torchvisions_resnet_becomes_the_papers_network(checkpoint_50, reference):
    attached = attach(torchvision_cvnet(checkpoint_50), projection="fc", **PAPER)
    found = attached(network_input(reference["image_1"]))[0]
    torch.testing.assert_close(found, torch.from_numpy(reference["descriptor_all_3_image_1"]), atol=2e-6, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize(
    "name",
    [*("efficientnet_b0", "mobilenet_v3_small"),
     *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnext50_32x4d", "convnext_tiny"))],
)  # fmt: skip
def test_torchvisions_networks_give_what_enters_their_pooling(name):
    network, seen = getattr(torchvision.models, name)().eval(), []
    network.avgpool.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network(IMAGES)
    found = attach(network, pooling=GeM(3.0), rgem=None, sgem=None, scales=(1,))(IMAGES)
    torch.testing.assert_close(found, normalize(GeM(3.0)(seen[0])))


def test_a_changed_class_is_not_mistaken_for_a_torchvision_network():
    class Mine(torchvision.models.ResNet):
        def forward(self, x):
            return self.conv1(x)

    network = Mine(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]).eval()
    assert attach(network, scales=(1,))(IMAGES).shape == (2, 64)


@torch.inference_mode()
@pytest.mark.parametrize("sgem", [ScaleGeM(), None])
@pytest.mark.parametrize("rgem", [RegionalGeM(), None])
def test_a_callable_is_attached_and_each_module_changes_the_descriptor(rgem, sgem):
    network = nn.Conv2d(3, 8, 3, stride=2)
    found = attach(lambda x: network(x), rgem=rgem, sgem=sgem, scales=(1.0, 0.5))(IMAGES)
    maps = [network(IMAGES), network(rescale(IMAGES, 0.5))]
    vectors = torch.stack([normalize(GeMPlus()(each if rgem is None else rgem(each))) for each in maps])
    torch.testing.assert_close(found, normalize(vectors.mean(dim=0) if sgem is None else sgem(vectors)))


@torch.inference_mode()
def test_a_named_method_returns_the_map_and_the_networks_own_parts_are_used():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.pool, self.whiten = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)

        def extract(self, x):
            return self.body(x)

    network = Network()
    attached = attach(network, "extract", network.pool, rgem=None, scales=(1,), projection=network.whiten)
    expected = network.whiten(normalize(network.body(IMAGES).mean(dim=(2, 3))))
    torch.testing.assert_close(attached(IMAGES), normalize(expected))
    assert set(attached.state_dict()) == {f"model.{key}" for key in network.state_dict()}


@torch.inference_mode()
def test_whitening_is_p_times_x_minus_m():
    random = torch.Generator().manual_seed(1)
    p, m = torch.randn(4, 8, generator=random), torch.randn(8, generator=random)
    network = nn.Conv2d(3, 8, 3)
    x = attach(network, scales=(1,))(IMAGES)
    for projection, expected in (((p, m), (x - m) @ p.T), (p, x @ p.T), (p.double().numpy(), x @ p.T)):
        found = attach(network, scales=(1,), projection=projection)(IMAGES)
        torch.testing.assert_close(found, normalize(expected))


def test_relu6_keeps_its_ceiling():
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU6())
    nn.init.constant_(network[0].weight, 10)
    nn.init.constant_(network[0].bias, -10)
    attach(network, relup="1")
    found = network(IMAGES).detach()
    assert found.min() == pytest.approx(0.014)
    assert found.max() == 6


def leave_context(attached):
    with attached:
        pass
    return attached.model


@pytest.mark.parametrize("relup", [PAPER, {"relup": ("layer1", "layer1.0"), "relup_ends": ("layer2", "layer2")}])
@pytest.mark.parametrize("leave", [lambda attached: attached.detach(), leave_context], ids=["detach", "context"])
def test_detaching_restores_the_network_and_its_state(leave, relup):
    network = resnet18().requires_grad_(False)
    before, modules = network(IMAGES), dict(network.named_modules())
    state = {key: value.clone() for key, value in network.state_dict().items()}
    attached = attach(network, **relup)
    assert not torch.equal(network(IMAGES), before)
    assert leave(attached) is network
    assert torch.equal(network(IMAGES), before)
    assert dict(network.named_modules()) == modules
    assert network.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    with pytest.raises(RuntimeError, match="detached"):
        attached(IMAGES)


def test_a_layer_with_two_names_is_restored():
    layer = nn.Sequential(nn.ReLU())
    network = nn.Sequential(layer, nn.Conv2d(3, 3, 1), layer)
    attach(network, relup=("0", "2")).detach()
    assert type(layer[0]) is nn.ReLU


def test_a_copy_is_detached_on_its_own():
    network = resnet18()
    plain = network(IMAGES)
    copied = copy.deepcopy(attach(network, **PAPER))
    torch.testing.assert_close(copied.detach()(IMAGES), plain)
    assert not torch.equal(network(IMAGES), plain)


def test_a_checkpoint_loads_after_attaching():
    state = resnet18().state_dict()
    network = torchvision.models.resnet18().eval()
    attached = attach(network, **PAPER)
    network.load_state_dict(state)
    assert set(attached.state_dict()) == {f"model.{key}" for key in state}


def test_the_modes_of_the_network_are_kept():
    network = resnet18().train()
    network.layer1.eval()
    with pytest.warns(UserWarning, match="training mode"):
        attached = attach(network, relup="layer2")
    assert (attached.training, network.training, network.layer1.training) == (True, True, False)
    assert not relu_plus_layers(network.layer1) + relu_plus_layers(network.layer3)


def test_half_precision_networks_are_pooled_in_float32():
    network = nn.Conv2d(3, 8, 3).to(torch.bfloat16)
    found = attach(network, projection=nn.Linear(8, 4).to(torch.bfloat16))(IMAGES.to(torch.bfloat16))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))


def test_descriptors_have_gradients():
    network = nn.Conv2d(3, 8, 3)
    attach(network)(IMAGES).sum().backward()
    assert network.weight.grad.abs().sum() > 0


class Infinite(nn.Module):
    def forward(self, x):
        return x.mean(dim=(2, 3)) + float("inf")


class ChannelsLast(nn.Module):
    num_features = 3

    def forward_features(self, x):
        return x.permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("model", "arguments", "noun"),
    [
        ("resnet18", {}, "str"),
        (torchvision.models.ResNet, {}, "the class ResNet"),
        (resnet18, {"pooling": None}, "pooling"),
        (resnet18, {"rgem": True}, "rgem"),
        (resnet18, {"relup": None}, "relup"),
        (resnet18, {"features": "layer9"}, "it has conv1, bn1"),
        (resnet18, {"projection": (torch.rand(4, 8), torch.rand(4))}, "whitening"),
        (resnet18, {"relup": "layer9"}, "it has conv1"),
        (resnet18, {"relup": "bn1"}, "no ReLU"),
        (resnet18, {"relup_ends": "layer1.0"}, r"layer1\.0\.conv1"),
        (resnet18, {"relup": "layer1", "relup_threshold": -1}, "threshold"),
        (nn.Sequential(nn.GELU()), {"relup": "0"}, "GELU"),
        (nn.Sequential(ReLUPlus()), {"relup": "0"}, r"detach\(\)"),
        *((resnet18, {"scales": scales}, "scales") for scales in (3, (), (1, 0))),
    ],
)
def test_arguments_that_do_not_fit_are_rejected(model, arguments, noun):
    with pytest.raises(ValueError, match=noun):
        attach(model() if model is resnet18 else model, **arguments)


@pytest.mark.parametrize(
    ("model", "arguments", "images", "noun"),
    [
        (resnet18, {"projection": torch.rand(4, 8)}, IMAGES, "projection"),
        (resnet18, {}, IMAGES[0], r"\(3, 96, 128\)"),
        (resnet18, {}, (IMAGES * 255).byte(), "uint8"),
        (resnet18, {}, IMAGES * float("nan"), "NaN: 73728"),
        (nn.Flatten, {}, IMAGES, "not a feature map"),
        (ChannelsLast, {}, IMAGES, r"\(N, H, W, C\)"),
        (lambda: lambda x: [x], {}, IMAGES, "list"),
        (resnet18, {"pooling": nn.Identity()}, IMAGES, "the pooling"),
        (resnet18, {"pooling": Infinite()}, IMAGES, "not finite|NaN"),
    ],
)
def test_a_network_or_images_that_do_not_fit_are_rejected(model, arguments, images, noun):
    attached = attach(model(), **arguments)
    with pytest.raises(ValueError, match=noun):
        attached(images)


def test_an_invalid_name_changes_nothing():
    network = resnet18()
    with pytest.raises(ValueError, match="layer9"):
        attach(network, relup=("layer1", "layer9"))
    assert not relu_plus_layers(network)


def test_a_block_that_does_not_end_in_a_relu_is_rejected():
    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.conv = nn.ReLU(), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return x - 1 + 0 * self.conv(self.relu(x))

    attached = attach(nn.Sequential(nn.Sequential(PreActivation())), relup_ends="0")
    with pytest.raises(ValueError, match=r"0\.0 \(PreActivation\)"):
        attached(IMAGES)
