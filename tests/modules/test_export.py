"""The modules in other runtimes: torch.export, and ONNX with images of any size."""

import pytest
import torch
from torch import nn

from modules import Whitening, attach

pytestmark = pytest.mark.slow  # exports to ONNX

ANY = torch.export.Dim.DYNAMIC
SIZES = [(96, 128), (200, 131), (90, 290)]  # on the feature maps of the last, reflection is undefined


@pytest.fixture(scope="module")
def exported() -> tuple[nn.Module, torch.export.ExportedProgram]:
    """A ResNet with all modules, two scales and a projection, and its program."""
    import torchvision

    torch.manual_seed(0)
    network = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]).eval()
    where = {"relup": "layer1", "relup_ends": ("layer2", "layer3")}
    model = attach(network, projection="fc", scales=(0.7071, 1.0), **where).requires_grad_(False)
    return model, torch.export.export(model, (torch.rand(2, 3, 96, 160),), dynamic_shapes=({0: ANY, 2: ANY, 3: ANY},))


def test_torch_export_takes_images_of_any_size(exported):
    model, program = exported
    for size in SIZES:
        x = torch.rand(1, 3, *size)
        torch.testing.assert_close(program.module()(x), model(x), atol=1e-5, rtol=0)


def test_onnx_runtime_agrees_for_images_of_any_size(exported, tmp_path):
    model, program = exported
    path = tmp_path / "model.onnx"
    torch.onnx.export(program, (), path, dynamo=True, verbose=False)
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for size in [*SIZES, (1, 40)]:  # the module of torch.export does not support maps with a side of 1
        x = torch.rand(1, 3, *size)
        (out,) = session.run(None, {name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), model(x), atol=1e-4, rtol=0)


def test_a_whitening_takes_batches_of_any_size(tmp_path):
    random = torch.Generator().manual_seed(0)
    projection = torch.randn(4, 12, generator=random, dtype=torch.float64)
    whitening, x = Whitening(projection.mean(dim=0), projection), torch.randn(3, 12, generator=random)
    program = torch.export.export(whitening, (x,), dynamic_shapes=({0: ANY},))
    torch.onnx.export(program, (), tmp_path / "whitening.onnx", dynamo=True, verbose=False)
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(tmp_path / "whitening.onnx", providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x[:2].numpy()})
    torch.testing.assert_close(program.module()(x[:2]), whitening(x[:2]))
    torch.testing.assert_close(torch.from_numpy(out), whitening(x[:2]), atol=1e-6, rtol=0)
