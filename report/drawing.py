"""The drawings of the report, curves and thumbnails, as data URIs that are embedded in the page."""

import base64
import io
import math
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw

from extraction.images import Box, ImageFile, read_image
from revisitop.evaluate import Metrics
from revisitop.measures import RECALL_LEVELS


def draw_curves(metrics: dict[str, dict[str, Metrics]]) -> list[dict[str, str]]:
    """Draws interpolated precision over recall, one plot per protocol that has metrics, as data URIs of SVG.

    Each plot is a dict with alt, light and dark; the last two are drawn for a light and a dark background.
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
    figure, axes, ink = _axes(dark, title)
    colours = ("#8b949e", *(("#5aa7f7", "#f0a35e", "#6cc7a1") if dark else ("#0b62c4", "#b3541e", "#1b7f5c")))
    for (stage, result), colour in zip(results.items(), cycle(colours), strict=False):
        recall = np.linspace(0, 100, RECALL_LEVELS)
        label = f"{stage}, {result.protocol.measure.title} {100 * result.map:.2f}"
        style = (0, (4, 1.5)) if stage == "retrieval" else "-"
        axes.plot(
            recall, 100 * result.precision, label=label, color=colour, linestyle=style, linewidth=1.8, clip_on=False
        )
    axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="recall in percent", ylabel="precision in percent")
    axes.legend(loc="best", frameon=False, labelcolor=ink, fontsize=9)
    axes.grid(color="#3a4149" if dark else "#dfe3e8", linewidth=0.8)
    return _finished(figure, axes, ink)


def draw_heat_map(
    values: Sequence[Sequence[float]],
    down: tuple[str, Sequence[Any]],
    across: tuple[str, Sequence[Any]],
    chosen: tuple[Any, Any],
) -> dict[str, str]:
    """Draws a metric in percent for each pair of values of two options, as a plot like those of draw_curves.

    Args:
        values: a row per value of `down`; NaN for missing values.
        down, across: the options and their values.
        chosen: the pair that is framed.
    """

    def draw(dark: bool) -> str:
        figure, axes, ink = _axes(dark, f"{down[0]} and {across[0]}")
        table = np.array(values, dtype=float)
        axes.imshow(table, cmap="cividis", aspect="auto")
        middle = (np.nanmin(table) + np.nanmax(table)) / 2
        for (row, column), value in np.ndenumerate(table):
            if not math.isnan(value):
                colour = "white" if value < middle else "black"
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8, color=colour)
        place = (across[1].index(chosen[1]) - 0.5, down[1].index(chosen[0]) - 0.5)
        axes.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor="#e5484d", linewidth=2.5))
        axes.set(xlabel=across[0], ylabel=down[0])
        axes.set_xticks(range(len(across[1])), [f"{each}" for each in across[1]])
        axes.set_yticks(range(len(down[1])), [f"{each}" for each in down[1]])
        return _finished(figure, axes, ink)

    alt = f"Heat map of {down[0]} and {across[0]}; chosen are {chosen[0]} and {chosen[1]}"
    return {"alt": alt, "light": draw(False), "dark": draw(True)}


def draw_lines(option: str, values: Sequence[Any], metrics: Sequence[float], chosen: Any) -> dict[str, str]:
    """Draws a metric in percent for each value of an option, with the chosen one marked; like draw_curves."""

    def draw(dark: bool) -> str:
        figure, axes, ink = _axes(dark, option)
        places = range(len(values))
        axes.plot(places, metrics, color="#5aa7f7" if dark else "#0b62c4", marker="o", linewidth=1.8)
        best = list(values).index(chosen)
        axes.plot([best], [metrics[best]], color="#e5484d", marker="o", markersize=9)
        axes.set(xlabel=option, ylabel="metric in percent")
        axes.set_xticks(places, [f"{each}" for each in values])
        axes.grid(color="#3a4149" if dark else "#dfe3e8", linewidth=0.8)
        return _finished(figure, axes, ink)

    listed = ", ".join(f"{value}: {metric:.2f}" for value, metric in zip(values, metrics, strict=True))
    return {"alt": f"Metric by {option}: {listed}", "light": draw(False), "dark": draw(True)}


def _axes(dark: bool, title: str) -> tuple[Figure, Axes, str]:
    """Returns a figure of the size used in the page, with a title, its axes, and the colour of text and lines."""
    ink = "#d5d9de" if dark else "#2a2f35"
    figure = Figure(figsize=(4, 3), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", color=ink, fontsize=11, fontweight="bold")
    return figure, axes, ink


def _finished(figure: Figure, axes: Axes, ink: str) -> str:
    """Returns the figure as a data URI of SVG, with coloured axes and no frame."""
    axes.tick_params(colors=ink, labelsize=9, length=0)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=ink, fontsize=9)
    axes.spines[:].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    return _data_uri("image/svg+xml", content.getvalue())


def read_thumbnail(image: ImageFile, side: int) -> Image.Image:
    """Returns the whole image, with no side longer than `side`, and its box drawn on it if there is one.

    Raises:
        ImageError: if it cannot be read.
    """
    thumbnail = Image.fromarray(read_image(image.path))
    width, height = thumbnail.size
    thumbnail.thumbnail((side, side))
    if image.box is not None:
        _draw_box(thumbnail, image.box, thumbnail.width / width, thumbnail.height / height)
    return thumbnail


def jpeg_uri(thumbnail: Image.Image, side: int, quality: int) -> str:
    """Returns the image as a data URI of JPEG, with no side longer than `side`."""
    small, content = thumbnail.copy(), io.BytesIO()
    small.thumbnail((side, side))
    small.save(content, "JPEG", quality=quality, optimize=True)
    return _data_uri("image/jpeg", content.getvalue())


def _draw_box(thumbnail: Image.Image, box: Box, x_scale: float, y_scale: float) -> None:
    """Draws a box, given in pixels of the whole image, on its thumbnail: a light line between dark ones."""
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
