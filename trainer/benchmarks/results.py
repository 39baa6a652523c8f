"""Runs a suite, and writes the results as JSON, Markdown and a chart. Imports no TensorFlow."""

import io
import math
import os
import platform
import statistics
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import logging
from tqdm import tqdm

from trainer.benchmarks.suite import Suite
from trainer.storage import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes

JSON_NAME, MARKDOWN_NAME, CHART_NAME = "benchmark.json", "benchmark.md", "benchmark.png"
PACKAGES = ("tensorflow", "tensorflow-cpu", "keras", "numpy")


def measure(suite: Suite, rounds: int) -> dict[str, Any]:
    """Measures every baseline once per round, and compares the targets; the result is the suite's JSON value.

    Rounds alternate between the baselines, so that other load on the machine affects all of them equally.
    """
    metrics: dict[str, dict[str, list[float]]] = {baseline.name: {} for baseline in suite.baselines}
    turns = suite.baselines * rounds
    for baseline in tqdm(turns, desc=suite.name, unit="turn", disable=not sys.stderr.isatty(), leave=False):
        logging.debug("%s: %s", suite.name, baseline.name)
        for name, value in baseline.measure().items():
            metrics[baseline.name].setdefault(name, []).append(float(value))
    targets = []
    for target in suite.targets:
        numerators = metrics[target.numerator][target.metric]
        denominators = metrics[target.denominator][target.metric]
        ratio = statistics.median(n / d for n, d in zip(numerators, denominators, strict=True))
        targets.append(
            {
                "aim": target.description,
                "bound": target.bound,
                "at_least": target.at_least,
                "ratio": ratio,
                "is_met": target.is_met(ratio),
            }
        )
    return {
        "suite": suite.name,
        "title": suite.title,
        "figure": suite.metric,
        "left_out": suite.omitted,
        "rounds": rounds,
        "figures": metrics,
        "aims": targets,
    }


def machine() -> dict[str, Any]:
    """Processor, number of cores, load averages and package versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": [round(value, 1) for value in os.getloadavg()],
        "versions": versions,
    }


def read_earlier(output_dir: str) -> list[dict]:
    """The suites in `output_dir` from the same machine and package versions."""
    earlier = files.read_json(files.join(output_dir, JSON_NAME)) or {}
    current = machine()
    if any(earlier.get("machine", {}).get(name) != current[name] for name in current if name != "load"):
        return []
    return earlier["suites"]


def add(measured: list[dict], suite: dict[str, Any]) -> list[dict]:
    """`measured` with the suite. It replaces an earlier one of that title, but for baselines that it did not measure."""
    kept, figures = [], suite["figures"]
    for earlier in measured:
        if (earlier["suite"], earlier["title"]) == (suite["suite"], suite["title"]):
            figures = earlier["figures"] | figures
        else:
            kept.append(earlier)
    return [*kept, {**suite, "figures": figures}]


def write(output_dir: str, results: dict[str, Any]) -> None:
    """Writes benchmark.json, benchmark.md and benchmark.png. `results` has the keys machine, note and suites."""
    files.write_json(files.join(output_dir, JSON_NAME), results)
    files.atomic_write(files.join(output_dir, MARKDOWN_NAME), markdown(results))
    files.atomic_write(files.join(output_dir, CHART_NAME), chart(results))


def suite_table(suite: dict[str, Any]) -> str:
    """One suite as a Markdown table: a row per baseline, a column per metric, cells of median (minimum to maximum)."""
    names = list(dict.fromkeys(name for metrics in suite["figures"].values() for name in metrics))
    rows = [["", *(name.replace("_", " ") for name in names)]]
    for baseline, metrics in suite["figures"].items():
        rows.append([baseline, *(_cell(metrics[name]) if name in metrics else "" for name in names)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    rounds = f"{suite['rounds']} round{'s' if suite['rounds'] > 1 else ''}"
    title = f"## {suite['suite']}: {suite['title']} ({rounds})"
    return "\n".join([title, "", *lines, "", *(f"Not measured: {text}." for text in suite["left_out"])])


def _cell(values: list[float]) -> str:
    median, least, most = (_number(value) for value in (statistics.median(values), min(values), max(values)))
    return median if least == most else f"{median} ({least} to {most})"


def _number(value: float, digits: str = ".4g") -> str:
    """The number; a time without end is that to a goal that was not reached, and a ratio with it is none."""
    return f"{value:{digits}}" if math.isfinite(value) else "not reached"


def _cores(about: dict[str, Any]) -> str:
    return f"{about['processor']}, {about['cores']} core{'s' if about['cores'] > 1 else ''}"


def markdown(results: dict[str, Any]) -> str:
    """The results as Markdown: the machine, the targets, and a table per suite."""
    about = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        "# Benchmark",
        "",
        f"{_cores(about)}, load {about['load'][0]} at the end; {versions}.",
        "",
        *([results["note"], ""] if results["note"] else []),
        "Cells show the median over the rounds (minimum to maximum). Rounds alternate between the baselines; a ratio is",
        "the median of the ratios of the rounds.",
        "",
        "![bar chart of each suite](benchmark.png)",
        "",
        "| ratio | target | measured | |",
        "| --- | --- | --- | --- |",
    ]
    for suite in results["suites"]:
        for target in suite["aims"]:
            bound = f"{'at least' if target['at_least'] else 'at most'} {target['bound']:g}"
            verdict = "met" if target["is_met"] else "missed"
            lines.append(f"| {target['aim']} | {bound} | {_number(target['ratio'], '.2f')} | {verdict} |")
    return "\n".join([*lines, "", *(suite_table(suite) + "\n" for suite in results["suites"])])


def chart(results: dict[str, Any]) -> bytes:
    """A PNG image with a bar chart per suite: medians, with a line from minimum to maximum."""
    from matplotlib.figure import Figure

    suites = results["suites"]
    heights = [1 + 0.35 * len(suite["figures"]) for suite in suites]
    figure = Figure(figsize=(8, sum(heights) + 0.6), layout="constrained")
    panels = figure.subplots(len(suites), squeeze=False, height_ratios=heights)[:, 0]
    for axes, suite in zip(panels, suites, strict=True):
        _draw_bars(axes, suite)
    about = results["machine"]
    figure.supxlabel(_cores(about), x=0.99, ha="right", fontsize=8, color="#5e5c64")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _draw_bars(axes: "Axes", suite: dict[str, Any]) -> None:
    metric = suite["figure"]
    values = {name: metrics[metric] for name, metrics in suite["figures"].items()}
    labels = [f" {_number(statistics.median(rounds))}" for rounds in values.values()]
    values = {name: [value if math.isfinite(value) else 0.0 for value in rounds] for name, rounds in values.items()}
    medians = [statistics.median(rounds) for rounds in values.values()]
    below = [median - min(rounds) for median, rounds in zip(medians, values.values(), strict=True)]
    above = [max(rounds) - median for median, rounds in zip(medians, values.values(), strict=True)]
    colors = ["#1a5fb4" if name.startswith("trainer ") else "#9a9996" for name in values]
    bars = axes.barh(list(values), medians, xerr=[below, above], color=colors, ecolor="#3d3846", capsize=3)
    axes.bar_label(bars, labels, padding=6, fontsize=8)
    axes.set_title(f"{suite['suite']}: {suite['title']}", loc="left", fontsize=10, fontweight="bold")
    better = "more" if metric in ("images_per_second", "test_accuracy") else "less"
    axes.set_xlabel(f"{metric.replace('_', ' ')} ({better} is better)", fontsize=9)
    axes.tick_params(labelsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
