"""TODO."""

import os
import platform
import statistics
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from absl import logging
from tqdm import tqdm

from trainer.storage import files


def measure(suite: Any, rounds: int) -> dict:
    """Every contender in turn, `rounds` times over; figures and aims as JSON holds them.

    Alternating, so that whatever else the machine does meanwhile meets all of them alike.
    """
    turns = [(number, baseline) for number in range(rounds) for baseline in suite.baselines]
    figures: dict[str, dict[str, list[float]]] = {baseline.name: {} for baseline in suite.baselines}
    for _, baseline in tqdm(turns, desc=suite.name, unit="turn", disable=not sys.stderr.isatty(), leave=False):
        logging.debug("%s: %s", suite.name, baseline.name)
        for figure, value in baseline.measure().items():
            figures[baseline.name].setdefault(figure, []).append(float(value))
    targets = []
    for target in suite.targets:
        pairs = zip(figures[target.numerator][target.figure], figures[target.denominator][target.figure], strict=True)
        ratio = statistics.median(one / other for one, other in pairs)
        is_met = ratio >= target.bound if target.at_least else ratio <= target.bound
        targets.append(
            {"aim": target.text, "bound": target.bound, "at_least": target.at_least, "ratio": ratio, "is_met": is_met}
        )
    described = {"suite": suite.name, "title": suite.title, "figure": suite.figure, "left_out": suite.left_out}
    return {**described, "rounds": rounds, "figures": figures, "aims": targets}


def machine() -> dict:
    """Processor, cores, load and versions, as the results need them to be read."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    packages = ("tensorflow", "tensorflow-cpu", "keras", "numpy")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = [round(value, 1) for value in os.getloadavg()]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": cores,
        "load": load,
        "versions": versions,
    }


def earlier(output_dir: str, but: list[str]) -> list[dict]:
    """The suites, other than those named, that a run on this machine and these versions left in `output_dir`."""
    before, here = files.read_json(files.join(output_dir, "benchmark.json")) or {}, machine()
    if any(before.get("machine", {}).get(name) != here[name] for name in here if name != "load"):
        return []
    return [suite for suite in before["suites"] if suite["suite"] not in but]


def write(output_dir: str, measurements: dict) -> None:
    """Writes benchmark.json, benchmark.md and benchmark.png."""
    files.write_json(f"{output_dir}/benchmark.json", measurements)
    files.atomic_write(f"{output_dir}/benchmark.md", markdown(measurements))
    files.atomic_write(f"{output_dir}/benchmark.png", chart(measurements))


def suite_table(suite: dict) -> str:
    """One suite as a table: a row for each contender, a column for each figure: median (lowest to highest)."""
    names = list(dict.fromkeys(figure for figures in suite["figures"].values() for figure in figures))
    rows = [["", *(name.replace("_", " ") for name in names)]]
    for baseline, figures in suite["figures"].items():
        rows.append([baseline, *(_cell(figures[name]) if name in figures else "" for name in names)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    rounds = f"{suite['rounds']} round{'s' if suite['rounds'] > 1 else ''}"
    title = f"## {suite['suite']}: {suite['title']} ({rounds})"
    return "\n".join([title, "", *lines, "", *(f"Left out: {reason}." for reason in suite["left_out"])])


def _cell(values: list[float]) -> str:
    median = statistics.median(values)
    if len(values) == 1 or min(values) == max(values):
        return f"{median:.4g}"
    return f"{median:.4g} ({min(values):.4g} to {max(values):.4g})"


def markdown(measurements: dict) -> str:
    """All of it as Markdown: the machine, the aims and whether they are met, a table for each suite."""
    about = measurements["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        "# Benchmark",
        "",
        f"{about['processor']}, {about['cores']} cores, load {about['load'][0]} at the end; {versions}.",
        *([measurements["note"]] if measurements["note"] else []),
        "Each figure is the median over the rounds (lowest to highest); ratios are medians over the rounds, which alternate.",
        "",
        "![the suites as bars](benchmark.png)",
        "",
        "| aim | wanted | measured | |",
        "| --- | --- | --- | --- |",
    ]
    for suite in measurements["suites"]:
        for target in suite["aims"]:
            wanted = f"{'at least' if target['at_least'] else 'at most'} {target['bound']:g}"
            lines.append(
                f"| {target['aim']} | {wanted} | {target['ratio']:.2f} | {'met' if target['is_met'] else 'missed'} |"
            )
    return "\n".join([*lines, "", *(suite_table(suite) + "\n" for suite in measurements["suites"])])


def chart(measurements: dict) -> bytes:
    """One panel of bars for each suite, medians with the spread as a line, as PNG."""
    import io

    from matplotlib.figure import Figure

    suites = measurements["suites"]
    heights = [1 + 0.35 * len(suite["figures"]) for suite in suites]
    figure = Figure(figsize=(8, sum(heights) + 0.6), layout="constrained")
    panels = figure.subplots(len(suites), squeeze=False, height_ratios=heights)[:, 0]
    for axes, suite in zip(panels, suites, strict=True):
        values = {name: figures[suite["figure"]] for name, figures in suite["figures"].items()}
        medians = [statistics.median(value) for value in values.values()]
        spread = [
            [m - min(value) for m, value in zip(medians, values.values(), strict=True)],
            [max(value) - m for m, value in zip(medians, values.values(), strict=True)],
        ]
        colours = ["#1a5fb4" if name.startswith("our") else "#9a9996" for name in values]
        bars = axes.barh(list(values), medians, xerr=spread, color=colours, ecolor="#3d3846", capsize=3)
        axes.bar_label(bars, [f" {median:.4g}" for median in medians], padding=6, fontsize=8)
        axes.set_title(f"{suite['suite']}: {suite['title']}", loc="left", fontsize=10, fontweight="bold")
        better = "more" if suite["figure"] == "images_per_second" else "less"
        axes.set_xlabel(f"{suite['figure'].replace('_', ' ')} ({better} is better)", fontsize=9)
        axes.tick_params(labelsize=9)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    about = measurements["machine"]
    figure.supxlabel(f"{about['processor']}, {about['cores']} cores", x=0.99, ha="right", fontsize=8, color="#5e5c64")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
