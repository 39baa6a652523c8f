"""Where a job runs: its workers, their devices, the GPU diagnosis, and the signals that stop it."""
