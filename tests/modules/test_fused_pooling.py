"""The kernel for GPUs, run by Triton's interpreter, and compiled for GPUs without having one."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from simulated import OnDevice, simulated_device
from torch import Tensor, nn

from modules.descriptor import SuperGlobal
from modules.pooling import GeMPlus, RegionalGeM

pytestmark = pytest.mark.slow  # starts Triton's compiler

triton = pytest.importorskip("triton", reason="Triton comes with PyTorch for NVIDIA's GPUs")

_CASES = """
import torch
from modules.fused_pooling import regional_gem_by_triton
from modules.pooling import GeM, GeMPlus, RegionalGeM

for shape, rgem, pooling in (
    ((2, 5, 4, 3), RegionalGeM(), GeMPlus()),
    ((1, 130, 3, 4), RegionalGeM(3.0, 3), GeM(2.0)),  # channels of two programs
    ((1, 3, 1, 4), RegionalGeM(), GeMPlus()),  # a side that reflection is not defined for
):
    for layout in (torch.channels_last, torch.contiguous_format):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).relu().contiguous(memory_format=layout)
        pooled = regional_gem_by_triton(x, rgem.p, rgem.window, pooling.p, pooling.eps)
        torch.testing.assert_close(pooled, pooling(rgem(x)), atol=1e-6, rtol=1e-5)
x[0, 1, 0, 2] = torch.nan
pooled = regional_gem_by_triton(x, 2.5, 5, 4.6, 1e-8)
assert pooled[0, 0].isfinite() and pooled[0, 1].isnan()
"""


def test_the_kernel_gives_the_result_of_both_modules():
    """Runs in a process of its own, because Triton selects its interpreter when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", _CASES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("capability", [75, 90])
def test_the_kernel_compiles_for_gpus(capability):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from modules.fused_pooling import _row_sums as kernel

    constants = {"PAD": 2, "REFLECTED": True, "CHANNELS": 128, "x_c": 1, "powers_c": 1}
    kinds = {"x": "*fp32", "powers": "*fp32", "sums": "*fp32", "region_root": "fp32", "p": "fp32", "floor": "fp32"}
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=places)
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


@pytest.fixture
def feature_map() -> Tensor:
    return torch.rand(2, 8, 4, 5)


def pooled_on_device(network: SuperGlobal, feature_map: Tensor) -> Tensor:
    with simulated_device(), torch.inference_mode():
        return network.pool(OnDevice(feature_map)).cpu()


def compiler_is_missing(*_):
    raise RuntimeError("Failed to find C compiler")


def test_if_the_kernel_does_not_compile_pooling_takes_two_passes(feature_map, monkeypatch):
    network = SuperGlobal(nn.Identity())
    expected = network.pooling(network.rgem(feature_map))
    assert torch.equal(pooled_on_device(network, feature_map), expected)
    assert network.fuses
    monkeypatch.setattr("modules.fused_pooling.regional_gem", compiler_is_missing)
    assert torch.equal(pooled_on_device(network, feature_map), expected)
    assert not network.fuses


@pytest.mark.parametrize(
    ("pooling", "rgem"), [(GeMPlus(12.0), RegionalGeM()), (GeMPlus(), None), (nn.AdaptiveAvgPool2d(1), RegionalGeM())]
)
def test_what_the_kernel_does_not_compute_is_left_to_the_modules(feature_map, monkeypatch, pooling, rgem):
    monkeypatch.setattr("modules.fused_pooling.regional_gem", compiler_is_missing)
    network = SuperGlobal(nn.Identity(), pooling=pooling, rgem=rgem)
    expected = pooling(feature_map if rgem is None else rgem(feature_map)).flatten(1)
    assert torch.equal(pooled_on_device(network, feature_map), expected)
    assert network.fuses  # it was not tried
