"""Measures this project and its alternatives in one run: alternating rounds, with median, minimum and maximum.

    python -m trainer.benchmark
        every suite, on synthetic images and ResNet50 with random weights
    python -m trainer.benchmark --data_dir=pictures --weights=weights.h5 --suite=accuracy,step
        two suites on your own images

    accuracy   seconds to 96.49 % validation accuracy: the default recipe, and the article's recipe in Keras;
               with --recipe_dirs also the accuracy of recipes on images that were cut off before
    job        time and memory of whole jobs, also with features in the cache, and of an earlier version of this project
    step       images per second of the training loop, of Keras fit, and of PyTorch where it is installed, also compiled
    inference  CPU time of the features of a job, of Keras predict, and of ONNX Runtime and OpenVINO where installed
    input      the input pipeline, image_dataset_from_directory, ImageDataGenerator and a plain decode
    resume     seconds to the first step after a cold start and after a resume; seconds to save and exit
    growth     time and memory for folders of 1,000, 10,000 and 100,000 images
    bucket     images per second from a bucket, in each way that a job reads one (only with --suite=bucket)

Writes benchmark.md, benchmark.json and benchmark.png to --output_dir. What an earlier run with the same machine and
package versions wrote there is kept, until it is measured again. All suites together take hours on two cores.
"""

import os
import tempfile

from absl import flags, logging

from trainer import cli
from trainer.benchmarks import results
from trainer.benchmarks.suite import RECIPES, Suite, one_device
from trainer.data import synthetic
from trainer.data.dataset import read_folder
from trainer.errors import UserError
from trainer.storage import files

DEFAULT_SUITES = ("accuracy", "job", "step", "inference", "input", "resume", "growth")
SUITES = (*DEFAULT_SUITES, "bucket")  # bucket needs a bucket


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string(
        "data_dir", "", "Local folder with one sub-folder of JPEG files per class. Without it, images are synthetic."
    )
    flags.DEFINE_string("weights", "none", "Suites accuracy and job: imagenet, none, or the path of a weights file.")
    flags.DEFINE_list("suite", ",".join(DEFAULT_SUITES), f"Suites to run, comma-separated: {', '.join(SUITES)}.")
    flags.DEFINE_string("output_dir", "benchmark", "Folder for benchmark.md, benchmark.json and benchmark.png.")
    flags.DEFINE_integer("rounds", 3, "Measurements of each baseline.", lower_bound=1)
    flags.DEFINE_integer("pictures", 0, "Number of images to use; 0 uses all.", lower_bound=0)
    flags.DEFINE_integer("image_size", 224, "Height and width of the network's input, in pixels.", lower_bound=32)
    flags.DEFINE_integer("batch_size", 32, "Suites step and inference: images at a time.", lower_bound=1)
    flags.DEFINE_integer("steps", 4, "Suites step and inference: steps or batches per measurement.", lower_bound=1)
    flags.DEFINE_boolean("xla", True, "Suite step: also measure steps compiled by XLA.")
    flags.DEFINE_integer("large_pictures", 240, "Suite input: number of 12-megapixel images.", lower_bound=2)
    flags.DEFINE_list("growth_sizes", "1000,10000,100000", "Suite growth: numbers of images, comma-separated.")
    flags.DEFINE_float(
        "budget_factor",
        25,
        "Suite accuracy: time limit of the article's recipe, as a multiple of the time of the default recipe.",
        lower_bound=0.1,
    )
    flags.DEFINE_list(
        "recipe_dirs", [], "Suite accuracy: folders on which recipes are compared. Without --data_dir, nothing else is."
    )
    flags.DEFINE_list("recipe_sizes", "20,50,all", "Suite accuracy: images per class, comma-separated.")
    flags.DEFINE_list("recipes", list(RECIPES), f"Suite accuracy: recipes to compare, of {', '.join(RECIPES)}.")
    flags.DEFINE_float(
        "recipe_limit_secs", 3600, "Suite accuracy: time limit of a recipe in Keras, which ends with its last epoch."
    )
    flags.DEFINE_string("note", "", "Text for benchmark.md on the conditions of the run, such as other load.")
    flags.DEFINE_string(
        "earlier_checkout", "", "Suite job: folder with an earlier version of this project, to compare with."
    )
    flags.DEFINE_string("bucket_dir", "", "Suite bucket: gs:// folder with all images of --data_dir.")
    flags.DEFINE_string("packed_dir", "", "Suite bucket: gs:// folder with the shards of these images (trainer.pack).")


def main(arguments: list[str]) -> None:
    """Runs the suites; writes the results after each of them."""
    values = cli.flag_values(("data_dir", "suite", "output_dir", "rounds", "pictures", "note"))
    _check_flags(arguments, values["suite"])
    output_dir = values["output_dir"]
    files.make_directory(output_dir)
    cli.import_tensorflow()
    from trainer.benchmarks import end_to_end  # imports TensorFlow

    with tempfile.TemporaryDirectory(prefix="benchmark-") as directory:
        data_dir = values["data_dir"]
        if not data_dir:
            data_dir = os.path.join(directory, "synthetic")
            synthetic.draw(data_dir, images_per_class=max(10, values["pictures"] // 3 or 160))
        folder = end_to_end.link_images(data_dir, os.path.join(directory, "images"), values["pictures"])
        measured = results.read_earlier(output_dir)
        for name in values["suite"]:
            for suite in _suites(name, folder, directory):
                measured = results.add(measured, results.measure(suite, values["rounds"]))
                results.write(output_dir, {"machine": results.machine(), "note": values["note"], "suites": measured})
                print(results.suite_table(measured[-1]), flush=True)
    print(f"Results: {files.join(output_dir, results.MARKDOWN_NAME)}")


def _check_flags(arguments: list[str], suites: list[str]) -> None:
    unknown = [*arguments, *(name for name in suites if name not in SUITES)]
    if unknown:
        raise UserError(f"{unknown[0]!r} is not a suite: pass --suite with one or more of {','.join(SUITES)}.")
    for name in set(flags.FLAGS.recipes) - set(RECIPES):
        raise UserError(f"--recipes has {name!r}: pass one or more of {','.join(RECIPES)}.")
    for size in flags.FLAGS.recipe_sizes:
        if size != "all" and not (size.isdigit() and int(size) >= 5):
            raise UserError(f"--recipe_sizes has {size!r}: pass comma-separated integers of 5 or more, or all.")
    earlier = flags.FLAGS.earlier_checkout
    if earlier and not os.path.isfile(os.path.join(earlier, "trainer", "task.py")):
        raise UserError(
            f"--earlier_checkout={earlier} has no trainer/task.py: pass the folder of a checkout of this project."
        )
    if "bucket" in suites:
        cli.require("data_dir", "bucket_dir", "packed_dir")
    sizes = flags.FLAGS.growth_sizes
    if not sizes or not all(size.isdigit() and int(size) >= 20 for size in sizes):
        raise UserError(f"--growth_sizes is {','.join(sizes)!r}: pass comma-separated integers of 20 or more.")


def _suites(name: str, folder: str, directory: str) -> list[Suite]:
    """The suites of that name on the images of `folder`; `directory` is for their temporary files."""
    from trainer.benchmarks import bucket, end_to_end
    from trainer.benchmarks.input import input_suites

    values = flags.FLAGS
    size = values.image_size
    if name == "accuracy":
        return [*_time_to_goal_suites(folder, directory), *_recipe_suites(directory)]
    if name == "job":
        return _job_suites(folder, directory)
    if name == "step":
        return [_step_suite(folder)]
    if name == "inference":
        return [_inference_suite()]
    if name == "input":
        return input_suites(
            folder,
            read_folder(folder).examples.paths,
            os.path.join(directory, "large"),
            image_size=size,
            num_large_images=values.large_pictures,
        )
    if name == "resume":
        return [end_to_end.resume_suite(folder, directory, image_size=size)]
    if name == "growth":
        sizes = sorted(int(number) for number in values.growth_sizes)
        return [end_to_end.growth_suite(folder, directory, sizes=sizes, image_size=size)]
    return [bucket.bucket_suite(values.data_dir, values.bucket_dir, values.packed_dir, image_size=size)]


def _time_to_goal_suites(folder: str, directory: str) -> list[Suite]:
    from trainer.benchmarks import end_to_end

    values = flags.FLAGS
    if values.recipe_dirs and not values.data_dir:
        return []
    return [
        end_to_end.accuracy_suite(
            folder, values.weights, directory, image_size=values.image_size, budget_factor=values.budget_factor
        )
    ]


def _recipe_suites(directory: str) -> list[Suite]:
    from trainer.benchmarks import recipes

    values = flags.FLAGS
    return recipes.recipe_suites(
        values.recipe_dirs,
        values.weights,
        os.path.join(directory, "recipes"),
        history_dir=os.path.join(values.output_dir, "histories"),
        image_size=values.image_size,
        sizes=[0 if size == "all" else int(size) for size in values.recipe_sizes],
        names=values.recipes,
        limit_seconds=values.recipe_limit_secs,
    )


def _job_suites(folder: str, directory: str) -> list[Suite]:
    from trainer.benchmarks import end_to_end

    values = flags.FLAGS
    if values.weights == "none":  # without weights there are no features, and no job that a user would start
        logging.warning("The suite job is not measured: pass --weights.")
        return []
    return [
        end_to_end.job_suite(
            folder,
            values.weights,
            directory,
            image_size=values.image_size,
            earlier_checkout=values.earlier_checkout,
        )
    ]


def _step_suite(folder: str) -> Suite:
    from trainer.benchmarks.training_step import Workload, step_suite

    return step_suite(
        folder,
        read_folder(folder).examples.paths,
        workload=Workload(flags.FLAGS.image_size, flags.FLAGS.batch_size, flags.FLAGS.steps),
        half_precision=_half_precision(),
        include_xla=flags.FLAGS.xla,
    )


def _inference_suite() -> Suite:
    from trainer.benchmarks.inference import inference_suite
    from trainer.benchmarks.training_step import Workload

    return inference_suite(
        workload=Workload(flags.FLAGS.image_size, flags.FLAGS.batch_size, flags.FLAGS.steps),
        half_precision=_half_precision(),
    )


def _half_precision() -> str:
    """The Keras dtype policy of half precision that is fast on this machine, or ''."""
    from trainer.runtime import devices

    precision, _ = devices.choose_precision("auto", one_device().kind)
    return "" if precision == "float32" else precision


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
