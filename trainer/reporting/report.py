"""The report of a run: one self-contained page, and its figures as PNG files.

Drawn only from the files in job_dir, at any time: while the run trains, after it, or of an evaluation.
"""

import shlex
from typing import Any

import markupsafe

from trainer.artifacts import run_record
from trainer.artifacts.job_dir import PAGE_NAME, JobDir
from trainer.artifacts.run_record import RunRecord
from trainer.reporting import html, plots, thumbnails
from trainer.storage import files

_CONFUSION_MATRIX = "confusion_matrix.png"
_AUGMENTATION = "augmentation.png"


def write(job_dir: str, *, report_dir: str = "", only_page: bool = False) -> None:
    """Draws index.html and its PNG files into `report_dir`, by default job_dir/report.

    `only_page` leaves out the PNG files that the page does not contain; they take most of the time. Both folders may
    be local or gs://; each file is atomic. The output of trainer.evaluate, which has no history.csv and no split.csv,
    gives the same report without curves. Raises UserError if job_dir holds no run, or files of two runs.
    """
    run = run_record.read(job_dir)
    report_dir = report_dir or JobDir(job_dir).report
    mistakes = thumbnails.with_images(run, run.mistakes)
    with plots.style():
        pngs = _page_pngs(run, report_dir, reuse=only_page)
        page = _page(run, mistakes=mistakes, pngs=pngs)
        if not only_page:
            pngs |= _figure_pngs(run, mistakes)
    files.make_directory(report_dir)
    for name, contents in pngs.items():
        files.atomic_write(files.join(report_dir, name), contents)
    files.atomic_write(files.join(report_dir, PAGE_NAME), page)  # last, when its figures exist


def _page_pngs(run: RunRecord, report_dir: str, *, reuse: bool) -> dict[str, bytes]:
    """The PNG files that the page contains, by name: the confusion matrix of many classes, the augmented images.

    `reuse` takes the augmented images from an existing file: they are the same throughout a run.
    """
    pngs = {}
    if run.classification and len(run.class_names) > plots.MAX_ANNOTATED_CLASSES:
        pngs[_CONFUSION_MATRIX] = plots.png(plots.confusion_matrix(run.class_names, run.classification))
    existing = files.read(files.join(report_dir, _AUGMENTATION)) if reuse else None
    if existing:
        pngs[_AUGMENTATION] = existing
    elif images := thumbnails.augmented(run):
        pngs[_AUGMENTATION] = plots.png(plots.image_grid(images))
    return pngs


def _figure_pngs(run: RunRecord, mistakes: list[dict[str, Any]]) -> dict[str, bytes]:
    """The figures as PNG files, by name, for use outside of the page."""
    pngs = {}
    for column in ("accuracy", "val_accuracy", "loss", "val_loss"):
        if run.history:
            title = column.replace("val_", "validation ").capitalize()
            figure = plots.curves(run.history, run.best_row, [column], title)
        else:
            figure = plots.placeholder("An evaluation has no epochs." if run.is_evaluation else "No epoch is complete.")
        pngs[f"{column}.png"] = plots.png(figure)
    if run.classification:
        matrix = plots.confusion_matrix(run.class_names, run.classification)
        mistakes_figure = plots.mistakes(mistakes) if mistakes else plots.placeholder("All predictions are correct.")
    else:
        matrix = mistakes_figure = plots.placeholder("No predictions yet.")
    pngs[_CONFUSION_MATRIX] = plots.png(matrix)
    pngs["mistakes.png"] = plots.png(mistakes_figure)
    return pngs


def _page(run: RunRecord, *, mistakes: list, pngs: dict[str, bytes]) -> str:
    """The text of index.html."""
    figures: dict[str, Any] = {}
    by_f1: list[tuple[str, dict]] = []
    if run.history:
        figures["accuracy"] = plots.curves(run.history, run.best_row, ["accuracy", "val_accuracy"], "")
        figures["loss"] = plots.curves(run.history, run.best_row, ["loss", "val_loss"], "")
        figures["learning_rate"] = plots.curves(run.history, run.best_row, ["learning_rate"], "")
    if run.classification:
        figures["reliability"] = plots.reliability_diagram(run.top_probabilities, run.is_correct)
        figures["precision_recall"] = plots.precision_recall(run.class_names, run.predictions)
        classes = zip(run.class_names, run.classification.per_class, strict=True)
        by_f1 = sorted(classes, key=lambda item: item[1]["f1"] if item[1]["support"] else 2.0)  # 2: at the end
    return html.render(
        "report.html",
        run=run,
        settings=run.flags,
        defaults=run.config["defaults"],
        mistakes=mistakes,
        uncertain=thumbnails.with_images(run, run.uncertain),
        doubtful=thumbnails.with_images(run, run.doubtful),
        pairs=thumbnails.of_pairs(run),
        by_f1=by_f1,
        stage_times=_stage_times(run),
        # Markup: matplotlib has escaped the text in the figures.
        figures={name: markupsafe.Markup(plots.svg(figure, name)) for name, figure in figures.items()},
        images={name: html.data_uri(contents, "png") for name, contents in pngs.items()},
        max_annotated=plots.MAX_ANNOTATED_CLASSES,
        model_dir=shlex.quote(run.model_dir),
        job_dir=shlex.quote(run.job_dir),
    )


def _stage_times(run: RunRecord) -> list[dict[str, Any]]:
    """Per stage of time.csv: number of epochs, seconds by activity, and the speed as a share of the ceiling."""
    stages = list(dict.fromkeys(row["stage"] for row in run.times))
    columns = [name for name in (run.times[0] if run.times else {}) if name.endswith("_seconds")]
    result = []
    for stage in stages:
        rows = [row for row in run.times if row["stage"] == stage]
        parts = {name.removesuffix("_seconds").replace("_", " "): sum(row[name] for row in rows) for name in columns}
        shares = [row["images_per_second"] / row["ceiling_images_per_second"] for row in rows if _has_ceiling(row)]
        share = sum(shares) / len(shares) if shares else None
        result.append({"stage": stage, "epochs": len(rows), "parts": parts, "share_of_ceiling": share})
    return result


def _has_ceiling(row: dict[str, Any]) -> bool:
    return row.get("ceiling_images_per_second", 0) > 0 and row.get("images_per_second", -1) >= 0  # False for NaN
