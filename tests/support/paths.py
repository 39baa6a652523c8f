"""Where the project, its test scripts and the shared data are."""

import pathlib

ROOT = pathlib.Path(__file__).parents[2]
TINY_JOB = ROOT / "tests" / "support" / "tiny_job.py"
TINY_TUNE = ROOT / "tests" / "support" / "tiny_tune.py"
REPLICA_RUN = ROOT / "tests" / "support" / "replica_run.py"
SHARED = ROOT.parent / "shared"
WEIGHTS = SHARED / "weights" / "resnet50_imagenet_pruned_notop.weights.h5"
