"""The files of a run, written without a run, with names that would break an unescaped page."""

import csv
import json
import pathlib

from PIL import Image

from trainer.artifacts.job_dir import (
    BAD_FILE_COLUMNS,
    HISTORY_COLUMNS,
    PREDICTION_COLUMNS,
    TIME_COLUMNS,
    JobDir,
)
from trainer.config import DEFAULTS
from trainer.data.splits import SPLIT_COLUMNS

SCRIPT, MATH, LONG = "<script>alert(1)<", "a$b$c_{", "x" * 120
CLASSES = (SCRIPT, MATH, "猫 & قطة", LONG)
FLAGS = {
    "job_dir": "",
    "model_dir": "",
    "image_size": 64,
    "weights": "none",
    "head": "average",
    "price_per_hour": 3.5,
    "augment": False,
    "head_epochs": 2,
    "epochs": 3,
    "batch_size": 24,
}
HISTORY = (
    (1, "head", 0.9, 0.61, 0.8, 0.625, 1e-3, 2.0, 8.0),
    (2, "head", 0.5, 0.8, 0.6, 0.75, 1e-3, 2.0, 8.0),
    (3, "all", 0.3, 0.9137, 0.4, 0.875, 1e-5, 4.0, 4.0),
    (4, "all", 0.2, 1.0, 0.5, 0.75, 1e-6, 4.0, 4.25),
)
TIMES = (
    (1, "head", 0.5, 1.5, 1, 0, 8, ""),
    (2, "head", 0.5, 1.5, 0, 1, 8, ""),
    (3, "all", 10, 20, 5, 5, 4, 5),
)
METRICS = {
    "val_accuracy": 0.75,
    "best_epoch": 3,
    "train_images": 16,
    "validation_images": 8,
    "bad_images": 1,
    "val_loss": 0.4,
    "cost": 0.0812,
    "seconds": 83.4,
    "images_per_second": 5.4321,
    "replicas": 2,
    "workers": 1,
    "precision": "float32",
}


def make_job_dir(
    tmp_path: pathlib.Path,
    *,
    history=HISTORY,
    with_predictions=True,
    finished=True,
    mistakes=True,
    explained=False,
    timed=False,
) -> pathlib.Path:
    """A job_dir with the requested files.

    With `mistakes`, one validation image of the first class and one of the second are classified wrongly; `explained`
    writes heat maps, `timed` time.csv.
    """
    job_dir, data_dir = tmp_path / "job", tmp_path / "shapes & <b>sizes"
    job_dir.mkdir()
    paths = JobDir(str(job_dir))
    split, predictions = _write_images(data_dir, mistakes=mistakes)
    pathlib.Path(paths.config).write_text(json.dumps(_config(data_dir)))
    pathlib.Path(paths.labels).write_text("".join(f"{name}\n" for name in CLASSES), "utf-8")
    write_csv(paths.split, SPLIT_COLUMNS, split)
    write_csv(paths.bad_files, BAD_FILE_COLUMNS, [('odd,\n"name".jpg', "not a <picture>")])
    if history:
        write_csv(paths.history, HISTORY_COLUMNS, history)
    if with_predictions:
        write_csv(paths.predictions, PREDICTION_COLUMNS, predictions)
    if finished:
        pathlib.Path(paths.metrics).write_text(json.dumps(METRICS))
    if explained:
        maps = {row[0]: [[0, 0, 0], [0, 255, 128], [0, 64, 0]] for row in predictions}
        pathlib.Path(paths.heatmaps).write_text(json.dumps({"epoch": 3, "maps": maps}))
    if timed:
        write_csv(paths.time, TIME_COLUMNS, TIMES)
    return job_dir


def write_many_classes(job_dir: pathlib.Path, number: int) -> None:
    """Gives the run `number` classes of two validation images, without the images; class 3 is predicted as class 4."""
    names = [f"class {index:04d}" for index in range(number)]
    paths = [(f"{name}/{image}.jpg", name) for name in names for image in range(2)]
    predicted = {names[3]: names[4]}
    write_csv(job_dir / "split.csv", SPLIT_COLUMNS, [(path, name, "validation", path) for path, name in paths])
    rows = [(path, name, predicted.get(name, name), 0.9, 0.9) for path, name in paths]
    write_csv(job_dir / "predictions.csv", PREDICTION_COLUMNS, rows)
    (job_dir / "labels.txt").write_text("".join(f"{name}\n" for name in names))


def _write_images(data_dir: pathlib.Path, *, mistakes: bool) -> tuple[list[tuple], list[tuple]]:
    """Writes six images per class, one of them unreadable; returns the rows of split.csv and predictions.csv."""
    split, predictions = [], []
    for index, name in enumerate(CLASSES):
        (data_dir / name).mkdir(parents=True)
        for number in range(6):
            path = f"{name}/{number}.png"
            split.append((path, name, "validation" if number < 2 else "training", f"{index}{number}"))
            Image.new("RGB", (360 + 160 * number, 400), (60 * index, 200, 40 * number)).save(data_dir / path)
            if number >= 2:
                continue
            if mistakes and (index, number) in ((0, 0), (1, 1)):
                predictions.append((path, name, CLASSES[(index + 1) % len(CLASSES)], 0.9321, 0.05))
            else:
                predictions.append((path, name, name, 0.71 + 0.03 * index, 0.71))
    (data_dir / MATH / "1.png").write_bytes(b"not an image")
    return split, predictions


def _config(data_dir: pathlib.Path) -> dict:
    return {
        "flags": {**DEFAULTS, "data_dir": str(data_dir), **FLAGS},
        "defaults": {**DEFAULTS, **FLAGS, "batch_size": 32},
        "resolved": {
            "split": "0.2 of each class",
            "precision": "float32",
            "precision_reason": "CPU without <bf16>",
            "devices": ["CPU:0", "CPU:1"],
        },
        "versions": {"tensorflow": "2.21.0", "trainer": "0.1.0"},
    }


def write_csv(path, columns, rows) -> None:
    """Writes a CSV file."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
