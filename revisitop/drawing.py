"""What the report draws: curves and thumbnails, as data URIs that stand in the page itself."""

import base64
import io
import math

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from model.images import Box, ImageFile, read_image
from revisitop.evaluate import RECALL_LEVELS, Result

PROTOCOL_NAMES = {"E": "Easy", "M": "Medium", "H": "Hard"}


def draw_curves(figures: dict[str, dict[str, Result]]) -> list[dict[str, str]]:
    """Interpolated precision over recall, a plot per protocol that has a figure, as data URIs of SVG.

    Each plot is a dict: alt, light and dark, the last two with ink for such a ground.
    """
    plots = []
    for protocol, title in PROTOCOL_NAMES.items():
        results = {stage: of[protocol] for stage, of in figures.items() if not math.isnan(of[protocol].map)}
        if results:
            maps = ", ".join(f"{stage} mAP {100 * result.map:.2f}" for stage, result in results.items())
            plot = {"alt": f"Precision over recall, {title}: {maps}"}
            plots.append(plot | {name: _draw_curve(title, results, name == "dark") for name in ("light", "dark")})
    return plots


def _draw_curve(title: str, results: dict[str, Result], dark: bool) -> str:
    ink, faint = ("#d5d9de", "#3a4149") if dark else ("#2a2f35", "#dfe3e8")
    styles = ({"color": "#8b949e", "linestyle": (0, (4, 1.5))}, {"color": "#5aa7f7" if dark else "#0b62c4"})
    figure = Figure(figsize=(4, 3), layout="constrained")
    axes = figure.subplots()
    for (stage, result), style in zip(results.items(), styles, strict=False):
        recall = np.linspace(0, 100, RECALL_LEVELS)
        label = f"{stage}, mAP {100 * result.map:.2f}"
        axes.plot(recall, 100 * result.precision, label=label, linewidth=1.8, clip_on=False, **style)
    axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="recall in percent", ylabel="precision in percent")
    axes.set_title(title, loc="left", color=ink, fontsize=11, fontweight="bold")
    axes.legend(loc="lower left", frameon=False, labelcolor=ink, fontsize=9)
    axes.grid(color=faint, linewidth=0.8)
    axes.tick_params(colors=ink, labelsize=9, length=0)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=ink, fontsize=9)
    axes.spines[:].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    return _data_uri("image/svg+xml", content.getvalue())


def read_thumbnail(image: ImageFile, side: int) -> Image.Image:
    """The whole picture, neither side longer than this, with the box drawn on it where there is one.

    Raises:
        ImageError: where it cannot be read.
    """
    picture = Image.fromarray(read_image(image.path))
    width, height = picture.size
    picture.thumbnail((side, side))
    if image.box is not None:
        _draw_box(picture, image.box, picture.width / width, picture.height / height)
    return picture


def jpeg_uri(picture: Image.Image, side: int, quality: int) -> str:
    """The picture as JPEG, neither side longer than this, as a data URI."""
    small, content = picture.copy(), io.BytesIO()
    small.thumbnail((side, side))
    small.save(content, "JPEG", quality=quality, optimize=True)
    return _data_uri("image/jpeg", content.getvalue())


def _draw_box(picture: Image.Image, box: Box, x_scale: float, y_scale: float) -> None:
    """A box in coordinates of the whole picture, drawn on its thumbnail: light, between dark lines."""
    right, bottom = picture.width - 1, picture.height - 1
    (x0, x1), (y0, y1) = sorted(box[::2]), sorted(box[1::2])
    x0, x1 = (min(max(x * x_scale, 0), right) for x in (x0, x1))
    y0, y1 = (min(max(y * y_scale, 0), bottom) for y in (y0, y1))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((x0, y0, x1, y1), outline=(20, 20, 20), width=5)
    if min(x1 - x0, y1 - y0) > 2:
        pen.rectangle((x0 + 1, y0 + 1, x1 - 1, y1 - 1), outline=(255, 210, 40), width=3)


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
