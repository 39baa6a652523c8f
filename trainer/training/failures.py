"""Why a job ended before its end: the error that it raises."""

import errno
import time
from typing import NoReturn

import tensorflow as tf
from absl import logging

from trainer import cli
from trainer.errors import UserError
from trainer.runtime import worker_watch
from trainer.runtime.cluster import Cluster
from trainer.training.interruption import TrainingInterrupted

# What a collective operation raises if a worker at its other end is gone.
LOST_WORKER_ERRORS = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.InternalError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
)


# All workers may raise the same UserError after a collective operation, whose result the slower ones still read from here.
COLLECTIVE_SECS = 5.0


def error_to_raise(error: Exception, *, job_dir: str, cluster: Cluster) -> Exception:
    """The error that the job raises in place of `error`.

    UserError if the user must change something; TrainingInterrupted; TimeoutError of a bucket; else the error itself,
    which no job expects. Ends the process if another worker is gone, and for a UserError that the others may not have.
    """
    if isinstance(error, TrainingInterrupted):
        return error
    if isinstance(error, TimeoutError):  # of a bucket
        reason = f"{error.strerror or error}. The last checkpoint in {job_dir} is complete"
        return TimeoutError(error.errno or errno.ETIMEDOUT, reason, error.filename or job_dir)
    if isinstance(error, LOST_WORKER_ERRORS) and cluster.workers > 1 and not cli.memory_error(error):
        lost = worker_watch.describe_unreachable(cluster, error.message)
        leave_other_workers(f"A worker exited or cannot be reached: {lost}", code=cli.EXIT_RETRY)
    fixable = _as_user_error(error, job_dir)
    if fixable and cluster.workers > 1:
        cli.print_error(fixable)
        time.sleep(COLLECTIVE_SECS)
        cli.exit_at_once(cli.EXIT_USER_ERROR)
    return fixable or error


def _as_user_error(error: Exception, job_dir: str) -> UserError | None:
    """What the user must change, None if that is not known."""
    if isinstance(error, OSError):
        return UserError(
            f"{error.filename or job_dir} cannot be written or read ({error.strerror or error}): fix that and start the "
            f"same command again; it resumes from the last complete checkpoint in {job_dir}."
        )
    return error if isinstance(error, UserError) else cli.memory_error(error)


def leave_other_workers(reason: str, *, code: int) -> NoReturn:
    """Logs the reason and ends the process at once: an orderly exit would wait for the workers."""
    advice = "start all workers again; they resume from the last complete checkpoint"
    logging.error("%s. To do: see the log of that worker, then %s.", reason, advice)
    cli.exit_at_once(code)
