"""TODO."""

import shlex
from typing import Any

from trainer.artifacts import run_record
from trainer.artifacts.job_dir import PAGE_NAME, JobDir
from trainer.artifacts.run_record import RunRecord
from trainer.reporting import html, plots, thumbnails
from trainer.storage import files


def write(job_dir: str, *, report_dir: str = "", only_page: bool = False) -> None:
    """Draws index.html and its PNGs into `report_dir`, by default job_dir/report, at any point of a run.

    `only_page` leaves out the PNGs, which take most of the time; the page does without them.
    Both may be local or gs:// paths; each file appears whole or not at all. What trainer.evaluate leaves (no
    history.csv, no split.csv) makes the same report without curves. Raises UserError if job_dir holds no run, or files
    of two runs.
    """
    run = run_record.read(job_dir)
    report_dir = report_dir or JobDir(job_dir).report
    mistakes = thumbnails.with_images(run, run.mistakes)
    with plots.style():
        pngs = _page_images(run, report_dir, is_redrawn=not only_page)
        page = _page(run, mistakes, thumbnails.with_images(run, run.uncertain), pngs)
        pngs |= {} if only_page else _pngs(run, mistakes)
    files.make_directory(report_dir)
    for name, contents in pngs.items():
        files.atomic_write(files.join(report_dir, name), contents)
    files.atomic_write(files.join(report_dir, PAGE_NAME), page)  # last: it shows the others


def _page_images(run: RunRecord, report_dir: str, *, is_redrawn: bool) -> dict[str, bytes]:
    """The PNGs that the page holds, by file name: a matrix of many classes, and augmented pictures, which stay the same."""
    pngs = {}
    if run.scores and len(run.labels) > plots.MAX_ANNOTATED_CLASSES:
        pngs["confusion_matrix.png"] = plots.png(plots.confusion_matrix(run.labels, run.scores))
    drawn_before = None if is_redrawn else files.read(files.join(report_dir, "augmentation.png"))
    sheet = [] if drawn_before else thumbnails.augmented(run)
    if drawn_before or sheet:
        pngs["augmentation.png"] = drawn_before or plots.png(plots.image_grid(sheet))
    return pngs


def _pngs(run: RunRecord, mistakes: list[dict[str, Any]]) -> dict[str, bytes]:
    """The figures as files, for who wants to show one of them elsewhere."""
    drawn = {}
    for column in ("accuracy", "val_accuracy", "loss", "val_loss"):
        title = column.replace("val_", "validation ").capitalize()
        nothing = "An evaluation has no epochs." if run.is_evaluation else "No epoch has finished yet."
        drawn[column] = (
            plots.curves(run.history, run.best, [column], title) if run.history else plots.placeholder(nothing)
        )
    if run.scores:
        no_mistake = plots.placeholder("No mistake: every validation picture\ngets the right label.")
        drawn["confusion_matrix"] = plots.confusion_matrix(run.labels, run.scores)
        drawn["mistakes"] = plots.mistakes(mistakes) if mistakes else no_mistake
    else:
        drawn |= dict.fromkeys(("confusion_matrix", "mistakes"), plots.placeholder("No predictions yet."))
    return {f"{name}.png": plots.png(figure) for name, figure in drawn.items()}


def _page(run: RunRecord, mistakes: list, uncertain: list, files: dict[str, bytes]) -> str:
    """index.html: report.html says what stands where, this what the numbers are."""
    import markupsafe

    drawn: dict[str, Any] = {}
    by_f1: list[tuple[str, dict]] = []
    if run.history:
        drawn["accuracy"] = plots.curves(run.history, run.best, ["accuracy", "val_accuracy"], "")
        drawn["loss"] = plots.curves(run.history, run.best, ["loss", "val_loss"], "")
        drawn["learning_rate"] = plots.curves(run.history, run.best, ["learning_rate"], "")
    if run.scores:
        drawn["reliability"] = plots.reliability_diagram(*run.answers)
        of_classes = zip(run.labels, run.scores.per_class, strict=True)
        by_f1 = sorted(of_classes, key=lambda item: item[1]["f1"] if item[1]["support"] else 2.0)
    return html.render(
        "report.html",
        run=run,
        settings=run.flags,
        defaults=run.config["defaults"],
        mistakes=mistakes,
        uncertain=uncertain,
        by_f1=by_f1,
        time=_time(run),
        # Markup, since matplotlib has escaped the text in them.
        figures={name: markupsafe.Markup(plots.svg(figure, name)) for name, figure in drawn.items()},
        images={name: html.data_uri(contents, "png") for name, contents in files.items()},
        max_annotated=plots.MAX_ANNOTATED_CLASSES,
        model_dir=shlex.quote(run.model_dir),
        job_dir=shlex.quote(run.job_dir),
    )


def _time(run: RunRecord) -> list[dict[str, Any]]:
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
