"""trainer.tune with the small network of tiny_job.py, and with pruning from the second trial on. Not a test itself."""

import pathlib
import sys

from trainer import cli, tune

if __name__ == "__main__":
    tune.TRIAL_COMMAND = (sys.executable, str(pathlib.Path(__file__).with_name("tiny_job.py")))
    tune.STARTUP_TRIALS = 1
    cli.run(tune.main, define_flags=tune.define_flags)
