"""Files on a local disk or in a bucket: atomic writes, retries, access checks and the lock of a job_dir."""
