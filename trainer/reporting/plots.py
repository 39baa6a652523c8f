"""The figures of reports, drawn with matplotlib: PNG for files, SVG for pages in light and dark.

Texts and numbers are in the language of formatting.in_language.
Shapes: C classes, S pixels to a side.
"""

import collections
import contextlib
import io
import itertools
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from trainer.artifacts.metrics import (
    ClassificationMetrics,
    precision_recall_curve,
    reliability_bins,
    wilson_interval,
)
from trainer.formatting import decimal, general, localized, number, percent, shorten, translate

MAX_ANNOTATED_CLASSES = 30  # with more classes, a cell is too small for its numbers
_IMAGE_SIZE = 240  # pixels to a side of an image in the figure of mistakes
_MAX_CURVE_POINTS = 200
_MAX_CELLS = 250  # to a side of a confusion matrix

PAPER = "#ffffff"
INK = "#1f2328"
MUTED = "#66707a"
LINE = "#dfe3e8"
TRAINING = "#2b6cb0"
VALIDATION = "#c2531b"
# In a page each color becomes a CSS variable of page.css, so that a figure follows light and dark.
_CSS_VARIABLES = {
    PAPER: "--paper",
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    TRAINING: "--training",
    VALIDATION: "--validation",
}
_TITLE = {"x": 0.01, "ha": "left", "fontsize": 10.5, "fontweight": "bold"}
_CAPTION = {"fontsize": 7.5, "fontweight": "normal", "loc": "center", "y": 0, "va": "top", "pad": -4}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Sets matplotlib's rcParams to the style of the figures for the block."""
    import matplotlib
    from matplotlib import font_manager

    fallbacks = [
        "Noto Sans CJK JP",
        "Noto Sans CJK SC",
        "WenQuanYi Zen Hei",
        "Hiragino Sans",
        "Microsoft YaHei",
        "Noto Sans Devanagari",
        "Noto Sans Thai",
        "Arial Unicode MS",
    ]
    installed = set(font_manager.get_font_names())
    settings: dict[Any, Any] = {
        "font.family": ["DejaVu Sans", *(name for name in fallbacks if name in installed)],
        "font.size": 9.5,
        "text.parse_math": False,  # a class name may contain $
        "text.color": INK,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.titlelocation": "left",
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": LINE,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "legend.frameon": False,
        "savefig.dpi": 200,
        "svg.fonttype": "none",  # text in the fonts of the browser
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _figure(width: float = 4.8, height: float = 3.0, layout: Any = "constrained") -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def placeholder(text: str) -> Any:
    """A figure that only shows the text."""
    figure = _figure()
    figure.text(0.5, 0.5, text, ha="center", va="center", color=MUTED)
    return figure


def curves(history: list[dict[str, Any]], best: dict[str, Any], columns: list[str], title: str) -> Any:
    """Columns of history.csv over the epochs; a ring marks the best epoch on the last one, a line a new stage."""
    from matplotlib import ticker

    figure, epochs = _figure(), [row["epoch"] for row in history]
    axes = figure.add_subplot()
    for column in columns:
        is_validation = column.startswith("val_")
        axes.plot(
            epochs,
            [row[column] for row in history],
            color=VALIDATION if is_validation else TRAINING,
            label="_nolegend_"
            if len(columns) == 1
            else translate("validation")
            if is_validation
            else translate("training"),
            marker="o" if len(epochs) <= 40 else "",
            markersize=3,
        )
    axes.set_title(title, pad=20)
    axes.set(xlabel=translate("epoch"), xlim=(epochs[0] - 0.5, epochs[-1] + 0.5))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
    if columns == ["learning_rate"]:
        _learning_rate_axis(axes, [row["learning_rate"] for row in history])
    else:
        _mark_best(axes, best["epoch"], best[columns[-1]], is_share=columns[-1].endswith("accuracy"))
    _mark_stages(axes, history)
    return figure


def _learning_rate_axis(axes: Any, rates: list[float]) -> None:
    from matplotlib import ticker

    axes.set(ylabel=translate("learning rate"))
    if 0 < 10 * min(rates) < max(rates):
        axes.set(yscale="log")
    else:
        axes.set(ylim=(0, None))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: general(value, 6)))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def _mark_best(axes: Any, epoch: int, value: float, *, is_share: bool) -> None:
    """Draws a ring at the best epoch; labels the axis of accuracy (`is_share`) or loss."""
    if is_share:
        axes.set(ylabel=translate("accuracy (%%)"), ylim=(None, min(axes.get_ylim()[1], 1.004)))
        percent_ticks(axes.yaxis)
    else:
        axes.set(ylabel=translate("loss (cross-entropy, nats)"), ylim=(0, None))
        _number_ticks(axes.yaxis)
    shown = percent(value, 2) if is_share else decimal(value, 4)
    label = translate("best epoch %(epoch)s: %(value)s", epoch=epoch, value=shown)
    axes.plot(
        [epoch],
        [value],
        label=label,
        marker="o",
        markersize=8,
        fillstyle="none",
        color=INK,
        linestyle="",
        clip_on=False,
    )
    # Above the axes, where no text covers a curve.
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 1.08), ncols=3, borderaxespad=0, handlelength=1.2, columnspacing=1
    )


def percent_ticks(axis: Any) -> None:
    """Shows the fractions on an axis as percentages, without the sign."""
    from matplotlib import ticker

    class Localized(ticker.PercentFormatter):
        def __call__(self, value: float, position: int | None = None) -> str:
            return localized(super().__call__(value, position))

    axis.set_major_formatter(Localized(1.0, symbol=""))


def _number_ticks(axis: Any) -> None:
    from matplotlib import ticker

    class Localized(ticker.ScalarFormatter):
        def __call__(self, value: float, position: int | None = None) -> str:
            return localized(super().__call__(value, position))

    axis.set_major_formatter(Localized())


def _mark_stages(axes: Any, history: list[dict[str, Any]]) -> None:
    names = {"head": translate("head only"), "all": translate("whole network")}
    for before, after in itertools.pairwise(history):
        if before["stage"] != after["stage"]:
            border = after["epoch"] - 0.5
            axes.axvline(border, color=MUTED, linestyle="--", linewidth=1)
            for row, offset, alignment in ((before, -4, "right"), (after, 4, "left")):
                axes.annotate(
                    names.get(row["stage"], row["stage"]),
                    (border, 1),
                    (offset, 3),
                    xycoords=("data", "axes fraction"),
                    textcoords="offset points",
                    ha=alignment,
                    color=MUTED,
                    fontsize=8,
                )


def confusion_matrix(class_names: Sequence[str], metrics: ClassificationMetrics) -> Any:
    """Counts and row shares, one row per true class and one column per predicted class."""
    from matplotlib.colors import LinearSegmentedColormap

    classes, confusion = len(class_names), metrics.confusion
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    annotated = classes <= MAX_ANNOTATED_CLASSES
    side = max(2.4, classes * 0.55) if annotated else 5.0  # inches
    title = translate("Confusion matrix, %(count)s images", count=number(confusion.sum()))
    block = -(-classes // _MAX_CELLS)
    if block > 1:  # among more cells, a single one would not be visible
        edges = range(0, classes, block)
        shares = np.maximum.reduceat(np.maximum.reduceat(shares, edges, axis=0), edges, axis=1)
        title += "\n" + translate(
            "%(count)s classes; each cell is the largest share in a block of %(block)s by %(block)s",
            count=number(classes),
            block=block,
        )
    figure = _figure(side + 2.4, side + 1.6, "compressed")
    axes = figure.add_subplot(title=title)
    axes.grid(False)
    axes.spines[:].set(visible=True, color=LINE)
    shades = LinearSegmentedColormap.from_list("shares", [f"{TRAINING}00", TRAINING])  # from transparent, over any page
    image = axes.imshow(shares, cmap=shades, vmin=0, vmax=1, interpolation="nearest")
    bar = figure.colorbar(image, label=translate("share of the true class (%%)"), fraction=0.05)
    percent_ticks(bar.ax.yaxis)
    axes.set(xlabel=translate("predicted class"), ylabel=translate("true class"), xticks=[], yticks=[])
    if annotated:
        names = [shorten(name, 18) for name in class_names]
        is_crowded = max(map(len, names)) * classes > 24
        axes.set_yticks(range(classes), names)
        axes.set_xticks(range(classes), names, rotation=40 if is_crowded else 0, ha="right" if is_crowded else "center")
        _annotate_cells(axes, confusion, shares)
    return figure


def _annotate_cells(axes: Any, confusion: np.ndarray, shares: np.ndarray) -> None:
    for (i, j), count in np.ndenumerate(confusion):
        share = float(shares[i, j])
        color = PAPER if share > 0.55 else INK if count else MUTED
        text = f"{number(count)}\n{percent(share)}" if count else "0"
        axes.text(j, i, text, ha="center", va="center", color=color, fontsize=9 if len(confusion) < 8 else 7)


def mistakes(rows: list[dict[str, Any]]) -> Any:
    """The images of wrong predictions in the order of `rows`, which thumbnails.with_images returned."""
    from PIL import ImageOps

    columns = min(6, max(3, len(rows)))
    lines = -(-len(rows) // columns)
    figure = _figure(1.6 * columns, 2.05 * lines + 0.3, "compressed")
    figure.suptitle(translate("Most confident mistakes"), **_TITLE)
    for index, row in enumerate(rows):
        axes = figure.add_subplot(lines, columns, index + 1)
        axes.imshow(ImageOps.pad(row["image"], (_IMAGE_SIZE, _IMAGE_SIZE), color="#eef1f5"))
        axes.axis("off")
        label, predicted = shorten(row["label"], 24), shorten(row["predicted"], 24)
        caption = f"{label} {translate('predicted as')} {predicted}, {percent(row['probability'])}"
        axes.set_title(textwrap.fill(caption, 22), **_CAPTION)
    return figure


def reliability_diagram(probability: list[float], correct: list[bool], bins: int = 15) -> Any:
    """Share correct over the probability of the predicted class with 95 % intervals; below, the images per bin."""
    from matplotlib import ticker

    count, accuracy, confidence = reliability_bins(probability, correct, bins)
    used = np.flatnonzero(count)
    bounds = np.array([wilson_interval(round(accuracy[b] * count[b]), int(count[b])) for b in used])  # [used, 2]
    figure = _figure(4.8, 3.9)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color=MUTED, linestyle="--", linewidth=1)
    upper.vlines(confidence[used], bounds[:, 0], bounds[:, 1], color=VALIDATION, linewidth=1.2)
    upper.plot(confidence[used], accuracy[used], color=VALIDATION, marker="o", markersize=4, linestyle="")
    upper.set(ylabel=translate("share correct (%%)"), ylim=(-0.02, 1.02), xlim=(0, 1))
    lower.bar((np.arange(bins) + 0.5) / bins, count, width=0.9 / bins, color=TRAINING)
    lower.set(ylabel=translate("images"), xlabel=translate("probability of the predicted class (%%)"))
    lower.yaxis.set_major_locator(ticker.MaxNLocator(nbins=2, integer=True))
    for axis in (upper.yaxis, lower.xaxis):
        percent_ticks(axis)
    return figure


def precision_recall(class_names: Sequence[str], predictions: list[dict[str, Any]]) -> Any:
    """Precision over recall as the threshold of the probability falls: all images, each class, and the worst in color.

    `predictions` are rows of predictions.csv with `correct`. Of more than MAX_ANNOTATED_CLASSES classes, the worst are drawn:
    those with the smallest area below the curve.
    """
    by_class: dict[str, list[dict[str, Any]]] = {name: [] for name in class_names}
    for row in predictions:
        by_class[row["predicted"]].append(row)
    support = collections.Counter(row["label"] for row in predictions)
    curves = {name: _curve(rows, support[name]) for name, rows in by_class.items() if rows and support[name]}
    worst_first = sorted(curves, key=lambda name: np.sum(np.diff(curves[name][1], prepend=0) * curves[name][0]))
    figure = _figure(4.8, 3.4)
    axes = figure.add_subplot()
    for name in reversed(worst_first[1:MAX_ANNOTATED_CLASSES]):
        axes.plot(curves[name][1], curves[name][0], color=MUTED, linewidth=0.7, alpha=0.6)
    if worst_first:
        precision, recall = curves[worst_first[0]]
        axes.plot(recall, precision, color=VALIDATION, marker="o" if len(recall) < 20 else "", markersize=3,
                  label=translate("worst class: %(name)s", name=shorten(worst_first[0], 24)))  # fmt: skip
    precision, recall = _curve(predictions, len(predictions))
    axes.plot(recall, precision, color=TRAINING, linewidth=2, label=translate("all images"))
    axes.set(xlabel=translate("recall (%%)"), ylabel=translate("precision (%%)"), xlim=(0, 1.01), ylim=(None, 1.01))
    for axis in (axes.xaxis, axes.yaxis):
        percent_ticks(axis)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0, handlelength=1.2, columnspacing=1)
    return figure


def _curve(rows: list[dict[str, Any]], support: int) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall at the thresholds of at most _MAX_CURVE_POINTS of the predictions."""
    precision, recall = precision_recall_curve(
        [row["probability"] for row in rows], [row["correct"] for row in rows], support
    )
    kept = np.unique(np.linspace(0, len(recall) - 1, min(len(recall), _MAX_CURVE_POINTS)).astype(int))
    return precision[kept], recall[kept]


def image_grid(images: list[tuple[str, np.ndarray]]) -> Any:
    """Augmented training images, as (label, uint8 [S, S, 3])."""
    columns = 4
    rows = -(-len(images) // columns)
    figure = _figure(1.6 * columns, 1.8 * rows + 0.3, "compressed")
    for index, (label, image) in enumerate(images):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.imshow(image)
        axes.axis("off")
        axes.set_title(shorten(label, 24), **_CAPTION)
    return figure


def png(figure: Any) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def svg(figure: Any, name: str) -> str:
    """The figure as an SVG file; `name` makes its ids unique in a page."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # without a salt, the ids are random
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return buffer.getvalue()


def svg_element(text: str) -> str:
    """An SVG file of `svg` as an <svg> element with CSS variables as colors."""
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text[text.index("<svg") :])
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    for color, variable in _CSS_VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text


def size_histogram(sizes: np.ndarray) -> Any:
    """Histogram of the smaller side of images in pixels, on a logarithmic axis."""
    from matplotlib import ticker

    figure = _figure(4.8, 2.6)
    axes = figure.add_subplot()
    axes.hist(sizes, bins=np.geomspace(max(1, sizes.min()) * 0.95, max(2, sizes.max()) * 1.05, 41), color=TRAINING)
    axes.axvline(224, color=VALIDATION, linestyle="--", linewidth=1)
    axes.annotate("224", (224, 1), (3, -9), ("data", "axes fraction"), "offset points", color=VALIDATION, fontsize=8)
    axes.set(xscale="log", xlabel=translate("smaller side (pixels)"), ylabel=translate("images"))
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: decimal(value, 0)))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    return figure
