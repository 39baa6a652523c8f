"""The report of a run: what a person looks at, drawn from nothing but the files in job_dir.

python -m trainer.report --job_dir=J        draws it again
"""

import os
import shlex
from typing import Any

from absl import flags, logging

from trainer import command, figures, page, record, storage, thumbnails
from trainer.errors import UserError
from trainer.record import Record


def write(job_dir: str, *, report_dir: str = "", only_page: bool = False) -> None:
    """Draws index.html and its PNGs into `report_dir`, by default job_dir/report, at any point of a run.

    `only_page` leaves out the PNGs, which take most of the time; the page does without them.
    Both may be local or gs:// paths; each file appears whole or not at all. What trainer.evaluate leaves (no
    history.csv, no split.csv) makes the same report without curves. Raises UserError if job_dir holds no run, or files
    of two runs.
    """
    run = record.read(job_dir)
    report_dir = report_dir or os.path.join(job_dir, "report")
    mistakes = thumbnails.with_images(run, run.mistakes)
    with figures.style():
        files = _pictures_of_the_page(run, report_dir, is_redrawn=not only_page)
        text = _page(run, mistakes, thumbnails.with_images(run, run.uncertain), files)
        files |= {} if only_page else _pngs(run, mistakes)
    storage.make_directory(report_dir)
    for name, content in files.items():
        storage.write_whole(os.path.join(report_dir, name), content)
    storage.write_whole(os.path.join(report_dir, "index.html"), text)  # last: it shows the others


def _pictures_of_the_page(run: Record, report_dir: str, *, is_redrawn: bool) -> dict[str, bytes]:
    """The PNGs that the page holds, by file name: a matrix of many classes, and augmented pictures, which stay the same."""
    files = {}
    if run.scores and len(run.labels) > figures.MAX_ANNOTATED_CLASSES:
        files["confusion_matrix.png"] = figures.png(figures.confusion_matrix(run.labels, run.scores))
    drawn_before = None if is_redrawn else storage.read(os.path.join(report_dir, "augmentation.png"))
    sheet = [] if drawn_before else thumbnails.augmented(run)
    if drawn_before or sheet:
        files["augmentation.png"] = drawn_before or figures.png(figures.sheet(sheet))
    return files


def _pngs(run: Record, mistakes: list[dict[str, Any]]) -> dict[str, bytes]:
    """The figures as files, for who wants to show one of them elsewhere."""
    drawn = {}
    for column in ("accuracy", "val_accuracy", "loss", "val_loss"):
        title = column.replace("val_", "validation ").capitalize()
        nothing = "An evaluation has no epochs." if run.is_evaluation else "No epoch has finished yet."
        drawn[column] = (
            figures.curves(run.history, run.best, [column], title) if run.history else figures.sentence(nothing)
        )
    if run.scores:
        no_mistake = figures.sentence("No mistake: every validation picture\ngets the right label.")
        drawn["confusion_matrix"] = figures.confusion_matrix(run.labels, run.scores)
        drawn["mistakes"] = figures.mistakes(mistakes) if mistakes else no_mistake
    else:
        drawn |= dict.fromkeys(("confusion_matrix", "mistakes"), figures.sentence("No predictions yet."))
    return {f"{name}.png": figures.png(figure) for name, figure in drawn.items()}


def _page(run: Record, mistakes: list, uncertain: list, files: dict[str, bytes]) -> str:
    """index.html: report.html says what stands where, this what the numbers are."""
    import markupsafe

    drawn: dict[str, Any] = {}
    by_f1: list[tuple[str, dict]] = []
    if run.history:
        drawn["accuracy"] = figures.curves(run.history, run.best, ["accuracy", "val_accuracy"], "")
        drawn["loss"] = figures.curves(run.history, run.best, ["loss", "val_loss"], "")
        drawn["learning_rate"] = figures.curves(run.history, run.best, ["learning_rate"], "")
    if run.scores:
        drawn["reliability"] = figures.reliability_diagram(*run.answers)
        of_classes = zip(run.labels, run.scores.per_class, strict=True)
        by_f1 = sorted(of_classes, key=lambda item: item[1]["f1"] if item[1]["support"] else 2.0)
    return page.render(
        "report.html",
        run=run,
        settings=run.flags,
        defaults=run.config["defaults"],
        mistakes=mistakes,
        uncertain=uncertain,
        by_f1=by_f1,
        time=_time(run),
        # Markup, since matplotlib has escaped the text in them.
        figures={name: markupsafe.Markup(figures.svg(figure, name)) for name, figure in drawn.items()},
        pictures={name: page.data_uri(contents, "png") for name, contents in files.items()},
        max_annotated=figures.MAX_ANNOTATED_CLASSES,
        model_dir=shlex.quote(run.model_dir),
        job_dir=shlex.quote(run.job_dir),
    )


def _time(run: Record) -> list[dict[str, Any]]:
    """For each stage in time.csv, and for all: its seconds by what they went to, and how close to the ceiling it came."""
    stages = list(dict.fromkeys(row["stage"] for row in run.time))
    groups = {stage: [row for row in run.time if row["stage"] == stage] for stage in stages}
    names = [name for name in (run.time[0] if run.time else {}) if name.endswith("_seconds")]
    table = []
    for stage, rows in groups.items():
        parts = {name.removesuffix("_seconds").replace("_", " "): sum(row[name] for row in rows) for name in names}
        speeds = [row["images_per_second"] / row["ceiling_images_per_second"] for row in rows if _has_ceiling(row)]
        share = sum(speeds) / len(speeds) if speeds else None
        table.append({"stage": stage, "epochs": len(rows), "parts": parts, "share_of_ceiling": share})
    return table


def _has_ceiling(row: dict[str, Any]) -> bool:
    return row.get("ceiling_images_per_second", 0) > 0 and row.get("images_per_second", -1) >= 0  # false for NaN


def define_flags() -> None:
    """Defines the flags of `python -m trainer.report`."""
    flags.DEFINE_string("job_dir", "", "The folder of a run of trainer.task, or the --report_dir of trainer.evaluate.")
    flags.DEFINE_string("report_dir", "", "Where to draw; by default job_dir/report.")


def main(arguments: list[str]) -> None:
    """Draws the report of --job_dir again."""
    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag: write --job_dir={arguments[0]} if it is the run.")
    command.require("job_dir")
    command.import_tensorflow()
    report_dir = flags.FLAGS.report_dir or os.path.join(flags.FLAGS.job_dir, "report")
    write(flags.FLAGS.job_dir, report_dir=report_dir)
    logging.info("The report is in %s", os.path.join(report_dir, "index.html"))


if __name__ == "__main__":
    command.run(main, define_flags=define_flags)
