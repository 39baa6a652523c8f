"""The report of a run: one self-contained page, and its figures as PNG files.

Drawn only from the files in job_dir, at any time: while the run trains, after it, or of an evaluation.
"""

import shlex
from typing import Any

import markupsafe

from trainer import formatting
from trainer.artifacts import run_record
from trainer.artifacts.job_dir import PAGE_NAME, JobDir
from trainer.artifacts.run_record import RunRecord
from trainer.formatting import translate
from trainer.reporting import html, plots, thumbnails
from trainer.storage import files

_AUGMENTATION = "augmentation.svg"
_MAX_CLASS_ROWS = 100  # of a table of classes, of which metrics.json has all


def write(job_dir: str, *, report_dir: str = "", only_page: bool = False, language: str = "") -> None:
    """Draws index.html and its PNG files into `report_dir`, by default job_dir/report.

    `only_page` leaves out the PNG files, which take most of the time. `language` is one of formatting.LANGUAGES, by
    default that of the run. Both folders may be local or gs://; each file is atomic. The output of trainer.evaluate, which
    has no history.csv and no split.csv, gives the same report without curves. Raises UserError if job_dir holds no run, or
    files of two runs.
    """
    run = run_record.read(job_dir)
    report_dir = report_dir or JobDir(job_dir).report
    with plots.style(), formatting.in_language(language or run.language):
        mistakes = thumbnails.with_images(run, run.mistakes)
        augmentation = _augmentation(run, report_dir, reuse=only_page)
        page = _page(run, mistakes=mistakes, augmentation=augmentation)
        figures: dict[str, str | bytes] = {} if only_page else dict(_figure_pngs(run, mistakes))
    if augmentation:
        figures[_AUGMENTATION] = augmentation
    files.make_directory(report_dir)
    for name, contents in figures.items():
        files.atomic_write(files.join(report_dir, name), contents)
    files.atomic_write(files.join(report_dir, PAGE_NAME), page)  # last, when its figures exist


def _augmentation(run: RunRecord, report_dir: str, *, reuse: bool) -> str:
    """The augmented images as an SVG file, "" without augmentation.

    `reuse` takes them from an existing file: they are the same throughout a run.
    """
    existing = files.read(files.join(report_dir, _AUGMENTATION)) if reuse else None
    if existing:
        return existing.decode()
    images = thumbnails.augmented(run)
    return plots.svg(plots.image_grid(images), "augmentation") if images else ""


def _figure_pngs(run: RunRecord, mistakes: list[dict[str, Any]]) -> dict[str, bytes]:
    """The figures as PNG files, by name, for use outside of the page."""
    pngs = {}
    for column in ("accuracy", "val_accuracy", "loss", "val_loss"):
        if run.history:
            title = {
                "accuracy": translate("Accuracy"),
                "val_accuracy": translate("Validation accuracy"),
                "loss": translate("Loss"),
                "val_loss": translate("Validation loss"),
            }[column]
            figure = plots.curves(run.history, run.best_row, [column], title)
        else:
            has_no_epochs, is_at_start = translate("An evaluation has no epochs."), translate("No epoch is complete.")
            figure = plots.placeholder(has_no_epochs if run.is_evaluation else is_at_start)
        pngs[f"{column}.png"] = plots.png(figure)
    if run.classification:
        matrix = plots.confusion_matrix(run.class_names, run.classification)
        mistakes_figure = (
            plots.mistakes(mistakes) if mistakes else plots.placeholder(translate("All predictions are correct."))
        )
    else:
        matrix = mistakes_figure = plots.placeholder(translate("No predictions yet."))
    pngs["confusion_matrix.png"] = plots.png(matrix)
    pngs["mistakes.png"] = plots.png(mistakes_figure)
    return pngs


def _page(run: RunRecord, *, mistakes: list, augmentation: str) -> str:
    """The text of index.html. `augmentation` is the SVG file of the augmented images."""
    figures: dict[str, Any] = {}
    by_f1: list[tuple[str, dict]] = []
    if run.history:
        figures["accuracy"] = plots.curves(run.history, run.best_row, ["accuracy", "val_accuracy"], "")
        figures["loss"] = plots.curves(run.history, run.best_row, ["loss", "val_loss"], "")
        figures["learning_rate"] = plots.curves(run.history, run.best_row, ["learning_rate"], "")
    if run.classification:
        figures["reliability"] = plots.reliability_diagram(run.top_probabilities, run.is_correct)
        figures["precision_recall"] = plots.precision_recall(run.class_names, run.predictions)
        if len(run.class_names) > plots.MAX_ANNOTATED_CLASSES:
            figures["confusion_matrix"] = plots.confusion_matrix(run.class_names, run.classification)
        classes = zip(run.class_names, run.classification.per_class, strict=True)
        by_f1 = sorted(classes, key=lambda item: item[1]["f1"] if item[1]["support"] else 2.0)  # 2: at the end
    # Markup: matplotlib has escaped the text in the figures.
    elements = {name: markupsafe.Markup(plots.svg_element(plots.svg(figure, name))) for name, figure in figures.items()}
    elements["augmentation"] = markupsafe.Markup(plots.svg_element(augmentation) if augmentation else "")
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
        figures=elements,
        max_annotated=plots.MAX_ANNOTATED_CLASSES,
        max_rows=_MAX_CLASS_ROWS,
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
