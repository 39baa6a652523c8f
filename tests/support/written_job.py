"""The files of a run, written without running it, with names that try to break a page. Not a test itself."""

import csv
import json

from PIL import Image

from trainer.config import DEFAULTS

SCRIPT, MATH, LONG = "<script>alert(1)<", "a$b$c_{", "x" * 120
CLASSES = (SCRIPT, MATH, "猫 & قطة", LONG)
FLAGS = {
    **{
        "job_dir": "",
        "model_dir": "",
        "image_size": 64,
        "weights": "none",
        "head": "average",
        "price_per_hour": 3.5,
        "augment": False,
    },
    **{"head_epochs": 2, "epochs": 3, "batch_size": 24},
}
HISTORY = (  # epoch, stage, loss, accuracy, val_loss, val_accuracy, learning_rate, seconds, images_per_second
    *((1, "head", 0.9, 0.61, 0.8, 0.625, 1e-3, 2.0, 8.0), (2, "head", 0.5, 0.8, 0.6, 0.75, 1e-3, 2.0, 8.0)),
    *((3, "all", 0.3, 0.9137, 0.4, 0.875, 1e-5, 4.0, 4.0), (4, "all", 0.2, 1.0, 0.5, 0.75, 1e-6, 4.0, 4.25)),
)

TIME_COLUMNS = (
    "epoch,stage,input_wait_seconds,compute_seconds,validation_seconds,saving_seconds,images_per_second,"
    "ceiling_images_per_second"
)
TIME = ((1, "head", 0.5, 1.5, 1, 0, 8, ""), (2, "head", 0.5, 1.5, 0, 1, 8, ""), (3, "all", 10, 20, 5, 5, 4, 5))


def make_job_dir(
    tmp_path, *, history=HISTORY, with_predictions=True, finished=True, mistakes=True, explained=False, timed=False
):
    """A job_dir with the files asked for; half of the first class's and of the second's pictures are mistaken."""
    job_dir, data_dir = tmp_path / "job", tmp_path / "shapes & <b>sizes"
    job_dir.mkdir()
    split, predictions = [], []
    for index, name in enumerate(CLASSES):
        (data_dir / name).mkdir(parents=True)
        for number in range(6):
            path = f"{name}/{number}.png"
            side = "validation" if number < 2 else "training"
            split.append((path, name, side, f"{index}{number}"))
            Image.new("RGB", (360 + 160 * number, 400), (60 * index, 200, 40 * number)).save(data_dir / path)
            if side == "validation":
                wrong = mistakes and (index, number) in ((0, 0), (1, 1))
                guess = CLASSES[(index + 1) % len(CLASSES)] if wrong else name
                predictions.append(
                    (path, name, guess, 0.9321 if wrong else 0.71 + 0.03 * index, 0.05 if wrong else 0.71)
                )
    (data_dir / CLASSES[1] / "1.png").write_bytes(b"no picture any more")
    config = {
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
    (job_dir / "config.json").write_text(json.dumps(config))
    (job_dir / "labels.txt").write_text("".join(f"{name}\n" for name in CLASSES), "utf-8")
    write_csv(job_dir / "split.csv", "path,label,split,content_hash", split)
    write_csv(job_dir / "bad_files.csv", "path,reason", [('odd,\n"name".jpg', "not a <picture>")])
    columns = "epoch,stage,loss,accuracy,val_loss,val_accuracy,learning_rate,seconds,images_per_second"
    if history:
        write_csv(job_dir / "history.csv", columns, history)
    if with_predictions:
        write_csv(job_dir / "predictions.csv", "path,label,predicted,probability,label_probability", predictions)
    if finished:
        metrics = {
            **{"val_accuracy": 0.75, "best_epoch": 3, "train_images": 16, "validation_images": 8, "bad_images": 1},
            **{
                "val_loss": 0.4,
                "cost": 0.0812,
                "seconds": 83.4,
                "images_per_second": 5.4321,
                "replicas": 2,
                "workers": 1,
                "precision": "float32",
            },
        }
        (job_dir / "metrics.json").write_text(json.dumps(metrics))
    if explained:
        maps = {row[0]: [[0, 0, 0], [0, 255, 128], [0, 64, 0]] for row in predictions}
        (job_dir / "gradcam.json").write_text(json.dumps({"epoch": 3, "maps": maps}))
    if timed:
        write_csv(job_dir / "time.csv", TIME_COLUMNS, TIME)
    return job_dir


def write_csv(path, header, rows):
    """A CSV file of these columns, named as `a,b,c`."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([header.split(","), *rows])
