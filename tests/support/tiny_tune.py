"""trainer.tune over the jobs of tiny_job.py, with fewer trials before it begins to judge. Not a test itself."""

import sys

from tests.support.paths import TINY_JOB
from trainer import cli, tune

if __name__ == "__main__":
    tune.PROGRAM = (sys.executable, str(TINY_JOB))
    tune.STARTUP_TRIALS = 1
    cli.run(tune.main, define_flags=tune.define_flags)
