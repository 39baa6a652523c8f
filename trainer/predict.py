"""Classifies images with a trained model: files, folders, gs:// paths.

    python -m trainer.predict --model_dir=J/saved_model photo.jpg holiday/
    python -m trainer.predict --model_dir=J --output=labels.csv holiday/

--model_dir is a SavedModel, or the job_dir of a run, whose network is then rebuilt with the weights in best.weights.h5.
Prints a table, or writes a file with the probability of every class: --output=x.csv or x.jsonl. The CSV is safe to open in
a spreadsheet: a name that begins like a formula gets an apostrophe before it. The JSON Lines hold all names exactly. If the
command is stopped, the same command with --output resumes.
"""

from absl import flags, logging

from trainer import cli
from trainer.data import listing
from trainer.errors import UserError
from trainer.serving import batch
from trainer.serving.batch import Tally
from trainer.serving.classifier import check_model_dir, load
from trainer.storage import files


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("model_dir", "", "A saved_model folder, or the job_dir of a run.")
    flags.DEFINE_string("output", "", "Write the probability of every class to this .csv or .jsonl, not a table.")
    flags.DEFINE_integer("batch_size", 32, "Images per call of the network.", lower_bound=1)


def main(arguments: list[str]) -> int:
    """Classifies the images. Raises UserError if none can be classified."""
    cli.require("model_dir")
    model_dir, output, batch_size = flags.FLAGS.model_dir, flags.FLAGS.output, flags.FLAGS.batch_size
    if not files.is_remote(model_dir):
        check_model_dir(model_dir)
    if not arguments:
        raise UserError("no images: pass files or folders after the flags.")
    if output and not output.endswith((".csv", ".jsonl")):
        raise UserError(f"--output={output} ends in neither .csv nor .jsonl: pass a name that does.")
    cli.import_tensorflow()
    total = sum(1 for _ in batch.find_images(arguments))
    if not total:
        raise UserError(f"There are no files below {', '.join(map(listing.escape_name, arguments))}.")
    classifier = load(model_dir)
    if output:
        tally = batch.write_predictions(
            classifier,
            arguments,
            output,
            fingerprint=batch.model_fingerprint(model_dir),
            total=total,
            batch_size=batch_size,
        )
        num_classified = tally.images - tally.failures
        logging.info("%d images classified, %d failed: %s", num_classified, tally.failures, output)
    else:
        tally = Tally()
        predictions = batch.predict(classifier, batch.find_images(arguments), batch_size=batch_size)
        for line in batch.format_table(tally.over(predictions), classifier.class_names):
            print(line, flush=True)
    first = tally.first_failure
    if first and tally.failures == tally.images:
        name = listing.escape_name(first.path)
        raise UserError(f"none of {tally.images} files could be classified; the first: {name}: {first.error}.")
    return 0


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
