"""Draws the report of a run from the files in its job_dir.

python -m trainer.report --job_dir=J
"""

from absl import flags, logging

from trainer import cli
from trainer.artifacts.job_dir import PAGE_NAME, JobDir
from trainer.errors import UserError
from trainer.formatting import LANGUAGES
from trainer.reporting import report
from trainer.storage import files


def define_flags() -> None:
    """Defines the flags of `python -m trainer.report`."""
    flags.DEFINE_string("job_dir", "", "The folder of a run of trainer.task, or the --report_dir of trainer.evaluate.")
    flags.DEFINE_string("report_dir", "", "Folder for the report. Default: report in --job_dir.")
    flags.DEFINE_enum("language", None, LANGUAGES, "Language of the report. Default: that of the run.")


def main(arguments: list[str]) -> None:
    """Draws the report of --job_dir."""
    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag: write --job_dir={arguments[0]} if it is the run.")
    cli.require("job_dir")
    cli.import_tensorflow()
    job_dir = flags.FLAGS.job_dir
    report_dir = flags.FLAGS.report_dir or JobDir(job_dir).report
    report.write(job_dir, report_dir=report_dir, language=flags.FLAGS.language or "")
    logging.info("The report is in %s", files.join(report_dir, PAGE_NAME))


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
