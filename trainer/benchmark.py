"""Measures this job against what one would use instead, side by side in one run: alternating rounds, medians, spread.

    python -m trainer.benchmark
        every suite on pictures that it draws itself, ResNet50 on random weights
    python -m trainer.benchmark --data_dir=pictures --weights=weights.h5 --suite=accuracy,step
        two suites on your own

    accuracy   seconds to the article's 96.49 %, our default recipe against the article's own in Keras
    step       pictures per second of our training loop, Keras fit, PyTorch where it is installed
    input      our input pipeline, image_dataset_from_directory, ImageDataGenerator, a plain decode
    resume     seconds to the first step, cold and resumed; seconds to save
    growth     time and memory for folders of 1,000, 10,000 and 100,000 pictures
    bucket     pictures per second from a bucket in each way of this job, against a local disk (only when asked for)

Leaves benchmark.md, benchmark.json and benchmark.png in --output_dir, with the suites that an earlier run on the same
machine and versions left there. A run of everything takes hours on two cores.
"""

import os
import platform
import statistics
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from absl import flags, logging
from tqdm import tqdm

from trainer import command, demo, storage
from trainer.errors import UserError

SUITES = ("accuracy", "step", "input", "resume", "growth")
BUCKET = "bucket"  # not among those that run unasked, since it needs a bucket


def define_flags() -> None:
    """The flags of this command."""
    flags.DEFINE_string(
        "data_dir", "", "Folder with one sub-folder of JPEG files per class. Without it, a set is drawn."
    )
    flags.DEFINE_string("weights", "none", "imagenet, none, or the path of a weights file: of the suite accuracy.")
    flags.DEFINE_list("suite", ",".join(SUITES), "Which suites, by comma.")
    flags.DEFINE_string("output_dir", "benchmark", "Folder for benchmark.md, benchmark.json and benchmark.png.")
    flags.DEFINE_integer("rounds", 3, "Times that each contender has its turn.", lower_bound=1)
    flags.DEFINE_integer("pictures", 0, "Use so many of the pictures, 0: all.", lower_bound=0)
    flags.DEFINE_integer("image_size", 224, "Pixels to a side of what the network sees.", lower_bound=32)
    flags.DEFINE_integer("batch_size", 32, "Of the suite step.", lower_bound=1)
    flags.DEFINE_integer("steps", 4, "Of one turn in the suite step.", lower_bound=1)
    flags.DEFINE_boolean("xla", True, "Measure steps compiled by XLA too.")
    flags.DEFINE_integer("large_pictures", 240, "How many 12-megapixel pictures the suite input reads.", lower_bound=2)
    flags.DEFINE_list("growth_sizes", "1000,10000,100000", "Pictures in the folders of the suite growth.")
    flags.DEFINE_float(
        "budget_factor", 25, "What the article's recipe may take, as a multiple of ours.", lower_bound=0.1
    )
    flags.DEFINE_string(
        "note", "", "What a reader should know of the circumstances, such as a machine that was shared."
    )
    flags.DEFINE_string("bucket_dir", "", "Of the suite bucket: the pictures of --data_dir, all of them, as gs://...")
    flags.DEFINE_string("packed_dir", "", "Of the suite bucket: what trainer.pack made of them, as gs://...")


def main(arguments: list[str]) -> None:
    """Runs the suites and writes what came of them, after each suite."""
    values = command.values(("data_dir", "suite", "output_dir", "rounds", "pictures", "note"))
    unknown = [*arguments, *(name for name in values["suite"] if name not in (*SUITES, BUCKET))]
    if unknown:
        raise UserError(f"{unknown[0]!r} is not a suite: pass --suite={','.join((*SUITES, BUCKET))} or some of them.")
    if BUCKET in values["suite"]:
        command.require("data_dir", "bucket_dir", "packed_dir")
    sizes = flags.FLAGS.growth_sizes
    if not sizes or not all(size.isdigit() and int(size) >= 20 for size in sizes):
        raise UserError(f"--growth_sizes is {','.join(sizes)!r}: pass numbers of 20 or more, by comma.")
    storage.make_directory(values["output_dir"])
    command.import_tensorflow()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as directory:
        data_dir = values["data_dir"] or f"{directory}/drawn"
        if not values["data_dir"]:
            demo.draw(data_dir, images_per_class=max(10, values["pictures"] // 3 or 160))
        from trainer import contender_jobs  # imports TensorFlow

        folder = contender_jobs.pictures_of(data_dir, f"{directory}/pictures", values["pictures"])
        results = earlier(values["output_dir"], but=values["suite"])
        for name in values["suite"]:
            for suite in _suites(name, folder, directory):
                results.append(measure(suite, values["rounds"]))
                write(values["output_dir"], {"machine": machine(), "note": values["note"], "suites": results})
                print(suite_table(results[-1]), flush=True)
    print(f"written: {values['output_dir']}/benchmark.md")


def _suites(name: str, folder: str, directory: str) -> list:
    """The suites of that name, each a trainer.contenders.Suite."""
    from trainer import contender_jobs, contenders, devices, examples

    size, paths = flags.FLAGS.image_size, examples.read_folder(folder).examples.paths
    if name == "accuracy":
        budget = flags.FLAGS.budget_factor
        return [
            contender_jobs.accuracy_suite(folder, flags.FLAGS.weights, directory, image_size=size, budget_factor=budget)
        ]
    if name == "step":
        half = devices.precision("auto", contenders.one_device().kind)[0].replace("float32", "")
        numbers = {"image_size": size, "batch_size": flags.FLAGS.batch_size, "steps": flags.FLAGS.steps}
        return [contenders.step_suite(folder, paths, half=half, with_xla=flags.FLAGS.xla, **numbers)]
    if name == "input":
        large = f"{directory}/large"
        return contenders.input_suites(folder, paths, large, image_size=size, num_large=flags.FLAGS.large_pictures)
    if name == "resume":
        return [contender_jobs.resume_suite(folder, directory, image_size=size)]
    if name == BUCKET:
        places = (flags.FLAGS.data_dir, flags.FLAGS.bucket_dir, flags.FLAGS.packed_dir)
        return [contenders.bucket_suite(*places, image_size=size)]
    sizes = sorted(map(int, flags.FLAGS.growth_sizes))
    return [contender_jobs.growth_suite(folder, directory, sizes=sizes, image_size=size)]


def measure(suite: Any, rounds: int) -> dict:
    """Every contender in turn, `rounds` times over; figures and aims as JSON holds them.

    Alternating, so that whatever else the machine does meanwhile meets all of them alike.
    """
    turns = [(number, contender) for number in range(rounds) for contender in suite.contenders]
    figures: dict[str, dict[str, list[float]]] = {contender.name: {} for contender in suite.contenders}
    for _, contender in tqdm(turns, desc=suite.name, unit="turn", disable=not sys.stderr.isatty(), leave=False):
        logging.debug("%s: %s", suite.name, contender.name)
        for figure, value in contender.measure().items():
            figures[contender.name].setdefault(figure, []).append(float(value))
    aims = []
    for aim in suite.aims:
        pairs = zip(figures[aim.numerator][aim.figure], figures[aim.denominator][aim.figure], strict=True)
        ratio = statistics.median(one / other for one, other in pairs)
        is_met = ratio >= aim.bound if aim.at_least else ratio <= aim.bound
        aims.append({"aim": aim.text, "bound": aim.bound, "at_least": aim.at_least, "ratio": ratio, "is_met": is_met})
    described = {"suite": suite.name, "title": suite.title, "figure": suite.figure, "left_out": suite.left_out}
    return {**described, "rounds": rounds, "figures": figures, "aims": aims}


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
    before, here = storage.read_json(storage.join(output_dir, "benchmark.json")) or {}, machine()
    if any(before.get("machine", {}).get(name) != here[name] for name in here if name != "load"):
        return []
    return [suite for suite in before["suites"] if suite["suite"] not in but]


def write(output_dir: str, results: dict) -> None:
    """Writes benchmark.json, benchmark.md and benchmark.png."""
    storage.write_json(f"{output_dir}/benchmark.json", results)
    storage.write_whole(f"{output_dir}/benchmark.md", markdown(results))
    storage.write_whole(f"{output_dir}/benchmark.png", chart(results))


def suite_table(suite: dict) -> str:
    """One suite as a table: a row for each contender, a column for each figure: median (lowest to highest)."""
    names = list(dict.fromkeys(figure for figures in suite["figures"].values() for figure in figures))
    rows = [["", *(name.replace("_", " ") for name in names)]]
    for contender, figures in suite["figures"].items():
        rows.append([contender, *(_cell(figures[name]) if name in figures else "" for name in names)])
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


def markdown(results: dict) -> str:
    """All of it as Markdown: the machine, the aims and whether they are met, a table for each suite."""
    about = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        "# Benchmark",
        "",
        f"{about['processor']}, {about['cores']} cores, load {about['load'][0]} at the end; {versions}.",
        *([results["note"]] if results["note"] else []),
        "Each figure is the median over the rounds (lowest to highest); ratios are medians over the rounds, which alternate.",
        "",
        "![the suites as bars](benchmark.png)",
        "",
        "| aim | wanted | measured | |",
        "| --- | --- | --- | --- |",
    ]
    for suite in results["suites"]:
        for aim in suite["aims"]:
            wanted = f"{'at least' if aim['at_least'] else 'at most'} {aim['bound']:g}"
            lines.append(f"| {aim['aim']} | {wanted} | {aim['ratio']:.2f} | {'met' if aim['is_met'] else 'missed'} |")
    return "\n".join([*lines, "", *(suite_table(suite) + "\n" for suite in results["suites"])])


def chart(results: dict) -> bytes:
    """One panel of bars for each suite, medians with the spread as a line, as PNG."""
    import io

    from matplotlib.figure import Figure

    suites = results["suites"]
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
    about = results["machine"]
    figure.supxlabel(f"{about['processor']}, {about['cores']} cores", x=0.99, ha="right", fontsize=8, color="#5e5c64")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


if __name__ == "__main__":
    command.run(main, define_flags=define_flags)
