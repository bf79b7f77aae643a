"""SuperGlobal's modules on networks that are built like those of DELG-pytorch and cirtorch.

pip install .
python examples/delg_cirtorch.py

The two classes stand for your own networks: only the names of their parts matter.
"""

from itertools import pairwise

import torch
from superglobal import attach
from torch import Tensor, nn


class Block(nn.Module):
    """relu(shortcut + f(x)), as in the ResNets of DELG-pytorch and CVNet."""

    def __init__(self, w_in: int, w_out: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(w_in, w_out, 1, stride)
        self.f = nn.Sequential(nn.Conv2d(w_in, w_out, 3, stride, 1), nn.ReLU(), nn.Conv2d(w_out, w_out, 3, 1, 1))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.proj(x) + self.f(x))


class Delg(nn.Module):
    """DELG-pytorch: `globalmodel` with a stem, four stages and a head; forward returns more than a descriptor."""

    def __init__(self):
        super().__init__()
        widths = (16, 32, 48, 64, 96)
        self.globalmodel = nn.Module()
        self.globalmodel.stem = nn.Conv2d(3, widths[0], 7, 4, 3)
        for number, (w_in, w_out) in enumerate(pairwise(widths), start=1):
            stage = nn.Sequential(Block(w_in, w_out, 1 if number == 1 else 2), Block(w_out, w_out, 1))
            self.globalmodel.add_module(f"s{number}", stage)
        self.globalmodel.head = nn.Module()
        self.globalmodel.head.fc = nn.Linear(widths[-1], 32)


class ImageRetrievalNet(nn.Module):
    """cirtorch: `features`, then `pool`, `norm` and `whiten`; forward returns a descriptor as a column."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 16, 7, 4), nn.ReLU(), nn.Conv2d(16, 48, 3, 2), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)  # GeM there
        self.whiten = nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        rows = nn.functional.normalize(self.pool(self.features(x)).flatten(1))
        return nn.functional.normalize(self.whiten(rows)).T


def main() -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 3, 192, 256)

    delg = attach(
        Delg().eval(),
        features=[f"globalmodel.{part}" for part in ("stem", "s1", "s2", "s3", "s4")],
        projection="globalmodel.head.fc",
        relup="globalmodel.s1",
        relup_ends=("globalmodel.s2", "globalmodel.s3"),
    )
    network = ImageRetrievalNet().eval()
    cirtorch = attach(network, features="features", projection=network.whiten)
    # Whitening that was learnt separately, cirtorch's {"P": (D, C), "m": (C, 1)}
    learnt = {"P": torch.randn(24, 48), "m": torch.rand(48, 1)}
    whitened = attach(network, features="features", projection=(learnt["P"], learnt["m"]))

    with torch.inference_mode():
        for name, extract in (("DELG-pytorch", delg), ("cirtorch", cirtorch), ("cirtorch, whitened", whitened)):
            print(f"{name}: {tuple(extract(images).shape)}\n{extract}\n")


if __name__ == "__main__":
    main()
