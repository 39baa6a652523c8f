"""trainer.tune over the jobs of tiny_job.py, with fewer trials before it begins to judge. Not a test itself."""

import pathlib
import sys

from trainer import command, tune

if __name__ == "__main__":
    tune.PROGRAM = (sys.executable, str(pathlib.Path(__file__).with_name("tiny_job.py")))
    tune.STARTUP_TRIALS = 1
    command.run(tune.main, define_flags=tune.define_flags)
