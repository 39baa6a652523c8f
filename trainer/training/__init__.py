"""Training: steps on any number of replicas, stages, checkpoints and resume."""
