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

import tempfile

from absl import flags

from trainer import cli
from trainer.benchmarks import bucket, input, results
from trainer.benchmarks.suite import one_device
from trainer.data import synthetic
from trainer.data.dataset import read_folder
from trainer.errors import UserError
from trainer.storage import files

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
    values = cli.flag_values(("data_dir", "suite", "output_dir", "rounds", "pictures", "note"))
    unknown = [*arguments, *(name for name in values["suite"] if name not in (*SUITES, BUCKET))]
    if unknown:
        raise UserError(f"{unknown[0]!r} is not a suite: pass --suite={','.join((*SUITES, BUCKET))} or some of them.")
    if BUCKET in values["suite"]:
        cli.require("data_dir", "bucket_dir", "packed_dir")
    sizes = flags.FLAGS.growth_sizes
    if not sizes or not all(size.isdigit() and int(size) >= 20 for size in sizes):
        raise UserError(f"--growth_sizes is {','.join(sizes)!r}: pass numbers of 20 or more, by comma.")
    files.make_directory(values["output_dir"])
    cli.import_tensorflow()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as directory:
        data_dir = values["data_dir"] or f"{directory}/drawn"
        if not values["data_dir"]:
            synthetic.draw(data_dir, images_per_class=max(10, values["pictures"] // 3 or 160))
        from trainer.benchmarks import end_to_end  # imports TensorFlow

        folder = end_to_end.link_images(data_dir, f"{directory}/pictures", values["pictures"])
        measurements = results.earlier(values["output_dir"], but=values["suite"])
        for name in values["suite"]:
            for suite in _suites(name, folder, directory):
                measurements.append(results.measure(suite, values["rounds"]))
                results.write(
                    values["output_dir"], {"machine": results.machine(), "note": values["note"], "suites": measurements}
                )
                print(results.suite_table(measurements[-1]), flush=True)
    print(f"written: {values['output_dir']}/benchmark.md")


def _suites(name: str, folder: str, directory: str) -> list:
    """The suites of that name, each a trainer.contenders.Suite."""
    from trainer.benchmarks import end_to_end, training_step
    from trainer.runtime import devices

    size, paths = flags.FLAGS.image_size, read_folder(folder).examples.paths
    if name == "accuracy":
        budget = flags.FLAGS.budget_factor
        return [
            end_to_end.accuracy_suite(folder, flags.FLAGS.weights, directory, image_size=size, budget_factor=budget)
        ]
    if name == "step":
        half = devices.choose_precision("auto", one_device().kind)[0].replace("float32", "")
        numbers = {"image_size": size, "batch_size": flags.FLAGS.batch_size, "steps": flags.FLAGS.steps}
        return [training_step.step_suite(folder, paths, half=half, with_xla=flags.FLAGS.xla, **numbers)]
    if name == "input":
        large = f"{directory}/large"
        return input.input_suites(folder, paths, large, image_size=size, num_large=flags.FLAGS.large_pictures)
    if name == "resume":
        return [end_to_end.resume_suite(folder, directory, image_size=size)]
    if name == BUCKET:
        indices = (flags.FLAGS.data_dir, flags.FLAGS.bucket_dir, flags.FLAGS.packed_dir)
        return [bucket.bucket_suite(*indices, image_size=size)]
    sizes = sorted(map(int, flags.FLAGS.growth_sizes))
    return [end_to_end.growth_suite(folder, directory, sizes=sizes, image_size=size)]


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
