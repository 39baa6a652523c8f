"""The report of a run: what a person looks at, drawn from nothing but the files in job_dir.

python -m trainer.report --job_dir=J        draws it again
"""

import os

from absl import flags, logging

from trainer import cli
from trainer.errors import UserError
from trainer.reporting import report


def define_flags() -> None:
    """Defines the flags of `python -m trainer.report`."""
    flags.DEFINE_string("job_dir", "", "The folder of a run of trainer.task, or the --report_dir of trainer.evaluate.")
    flags.DEFINE_string("report_dir", "", "Where to draw; by default job_dir/report.")


def main(arguments: list[str]) -> None:
    """Draws the report of --job_dir again."""
    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag: write --job_dir={arguments[0]} if it is the run.")
    cli.require("job_dir")
    cli.import_tensorflow()
    report_dir = flags.FLAGS.report_dir or os.path.join(flags.FLAGS.job_dir, "report")
    report.write(flags.FLAGS.job_dir, report_dir=report_dir)
    logging.info("The report is in %s", os.path.join(report_dir, "index.html"))


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
