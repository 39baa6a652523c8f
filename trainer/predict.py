"""Labels pictures with a trained model: files, folders, gs:// paths.

    python -m trainer.predict --model_dir=J/saved_model photo.jpg holiday/
    python -m trainer.predict --model_dir=J --output=labels.csv holiday/

--model_dir is a SavedModel, or the job_dir of a run, whose network is then rebuilt and given best.weights.h5.
A table goes to the terminal, or with --output=x.csv or x.jsonl a file with the probability of every class. Stopped
before its end, the same command with --output goes on where it was.
"""

from absl import flags, logging

from trainer import cli
from trainer.errors import UserError
from trainer.serving import batch
from trainer.serving.batch import Tally
from trainer.serving.classifier import check_model_dir, load
from trainer.storage import files


def define_flags() -> None:
    """The flags of this command."""
    flags.DEFINE_string("model_dir", "", "A saved_model folder, or the job_dir of a run.")
    flags.DEFINE_string("output", "", "Write the probability of every class here, as .csv or .jsonl, not a table.")
    flags.DEFINE_integer("batch_size", 32, "Pictures per call of the network.", lower_bound=1)


def main(arguments: list[str]) -> int:
    """Labels the pictures and returns 0, or 2 if none could be labelled."""
    cli.require("model_dir")
    if not files.is_remote(flags.FLAGS.model_dir):
        check_model_dir(flags.FLAGS.model_dir)
    output = flags.FLAGS.output
    if not arguments:
        raise UserError("no pictures: name files or folders behind the flags.")
    if output and not output.endswith((".csv", ".jsonl")):
        raise UserError(f"--output={output} ends neither in .csv nor in .jsonl: name it so.")
    cli.import_tensorflow()
    total = sum(1 for _ in batch.find_images(arguments))
    if not total:
        raise UserError(f"There are no files below {', '.join(arguments)}.")
    classifier, batch_size = load(flags.FLAGS.model_dir), flags.FLAGS.batch_size
    if output:
        model = batch.model_fingerprint(flags.FLAGS.model_dir)
        tally = batch.write_predictions(classifier, arguments, output, model=model, total=total, batch_size=batch_size)
        logging.info("%d pictures labelled, %d could not be: %s", tally.images - tally.failures, tally.failures, output)
    else:
        tally = Tally()
        predictions = batch.predict(classifier, batch.find_images(arguments), batch_size=batch_size)
        for line in batch.format_table(tally.over(predictions), classifier.class_names):
            print(line, flush=True)
    first = tally.first_failure
    if first and tally.failures == tally.images:
        raise UserError(f"none of {tally.images} files could be labelled; the first: {first.path}: {first.error}.")
    return 0


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
