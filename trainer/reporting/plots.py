"""The figures of a report, drawn by matplotlib: PNG for files, SVG whose colours follow the page's light and dark.

Shapes: K classes, S pixels to a side.
"""

import contextlib
import io
import itertools
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from trainer.artifacts.metrics import ClassificationMetrics, reliability_bins, wilson_interval
from trainer.formatting import percent, shorten
from trainer.storage import files

MAX_ANNOTATED_CLASSES = 30  # above this a cell is too small for its numbers


_PICTURE_SIZE = 240  # pixels to a side of a picture in a sheet


# Colours of the figures. In the page each becomes a CSS variable, so that curves follow light and dark.
_PAPER, _INK, _MUTED, _LINE, _TRAINING, _VALIDATION = "#ffffff", "#1f2328", "#66707a", "#dfe3e8", "#2b6cb0", "#c2531b"


_COLORS = (_PAPER, _INK, _MUTED, _LINE, _TRAINING, _VALIDATION)


_CSS_VARIABLES = ("--paper", "--ink", "--muted", "--line", "--training", "--validation")


_STAGES = {"head": "head only", "all": "all layers"}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """One look for all figures; sets matplotlib's rcParams meanwhile."""
    import matplotlib
    from matplotlib import font_manager

    fallbacks = ["Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "Hiragino Sans", "Microsoft YaHei"]
    fallbacks += ["Noto Sans Devanagari", "Noto Sans Thai", "Arial Unicode MS"]
    installed = set(font_manager.get_font_names())
    settings: dict[Any, Any] = {
        "font.family": ["DejaVu Sans", *(name for name in fallbacks if name in installed)],
        "font.size": 9.5,
        "text.parse_math": False,  # a class may be called a$b$c
        "text.color": _INK,
        "axes.edgecolor": _MUTED,
        "axes.labelcolor": _INK,
        "axes.titlelocation": "left",
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": _LINE,
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
        "legend.frameon": False,
        "savefig.dpi": 200,
        "svg.fonttype": "none",  # text stays text, in the reader's own fonts
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _figure(width: float = 4.8, height: float = 3.0, layout: Any = "constrained") -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def placeholder(text: str) -> Any:
    """A figure that says why there is none."""
    figure = _figure()
    figure.text(0.5, 0.5, text, ha="center", va="center", color=_MUTED)
    return figure


def curves(history: list[dict[str, Any]], best: dict[str, Any], columns: list[str], title: str) -> Any:
    """Quantities over the epochs, the best epoch ringed on the last of `columns`, a dashed line between stages."""
    from matplotlib import ticker

    figure, epochs = _figure(), [row["epoch"] for row in history]
    axes = figure.add_subplot()
    for column in columns:
        color, label = (_VALIDATION, "validation") if column.startswith("val_") else (_TRAINING, "training")
        label = label if len(columns) > 1 else "_nolegend_"
        marker = "o" if len(epochs) <= 40 else ""
        axes.plot(epochs, [row[column] for row in history], color=color, label=label, marker=marker, markersize=3)
    axes.set_title(title, pad=20)
    axes.set(xlabel="epoch", xlim=(epochs[0] - 0.5, epochs[-1] + 0.5))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
    if columns == ["learning_rate"]:
        _learning_rate_axis(axes, [row["learning_rate"] for row in history])
    else:
        _ring(axes, best["epoch"], best[columns[-1]], is_share=columns[-1].endswith("accuracy"))
    _mark_stages(axes, history)
    return figure


def _learning_rate_axis(axes: Any, rates: list[float]) -> None:
    from matplotlib import ticker

    if 0 < 10 * min(rates) < max(rates):
        axes.set(ylabel="learning rate", yscale="log")
    else:
        axes.set(ylabel="learning rate", ylim=(0, None))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def _ring(axes: Any, epoch: int, value: float, *, is_share: bool) -> None:
    """Marks the best epoch, and names the axis."""
    from matplotlib import ticker

    if is_share:
        axes.set(ylabel="accuracy (%)", ylim=(None, min(axes.get_ylim()[1], 1.004)))
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, symbol=""))
    else:
        axes.set(ylabel="loss (cross-entropy, nats)", ylim=(0, None))
    label = f"best epoch {epoch}: {percent(value, 2) if is_share else f'{value:.4f}'}"
    ring = {"marker": "o", "markersize": 8, "fillstyle": "none", "color": _INK, "linestyle": "", "clip_on": False}
    axes.plot([epoch], [value], label=label, **ring)
    # Above the axes no text can cover a curve.
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 1.08), ncols=3, borderaxespad=0, handlelength=1.2, columnspacing=1
    )


def _mark_stages(axes: Any, history: list[dict[str, Any]]) -> None:
    for before, after in itertools.pairwise(history):
        if before["stage"] != after["stage"]:
            border = after["epoch"] - 0.5
            axes.axvline(border, color=_MUTED, linestyle="--", linewidth=1)
            for row, offset, side in ((before, -4, "right"), (after, 4, "left")):
                text, where = _STAGES.get(row["stage"], row["stage"]), ("data", "axes fraction")
                axes.annotate(text, (border, 1), (offset, 3), where, "offset points", ha=side, color=_MUTED, fontsize=8)


def confusion_matrix(labels: Sequence[str], scores: ClassificationMetrics) -> Any:
    """Counts and row shares, true classes down and predicted ones across."""
    from matplotlib import ticker
    from matplotlib.colors import LinearSegmentedColormap

    classes, confusion = len(labels), scores.confusion
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    annotated = classes <= MAX_ANNOTATED_CLASSES
    side = max(2.4, classes * 0.55) if annotated else 5.0  # inches
    title = f"Confusion matrix, {confusion.sum():,} pictures"
    block = -(-classes // 250)
    if block > 1:  # a line one class wide would fade away among a thousand
        edges = range(0, classes, block)
        shares = np.maximum.reduceat(np.maximum.reduceat(shares, edges, axis=0), edges, axis=1)
        title += f"\n{classes:,} classes; each point is the largest share in a block of {block} by {block}"
    figure = _figure(side + 2.4, side + 1.6, "compressed")
    axes = figure.add_subplot(title=title)
    axes.grid(False)
    axes.spines[:].set(visible=True, color=_LINE)
    shades = LinearSegmentedColormap.from_list("shares", [_PAPER, _TRAINING])
    image = axes.imshow(shares, cmap=shades, vmin=0, vmax=1, interpolation="nearest")
    bar = figure.colorbar(image, label="share of the true class (%)", fraction=0.05)
    bar.ax.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, symbol=""))
    axes.set(xlabel="predicted class", ylabel="true class", xticks=[], yticks=[])
    if annotated:
        names = [shorten(name, 18) for name in labels]
        axes.set_yticks(range(classes), names)
        crowded = max(map(len, names)) * classes > 24
        axes.set_xticks(range(classes), names, rotation=40 if crowded else 0, ha="right" if crowded else "center")
        for (i, j), count in np.ndenumerate(confusion):
            color = _PAPER if shares[i, j] > 0.55 else _INK if count else _MUTED
            text = f"{count:,}\n{percent(shares[i, j])}" if count else "0"
            axes.text(j, i, text, ha="center", va="center", color=color, fontsize=9 if classes < 8 else 7)
    return figure


def mistakes(rows: list[dict[str, Any]]) -> Any:
    """The most confident mistakes as pictures, the worst first; rows of trainer.thumbnails.with_images."""
    from PIL import ImageOps

    columns = min(6, max(3, len(rows)))
    lines = -(-len(rows) // columns)
    figure = _figure(1.6 * columns, 2.05 * lines + 0.3, "compressed")
    figure.suptitle("Most confident mistakes", x=0.01, ha="left", fontsize=10.5, fontweight="bold")
    for index, row in enumerate(rows):
        axes = figure.add_subplot(lines, columns, index + 1)
        axes.imshow(ImageOps.pad(row["image"], (_PICTURE_SIZE, _PICTURE_SIZE), color="#eef1f5"))
        axes.axis("off")
        names = f"{shorten(row['label'], 24)} taken for {shorten(row['predicted'], 24)}, {percent(row['probability'])}"
        axes.set_title(textwrap.fill(names, 22), fontsize=7.5, fontweight="normal", loc="center", y=0, va="top", pad=-4)
    return figure


def reliability_diagram(probability: list[float], correct: list[bool], bins: int = 15) -> Any:
    """Share correct over probability with 95 % intervals; below it how many answers lie where."""
    from matplotlib import ticker

    count, accuracy, confidence = reliability_bins(probability, correct, bins)
    used = np.flatnonzero(count)
    bounds = np.array([wilson_interval(round(accuracy[b] * count[b]), int(count[b])) for b in used])  # [used, 2]
    figure = _figure(4.8, 3.9)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color=_MUTED, linestyle="--", linewidth=1)
    upper.vlines(confidence[used], bounds[:, 0], bounds[:, 1], color=_VALIDATION, linewidth=1.2)
    upper.plot(confidence[used], accuracy[used], color=_VALIDATION, marker="o", markersize=4, linestyle="")
    upper.set(ylabel="share correct (%)", ylim=(-0.02, 1.02), xlim=(0, 1))
    lower.bar((np.arange(bins) + 0.5) / bins, count, width=0.9 / bins, color=_TRAINING)
    lower.set(ylabel="pictures", xlabel="probability of the predicted class (%)")
    lower.yaxis.set_major_locator(ticker.MaxNLocator(nbins=2, integer=True))
    for axis in (upper.yaxis, lower.xaxis):
        axis.set_major_formatter(ticker.PercentFormatter(1.0, symbol=""))
    return figure


def image_grid(images: list[tuple[str, np.ndarray]]) -> Any:
    """Training pictures (label, uint8 [S, S, 3]) as augmentation leaves them."""
    columns = 4
    rows = -(-len(images) // columns)
    figure = _figure(1.6 * columns, 1.8 * rows + 0.3, "compressed")
    figure.suptitle("Augmented training pictures", x=0.01, ha="left", fontsize=10.5, fontweight="bold")
    for index, (label, image) in enumerate(images):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.imshow(image)
        axes.axis("off")
        axes.set_title(shorten(label, 24), fontsize=7.5, fontweight="normal", loc="center", y=0, va="top", pad=-4)
    return figure


def png(figure: Any) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def svg(figure: Any, name: str) -> str:
    """The figure as an element of the page, its colours as CSS variables, its ids made from `name`."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # without a salt the ids are random
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text[text.index("<svg") :])
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    for color, variable in zip(_COLORS, _CSS_VARIABLES, strict=True):
        text = text.replace(color, f"var({variable})")
    return text


def size_histogram(sizes: np.ndarray) -> Any:
    """How many pictures have a smaller side of how many pixels, on a logarithmic axis."""
    from matplotlib import ticker

    figure = _figure(4.8, 2.6)
    axes = figure.add_subplot()
    axes.hist(sizes, bins=np.geomspace(max(1, sizes.min()) * 0.95, max(2, sizes.max()) * 1.05, 41), color=_TRAINING)
    axes.axvline(224, color=_VALIDATION, linestyle="--", linewidth=1)
    axes.annotate("224", (224, 1), (3, -9), ("data", "axes fraction"), "offset points", color=_VALIDATION, fontsize=8)
    axes.set(xscale="log", xlabel="smaller side (pixels)", ylabel="pictures")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    return figure


PAPER, INK, MUTED, FIRST, SECOND = "#ffffff", "#1f2328", "#8b949e", "#2b6cb0", "#c2531b"


def write_study(path: str, trials: list, names: list[str], scales: dict[str, str]) -> None:
    """Writes a PNG: panels of val_accuracy over the trial's number and over each flag of `names`.

    `trials` are Optuna's, complete or ended early; `scales` is matplotlib's scale of each flag's axis.
    """
    from matplotlib.figure import Figure

    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    ended_early = [trial for trial in trials if trial.state.name == "PRUNED"]  # whose `value` is only the last one told
    figure = Figure(figsize=(3.6 * (len(names) + 1), 3.6), layout="constrained", facecolor=PAPER)
    panels = figure.subplots(1, len(names) + 1, sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, ["trial", *names], strict=True):

        def place(trial: Any, name: str = name) -> float:
            return trial.number if name == "trial" else trial.params[name]

        early = [max(trial.intermediate_values.values()) for trial in ended_early]
        panel.scatter([place(t) for t in ended_early], early, color=MUTED, marker="x", label="ended early")
        panel.scatter([place(t) for t in complete], [t.value for t in complete], color=FIRST, label="complete")
        best = max(complete, key=lambda trial: trial.value)
        panel.scatter([place(best)], [best.value], s=140, facecolors="none", edgecolors=SECOND, label="best")
        panel.set_xscale(scales.get(name, "linear"))
        panel.set_xlabel(name, color=INK)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("val_accuracy", color=INK)
    so_far = [max(t.value for t in complete if t.number <= trial.number) for trial in complete]
    panels[0].step([trial.number for trial in complete], so_far, where="post", color=SECOND, linewidth=1)
    panels[0].legend(frameon=False, fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    files.atomic_write(path, image.getvalue())
