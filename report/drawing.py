"""The drawings of the pages: curves, thumbnails and match maps, mostly as data URIs that are embedded in a page."""

import base64
import io
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from matplotlib import cycler, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw

from extraction.images import ImageFile, read_image
from modules.matching import Match
from revisitop.evaluate import Metrics
from revisitop.measures import RECALL_LEVELS


def _style(ink: str, grid: str, *lines: str) -> dict[str, Any]:
    """Returns the settings of matplotlib for a plot with these colours; the first line is grey."""
    return {
        "figure.figsize": (4, 3), "figure.constrained_layout.use": True, "savefig.transparent": True,
        "axes.titlelocation": "left", "axes.titlesize": 11, "axes.titleweight": "bold", "axes.labelsize": 9,
        "axes.prop_cycle": cycler(color=("#8b949e", *lines)), "lines.linewidth": 1.8, "grid.linewidth": 0.8,
        "xtick.labelsize": 9, "ytick.labelsize": 9, "xtick.major.size": 0, "ytick.major.size": 0,
        "legend.frameon": False, "legend.fontsize": 9,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink), "grid.color": grid,
    }  # fmt: skip


_STYLES = {
    "light": _style("#2a2f35", "#dfe3e8", "#0b62c4", "#b3541e", "#1b7f5c", "#7a4fbf", "#9a6700", "#c2348a"),
    "dark": _style("#d5d9de", "#3a4149", "#5aa7f7", "#f0a35e", "#6cc7a1", "#b89cf5", "#d9d05a", "#f27fc0"),
}
_RED = "#e5484d"
_MAP_SIDE = 192  # pixels of a match map on a page, whose positions are some tens
# The colours of match maps, with their opacity: from what speaks most against the match to what speaks most for it.
_MAP_COLOURS = {-1.0: (0, 70, 255, 0.85), 0.0: (255, 225, 60, 0.0), 0.5: (255, 150, 0, 0.65), 1.0: (215, 0, 30, 0.85)}


def draw_curves(metrics: dict[str, dict[str, Metrics]]) -> list[dict[str, str]]:
    """Draws interpolated precision over recall, one plot per protocol that has metrics, as data URIs of SVG.

    Each plot is a dict with alt, light and dark; the last two are drawn for a light and a dark background.
    """
    plots = []
    for protocol in [each.protocol for each in next(iter(metrics.values()), {}).values()]:
        measure, results = protocol.measure.title, {stage: of[protocol.name] for stage, of in metrics.items()}
        results = {stage: result for stage, result in results.items() if not math.isnan(result.map)}
        if results:
            maps = ", ".join(f"{stage} {measure} {100 * result.map:.2f}" for stage, result in results.items())
            alt = f"Precision over recall, {protocol.title}: {maps}"
            plots.append(_plot(alt, protocol.title, partial(_draw_curve, results)))
    return plots


def _draw_curve(results: dict[str, Metrics], axes: Axes) -> None:
    recall = np.linspace(0, 100, RECALL_LEVELS)
    for stage, result in results.items():
        label = f"{stage}, {result.protocol.measure.title} {100 * result.map:.2f}"
        style = (0, (4, 1.5)) if stage == "retrieval" else "-"
        axes.plot(recall, 100 * result.precision, label=label, linestyle=style, clip_on=False)
    axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="recall in percent", ylabel="precision in percent")
    axes.legend(loc="best")
    axes.grid()


def draw_heat_map(
    values: Sequence[Sequence[float]],
    down: tuple[str, Sequence[Any]],
    across: tuple[str, Sequence[Any]],
    best: tuple[Any, Any],
) -> dict[str, str]:
    """Draws a metric in percent for each pair of values of two options, as a plot like those of draw_curves.

    Args:
        values: a row per value of `down`; NaN for missing values.
        down, across: the options and their values.
        best: the pair that is framed.
    """
    table = np.array(values, dtype=float)
    middle = (np.nanmin(table) + np.nanmax(table)) / 2

    def draw(axes: Axes) -> None:
        axes.imshow(table, cmap="cividis", aspect="auto")
        for (row, column), value in np.ndenumerate(table):
            if not math.isnan(value):
                colour = "white" if value < middle else "black"
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8, color=colour)
        place = (across[1].index(best[1]) - 0.5, down[1].index(best[0]) - 0.5)
        axes.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor=_RED, linewidth=2.5))
        axes.set(xlabel=across[0], ylabel=down[0])
        axes.set_xticks(range(len(across[1])), map(str, across[1]))
        axes.set_yticks(range(len(down[1])), map(str, down[1]))

    alt = f"Heat map of {down[0]} and {across[0]}; chosen are {best[0]} and {best[1]}"
    return _plot(alt, f"{down[0]} and {across[0]}", draw)


def draw_lines(option: str, values: Sequence[Any], metrics: Sequence[float], best: Any) -> dict[str, str]:
    """Draws a metric in percent for each value of an option, with the best one marked; like draw_curves."""

    def draw(axes: Axes) -> None:
        place = list(values).index(best)
        axes.plot(metrics, color="C1", marker="o")
        axes.plot([place], [metrics[place]], color=_RED, marker="o", markersize=9)
        axes.set(xlabel=option, ylabel="metric in percent")
        axes.set_xticks(range(len(values)), map(str, values))
        axes.grid()

    listed = ", ".join(f"{value}: {metric:.2f}" for value, metric in zip(values, metrics, strict=True))
    return _plot(f"Metric by {option}: {listed}", option, draw)


def _plot(alt: str, title: str, draw: Callable[[Axes], None]) -> dict[str, str]:
    """Returns what a function draws on axes, for a light and a dark background, in the size used in the page."""
    plot = {"alt": alt}
    for name, style in _STYLES.items():
        with rc_context(style):
            figure, content = Figure(), io.BytesIO()
            axes = figure.subplots()
            axes.set_title(title)
            draw(axes)
            axes.spines[:].set_visible(False)
            figure.savefig(content, format="svg", metadata={"Date": None})
        plot[name] = _data_uri("image/svg+xml", content.getvalue())
    return plot


class MatchDrawing(NamedTuple):
    """Two images and the maps of where they match, in the colours of one scale, as data URIs.

    Attributes:
        cosine: the cosine of the two.
        images, overlays: both images, and what is laid over them.
        legend: the colours of the scale from `low` to `high`, each what a hundredth of an image adds to the cosine.
    """

    cosine: float
    images: list[str]
    overlays: list[str]
    legend: str
    low: float
    high: float


def draw_match(match: Match, images: Sequence[np.ndarray], side: int = 400) -> MatchDrawing:
    """Draws where two images match, for a page.

    Args:
        images: their pixels, (H, W, 3) uint8 RGB.
        side: the longest side of the drawn images.
    """
    densities, low, high = _densities(match)
    drawn, overlays = [], []
    for pixels, density in zip(images, densities, strict=True):
        drawn.append(jpeg_uri(Image.fromarray(pixels), side, 80))
        height, width = pixels.shape[:2]
        factor = _MAP_SIDE / max(height, width)
        overlays.append(_png_uri(_overlay(density, (round(width * factor), round(height * factor)), low, high)))
    legend = _png_uri(_overlay(np.linspace(low, high, 128)[None], (128, 1), low, high))
    return MatchDrawing(match.cosine, drawn, overlays, legend, low, high)


def save_match(match: Match, images: Sequence[np.ndarray], file: BinaryIO) -> None:
    """Draws two images A and B side by side with the maps of where they match, and their scale, into a PNG file."""
    densities, low, high = _densities(match)
    widths = [pixels.shape[1] / pixels.shape[0] for pixels in images]
    with rc_context({**_STYLES["light"], "figure.figsize": (4.2 * sum(widths), 5), "savefig.transparent": False}):
        figure = Figure()
        grid = figure.add_gridspec(2, 2, width_ratios=widths, height_ratios=(1, 0.04))
        for place, (pixels, density) in enumerate(zip(images, densities, strict=True)):
            axes = figure.add_subplot(grid[0, place], title="AB"[place])
            axes.imshow(pixels)
            axes.imshow(_overlay(density, pixels.shape[1::-1], low, high))
            axes.set_axis_off()
        scale = figure.add_subplot(grid[1, :])
        legend = _overlay(np.linspace(low, high, 256)[None], (256, 1), low, high)
        scale.imshow(legend, extent=(low, high, 0, 1), aspect="auto")
        scale.set(yticks=[], xlabel=f"what a hundredth of an image adds to the cosine of {match.cosine:.4f}")
        scale.spines[:].set_visible(False)
        figure.savefig(file, format="png", dpi=150, bbox_inches="tight", pad_inches=0.2)


def _densities(match: Match) -> tuple[list[np.ndarray], float, float]:
    """Returns what a hundredth of each image adds at each position, and the lowest (at most 0) and highest value."""
    densities = [positions.cpu().numpy() * positions.numel() / 100 for positions in match.maps]
    return densities, min(0.0, *(float(each.min()) for each in densities)), max(float(each.max()) for each in densities)


def _overlay(density: np.ndarray, size: tuple[int, int], low: float, high: float) -> Image.Image:
    """Returns values as transparent colours, in an image of this (width, height)."""
    values = np.asarray(Image.fromarray(density.astype(np.float32)).resize(size, Image.Resampling.BICUBIC))
    strength = values / max(high, -low, 1e-12)
    channels = zip(*_MAP_COLOURS.values(), strict=True)
    red, green, blue, opacity = (np.interp(strength, [*_MAP_COLOURS], channel) for channel in channels)
    return Image.fromarray(np.stack([red, green, blue, 255 * opacity], axis=-1).round().astype(np.uint8), "RGBA")


def read_thumbnail(image: ImageFile, side: int) -> Image.Image:
    """Returns the whole image, with no side longer than `side`, and its box drawn on it if there is one.

    Raises:
        ImageError: if it cannot be read.
    """
    thumbnail = Image.fromarray(read_image(image.path))
    width, height = thumbnail.size
    thumbnail.thumbnail((side, side))
    if image.box is not None:  # as a light line between dark ones
        ends = zip((thumbnail.width, thumbnail.height), (width, height), (image.box[::2], image.box[1::2]), strict=True)
        (x0, x1), (y0, y1) = ([min(max(x * new / old, 0), new - 1) for x in sorted(box)] for new, old, box in ends)
        pen = ImageDraw.Draw(thumbnail)
        pen.rectangle((x0, y0, x1, y1), outline=(20, 20, 20), width=5)
        if min(x1 - x0, y1 - y0) > 2:
            pen.rectangle((x0 + 1, y0 + 1, x1 - 1, y1 - 1), outline=(255, 210, 40), width=3)
    return thumbnail


def jpeg_uri(thumbnail: Image.Image, side: int, quality: int) -> str:
    """Returns the image as a data URI of JPEG, with no side longer than `side`."""
    small, content = thumbnail.copy(), io.BytesIO()
    small.thumbnail((side, side))
    small.save(content, "JPEG", quality=quality, optimize=True)
    return _data_uri("image/jpeg", content.getvalue())


def _png_uri(image: Image.Image) -> str:
    image.save(content := io.BytesIO(), "PNG")
    return _data_uri("image/png", content.getvalue())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
