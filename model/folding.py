"""The encoder for fast inference: batch norms and rectifiers are folded into the convolutions before them.

The result is the same within rounding, with fewer passes over the memory:

- a convolution and its batch norm become one convolution (folded in float64);
- shortcut and rectifier are applied in the same pass if the device has such a kernel (oneDNN on CPUs,
  cuDNN on GPUs), and in place otherwise;
- oneDNN's kernel with a shortcut supports only max(x, 0). The output of a block with ReLU+, max(x, t), is
  stored as z = max(x - t, 0) = max(x, t) - t; the biases of the 1x1 convolutions that read it compensate for t.
- cuDNN's kernels support no other rectifier at all, and a bias without one takes a separate pass: on a GPU,
  ReLU+ is stored this way wherever a 1x1 convolution reads it, and the convolution to which a projected
  shortcut is added includes the bias of the shortcut.
"""

import logging
from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backbone import PRECISIONS, dtype_of
from model.cvnet import Block, ResNet
from model.device import is_out_of_memory
from modules.activation import ReLUPlus

log = logging.getLogger(__name__)


def has_fused_kernels(dtype: torch.dtype) -> bool:
    """Returns whether oneDNN's convolutions are available on this CPU for the dtype."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return False  # the operator is internal to PyTorch's compiler and may be removed
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return True


def has_fused_gpu_kernels() -> bool:
    """Returns whether PyTorch has cuDNN's convolutions with bias, shortcut and ReLU in one pass."""
    names = ("cudnn_convolution_relu", "cudnn_convolution_add_relu")
    return torch.version.cuda is not None and all(hasattr(torch, name) for name in names)


class FoldedConv(nn.Module):
    """Computes max(conv(x) [+ shortcut], floor), with the batch norm folded in. (N, C, H, W) -> (N, C', H', W').

    Args:
        conv, bn: the two layers.
        floor: the lower bound of the rectifier; None for no rectifier.
        shift_in: constant by which the input was reduced; only for 1x1 convolutions.
        shift_out: constant by which the output is reduced, before the rectifier.
        dtype: the dtype of weights, input and output.
    """

    weight: Tensor
    bias: Tensor
    gpu_bias: Tensor | None

    def __init__(
        self,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d,
        floor: float | None,
        shift_in: float = 0.0,
        shift_out: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if bn.running_mean is None or bn.running_var is None:
            raise ValueError("a batch norm without running statistics cannot be folded")
        scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
        weight = conv.weight.double() * scale[:, None, None, None]
        bias = bn.bias.double() - bn.running_mean.double() * scale
        self.sums = weight.sum(dim=(1, 2, 3))
        bias += shift_in * self.sums - shift_out
        self.exact_bias = bias  # float64
        self.register_buffer("weight", weight.to(dtype).contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", bias.to(dtype))
        self.register_buffer("gpu_bias", None)
        self.on_gpu(bias, floor)
        self.stride, self.padding, self.floor = conv.stride, cast("tuple[int, int]", conv.padding), floor
        self.rectifier: tuple[str, list[float]] = ("none", [])  # names as in oneDNN
        if floor is not None:
            self.rectifier = ("hardtanh", [floor, torch.finfo(torch.float32).max]) if floor else ("relu", [])
        self.fused = has_fused_kernels(dtype)

    def on_gpu(self, bias: Tensor | None, floor: float | None) -> None:
        """Sets the bias (float64) and the floor that are used on a GPU instead of the others; None for none."""
        self.gpu_floor = floor
        self.gpu_bias = None if bias is None else bias.to(self.weight.dtype)
        self.fused_on_gpu = floor == 0 and has_fused_gpu_kernels()

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Applies the convolution; the shortcut, if there is one, is overwritten."""
        if self.fused and x.device.type == "cpu" and (shortcut is None or self.floor in (None, 0)):
            return self._fused(x, shortcut)
        on_gpu = x.device.type == "cuda"
        if on_gpu and self.fused_on_gpu:
            try:
                return self._fused_by_cudnn(x, shortcut)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                log.debug("%r: no fused kernel (%s)", self, error)
                self.fused_on_gpu = False  # there is no such kernel for this dtype on this GPU
        bias, floor = (self.gpu_bias, self.gpu_floor) if on_gpu else (self.bias, self.floor)
        x = F.conv2d(x, self.weight, bias, self.stride, self.padding)
        if shortcut is not None:
            x += shortcut
        return x if floor is None else x.clamp_(min=floor)

    def _fused(self, x: Tensor, shortcut: Tensor | None) -> Tensor:
        geometry = (self.padding, self.stride, (1, 1), 1)  # dilation 1, one group
        if shortcut is None:
            return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *geometry, *self.rectifier, "")
        add = torch.ops.mkldnn._convolution_pointwise_.binary
        rectifier = None if self.floor is None else "relu"
        return add(shortcut, x, self.weight, self.bias, *geometry, "add", 1.0, rectifier, [], None)

    def _fused_by_cudnn(self, x: Tensor, shortcut: Tensor | None) -> Tensor:
        geometry = (self.stride, self.padding, (1, 1), 1)  # dilation 1, one group
        if shortcut is None:
            return torch.cudnn_convolution_relu(x, self.weight, self.gpu_bias, *geometry)
        return torch.cudnn_convolution_add_relu(x, self.weight, shortcut, 1.0, self.gpu_bias, *geometry)

    def extra_repr(self) -> str:
        out_channels, in_channels, side, _ = self.weight.shape
        return f"{in_channels}, {out_channels}, {side}x{side}, stride={self.stride[0]}, floor={self.floor}"


class FoldedBlock(nn.Module):
    """Computes max(shortcut + f(x), 0), see resnet.Block; `last` None omits the rectifier. May overwrite its input."""

    def __init__(
        self,
        block: Block,
        inner: float,
        shift_in: float,
        shift_out: float,
        dtype: torch.dtype,
        last: float | None = 0.0,
    ):
        super().__init__()
        f = block.f
        self.proj: FoldedConv | None = None
        if block.proj is not None and block.bn is not None:
            self.proj = FoldedConv(block.proj, block.bn, None, shift_in, dtype=dtype)
        shortcut_shift = shift_in if self.proj is None else 0.0
        self.a = FoldedConv(f.a, f.a_bn, inner, shift_in, dtype=dtype)
        self.b = FoldedConv(f.b, f.b_bn, inner, dtype=dtype)
        self.c = FoldedConv(f.c, f.c_bn, last, shift_out=shift_out - shortcut_shift, dtype=dtype)
        bias = self.c.exact_bias + inner * self.c.sums
        if self.proj is not None:
            bias = bias + self.proj.exact_bias
            self.proj.on_gpu(None, None)
        self.b.on_gpu(self.b.exact_bias - inner, 0.0)
        self.c.on_gpu(bias, last)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.proj is None else self.proj(x)
        return self.c(self.b(self.a(x)), shortcut)


class FoldedResNet(nn.Module):
    """A ResNet for inference only, in a given precision. (N, 3, H, W) -> (N, 2048, ~H/32, ~W/32) float32.

    Args:
        encoder: the network with its trained weights and its ReLU+, which is not modified.
        precision: precision of weights and activations, fp32, bf16 or fp16. The feature map is returned in
            float32, because powers such as 4.6 overflow half precision.
        stop_in: the stage to stop in, before the last rectifier of its last block: the result is then the
            feature map of that stage, (N, 1024, ~H/16, ~W/16) for stage 3, and there is no head. None runs
            all stages.
    """

    def __init__(self, encoder: ResNet, precision: str = "fp32", stop_in: int | None = None):
        super().__init__()
        self.depth, self.precision = encoder.depth, precision
        dtype = dtype_of(precision)
        self.stem = FoldedConv(encoder.stem.conv, encoder.stem.bn, 0.0, dtype=dtype)
        blocks, shift = [], 0.0
        stages = (encoder.s1, encoder.s2, encoder.s3, encoder.s4)[:stop_in]
        for number, stage in enumerate(stages, start=1):
            for block in cast("Iterable[Block]", stage):
                stops = number == stop_in and block is stage[-1]
                shift_out = 0.0 if stops else _threshold(block.relu)
                blocks.append(
                    FoldedBlock(block, _threshold(block.f.relu), shift, shift_out, dtype, None if stops else 0.0)
                )
                shift = shift_out
        self.blocks = nn.Sequential(*blocks)
        self.head = encoder.head if stop_in is None else None
        self.set_memory_format(torch.channels_last)

    def set_memory_format(self, memory_format: torch.memory_format) -> None:
        """Sets the layout of weights and activations: channels_last (the default) or contiguous_format."""
        self.memory_format = memory_format
        self.to(memory_format=memory_format)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(PRECISIONS[self.precision]).contiguous(memory_format=self.memory_format)
        x = F.max_pool2d(self.stem(x), 3, stride=2, padding=1)
        return self.blocks(x).float()

    def extra_repr(self) -> str:
        return f"depth={self.depth}, precision={self.precision!r}"


def _threshold(rectifier: nn.Module) -> float:
    return rectifier.threshold if isinstance(rectifier, ReLUPlus) else 0.0
