"""Evaluates a trained model on a labeled folder, one sub-folder per class, and draws the same report as a run.

    python -m trainer.evaluate --model_dir=J/saved_model --data_dir=unseen --report_dir=R
    python -m trainer.evaluate --model_dir=J1/saved_model,J2/saved_model --data_dir=unseen --report_dir=R
        evaluates several models on the same images and tests whether they differ
    python -m trainer.evaluate --model_dir=J/saved_model --data_dir=unseen --report_dir=R --min_precision=0.95
        also finds the probability from which on 95 % of the predictions are correct

Writes metrics.json, predictions.csv, bad_files.csv, labels.txt, config.json, index.html and its PNGs into R. For several
models these are in R/model_1, R/model_2, ..., and R has comparison.json and a page that compares the models.
"""

import functools
import os

from absl import flags

from trainer import cli
from trainer.data import label_file, tfds
from trainer.data.dataset import read_folder
from trainer.errors import UserError
from trainer.formatting import LANGUAGES
from trainer.serving import classifier


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of this command in `values`."""
    define_string = functools.partial(flags.DEFINE_string, flag_values=values)
    define_string("model_dir", "", "A saved_model folder, or the job_dir of a run; several separated by commas.")
    define_string("labels", "", "File of paths and labels, in place of folders per class, as in trainer.task.")
    define_string("data_dir", "", "Folder with one sub-folder per class, named as in the model; or tfds:NAME.")
    define_string("report_dir", "", "Folder for the report.")
    flags.DEFINE_float(
        "max_bad_fraction",
        0.01,
        "Share of unreadable files above which the command fails.",
        lower_bound=0,
        upper_bound=1,
        flag_values=values,
    )
    flags.DEFINE_float(
        "min_precision",
        0.0,
        "Find the lowest probability from which on this share of the predictions is correct, for all images and for each "
        "class; 0: do not.",
        lower_bound=0,
        upper_bound=1,
        flag_values=values,
    )
    flags.DEFINE_integer("batch_size", 32, "Images per call of the network.", lower_bound=1, flag_values=values)
    flags.DEFINE_enum("language", "en", LANGUAGES, "Language of the report.", flag_values=values)


def main(arguments: list[str]) -> None:
    """Evaluates each model and writes its report."""
    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag: write --data_dir={arguments[0]} if it is the folder.")
    run(flags.FLAGS)


def run(values: flags.FlagValues) -> None:
    """Evaluates each model and writes its report, as the flags say."""
    labels = values.labels
    cli.require("model_dir", "report_dir", *(() if labels else ("data_dir",)), values=values)
    model_dirs = [os.path.expanduser(path.strip()).rstrip("/") for path in values.model_dir.split(",") if path.strip()]
    repeated = [path for path in model_dirs if model_dirs.count(path) > 1]
    if repeated:
        raise UserError(f"--model_dir names {repeated[0]} more than once: pass different models.")
    for model_dir in model_dirs:
        classifier.check_model_dir(model_dir)  # before TensorFlow's import, which takes seconds
    max_bad_fraction = values.max_bad_fraction
    with tfds.as_folder(label_file.data_dir_for(labels, values.data_dir)) as data_dir:
        folder = read_folder(data_dir, max_bad_fraction=max_bad_fraction, min_classes=1, labels_file=labels)
        cli.import_tensorflow()

        from trainer.serving import evaluation
        from trainer.serving.evaluation import LabeledFolder

        labeled = LabeledFolder(
            data_dir=data_dir,
            folder=folder,
            batch_size=values.batch_size,
            max_bad_fraction=max_bad_fraction,
            min_precision=values.min_precision,
            language=values.language,
        )
        evaluation.evaluate_and_report(model_dirs, labeled, values.report_dir)


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
