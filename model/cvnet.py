"""CVNet's ResNet-50 and ResNet-101 as a backbone, with the parameter names of the published checkpoints.

A bottleneck ResNet (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016) with the
stride on the 3x3 convolution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backbone import Backbone

STAGE_DEPTHS: dict[int, tuple[int, ...]] = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
FEATURE_DIM = 2048

# B, G, R order, as the network was trained.
MEAN_BGR, STD_BGR = (0.406, 0.456, 0.485), (0.225, 0.224, 0.229)


class Stem(nn.Module):
    """7x7/2 convolution, batch norm, ReLU, max-pool 3x3/2. (N, 3, H, W) -> (N, 64, ~H/4, ~W/4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(64, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.bn(self.conv(x))), 3, stride=2, padding=1)


class Bottleneck(nn.Module):
    """The residual function f of a block: convolutions 1x1, 3x3 (with the stride) and 1x1."""

    def __init__(self, w_in: int, w_mid: int, w_out: int, stride: int):
        super().__init__()
        self.a = nn.Conv2d(w_in, w_mid, 1, bias=False)
        self.a_bn = nn.BatchNorm2d(w_mid, eps=1e-5)
        self.b = nn.Conv2d(w_mid, w_mid, 3, stride=stride, padding=1, bias=False)
        self.b_bn = nn.BatchNorm2d(w_mid, eps=1e-5)
        self.c = nn.Conv2d(w_mid, w_out, 1, bias=False)
        self.c_bn = nn.BatchNorm2d(w_out, eps=1e-5)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.a_bn(self.a(x)))
        x = self.relu(self.b_bn(self.b(x)))
        return self.c_bn(self.c(x))


class Block(nn.Module):
    """relu(shortcut + f(x)); the first block of a stage projects its shortcut."""

    def __init__(self, w_in: int, w_mid: int, w_out: int, stride: int, project: bool):
        super().__init__()
        self.proj = nn.Conv2d(w_in, w_out, 1, stride=stride, bias=False) if project else None
        self.bn = nn.BatchNorm2d(w_out, eps=1e-5) if project else None
        self.f = Bottleneck(w_in, w_mid, w_out, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.proj is None or self.bn is None else self.bn(self.proj(x))
        return self.relu(shortcut + self.f(x))


class Head(nn.Module):
    """The trained GeM power and projection of the checkpoint (2048 -> reduction_dim)."""

    def __init__(self, reduction_dim: int):
        super().__init__()
        self.pool = nn.ParameterDict({"p": nn.Parameter(torch.tensor([3.0]))})
        self.fc = nn.Linear(FEATURE_DIM, reduction_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class ResNet(nn.Module):
    """Returns the stage-4 feature map. (N, 3, H, W) -> (N, 2048, ~H/32, ~W/32). `head` projects pooled vectors.

    Args:
        depth: 50 or 101.
        reduction_dim: dimensions D of the descriptor.
    """

    s1: nn.Sequential
    s2: nn.Sequential
    s3: nn.Sequential
    s4: nn.Sequential

    def __init__(self, depth: int, reduction_dim: int = 2048):
        super().__init__()
        if depth not in STAGE_DEPTHS:
            raise ValueError(f"depth must be one of {tuple(STAGE_DEPTHS)}, got {depth}")
        self.depth = depth
        self.stem = Stem()
        w_in = 64
        for stage, blocks in enumerate(STAGE_DEPTHS[depth], start=1):
            w_mid, w_out = 64 * 2 ** (stage - 1), 256 * 2 ** (stage - 1)
            layers = nn.Sequential()
            for block in range(1, blocks + 1):
                stride = 2 if block == 1 and stage > 1 else 1
                layers.add_module(f"b{block}", Block(w_in, w_mid, w_out, stride, block == 1))
                w_in = w_out
            self.add_module(f"s{stage}", layers)
        self.head = Head(reduction_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.s4(self.s3(self.s2(self.s1(self.stem(x)))))

    def extra_repr(self) -> str:
        return f"depth={self.depth}"


def cvnet_backbone(network: ResNet) -> Backbone:
    """Returns CVNet's network with what it needs of images, its trained GeM power and projection.

    ReLU+ goes inside the bottlenecks of stage 1, and to the end of every block of stages 1, 2 and 3.
    """
    ends = [f"s{stage}.{name}.relu" for stage in (2, 3) for name, _ in getattr(network, f"s{stage}").named_children()]
    return Backbone(
        network, (), MEAN_BGR, STD_BGR, "BGR", smallest=1, projection="head.fc",
        gem_p=network.head.pool["p"].item(), relup_stages=("s1", *ends), relup_ends=(),
    )  # fmt: skip
