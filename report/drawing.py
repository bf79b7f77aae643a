"""What the report draws: curves and thumbnails, as data URIs that stand in the page itself."""

import base64
import io
import math
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from model.images import Box, ImageFile, read_image
from revisitop.evaluate import Metrics
from revisitop.measures import RECALL_LEVELS


def draw_curves(metrics: dict[str, dict[str, Metrics]]) -> list[dict[str, str]]:
    """Interpolated precision over recall, a plot per protocol that has metrics, as data URIs of SVG.

    Each plot is a dict: alt, light and dark, the last two with ink for such a ground.
    """
    plots = []
    for protocol in [each.protocol for each in next(iter(metrics.values()), {}).values()]:
        name, title = protocol.measure.title, protocol.title
        results = {stage: of[protocol.name] for stage, of in metrics.items() if not math.isnan(of[protocol.name].map)}
        if results:
            maps = ", ".join(f"{stage} {name} {100 * result.map:.2f}" for stage, result in results.items())
            plot = {"alt": f"Precision over recall, {title}: {maps}"}
            plots.append(plot | {name: _draw_curve(title, results, name == "dark") for name in ("light", "dark")})
    return plots


def _draw_curve(title: str, results: dict[str, Metrics], dark: bool) -> str:
    ink, faint = ("#d5d9de", "#3a4149") if dark else ("#2a2f35", "#dfe3e8")
    colours = ("#8b949e", *(("#5aa7f7", "#f0a35e", "#6cc7a1") if dark else ("#0b62c4", "#b3541e", "#1b7f5c")))
    figure = Figure(figsize=(4, 3), layout="constrained")
    axes = figure.subplots()
    for (stage, result), colour in zip(results.items(), cycle(colours), strict=False):
        recall = np.linspace(0, 100, RECALL_LEVELS)
        label = f"{stage}, {result.protocol.measure.title} {100 * result.map:.2f}"
        style = (0, (4, 1.5)) if stage == "retrieval" else "-"
        axes.plot(
            recall, 100 * result.precision, label=label, color=colour, linestyle=style, linewidth=1.8, clip_on=False
        )
    axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="recall in percent", ylabel="precision in percent")
    axes.set_title(title, loc="left", color=ink, fontsize=11, fontweight="bold")
    axes.legend(loc="best", frameon=False, labelcolor=ink, fontsize=9)
    axes.grid(color=faint, linewidth=0.8)
    axes.tick_params(colors=ink, labelsize=9, length=0)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=ink, fontsize=9)
    axes.spines[:].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    return _data_uri("image/svg+xml", content.getvalue())


def read_thumbnail(image: ImageFile, side: int) -> Image.Image:
    """The whole image, neither side longer than this, with the box drawn on it where there is one.

    Raises:
        ImageError: where it cannot be read.
    """
    thumbnail = Image.fromarray(read_image(image.path))
    width, height = thumbnail.size
    thumbnail.thumbnail((side, side))
    if image.box is not None:
        _draw_box(thumbnail, image.box, thumbnail.width / width, thumbnail.height / height)
    return thumbnail


def jpeg_uri(thumbnail: Image.Image, side: int, quality: int) -> str:
    """The image as JPEG, neither side longer than this, as a data URI."""
    small, content = thumbnail.copy(), io.BytesIO()
    small.thumbnail((side, side))
    small.save(content, "JPEG", quality=quality, optimize=True)
    return _data_uri("image/jpeg", content.getvalue())


def _draw_box(thumbnail: Image.Image, box: Box, x_scale: float, y_scale: float) -> None:
    """A box in coordinates of the whole image, drawn on its thumbnail: light, between dark lines."""
    right, bottom = thumbnail.width - 1, thumbnail.height - 1
    (x0, x1), (y0, y1) = sorted(box[::2]), sorted(box[1::2])
    x0, x1 = (min(max(x * x_scale, 0), right) for x in (x0, x1))
    y0, y1 = (min(max(y * y_scale, 0), bottom) for y in (y0, y1))
    pen = ImageDraw.Draw(thumbnail)
    pen.rectangle((x0, y0, x1, y1), outline=(20, 20, 20), width=5)
    if min(x1 - x0, y1 - y0) > 2:
        pen.rectangle((x0 + 1, y0 + 1, x1 - 1, y1 - 1), outline=(255, 210, 40), width=3)


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
