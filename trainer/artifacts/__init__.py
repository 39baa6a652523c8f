"""The files in a job_dir, and the metrics that they hold."""
