"""--on_epoch: a command of the user that runs after each epoch, for example to log it to an experiment tracker."""

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

from absl import logging

TIMEOUT_SECS = 60.0
MAX_TIMEOUTS = 3  # after which the command is not run again, so that it delays a job by three minutes at most


def make_runner(command: str, job_dir: str) -> Callable[[dict[str, Any]], None]:
    """A function that runs `command` in a shell, with a row of history.csv and the job_dir as JSON on its standard input.

    It waits for the command, TIMEOUT_SECS at most, and then kills it and the processes that it started. It logs a failure
    or a timeout and never raises. Without a command it does nothing.
    """
    timeouts = 0

    def run(row: dict[str, Any]) -> None:
        nonlocal timeouts
        if not command or timeouts == MAX_TIMEOUTS:
            return
        problem = _run(command, {**row, "job_dir": job_dir})
        if problem.startswith("timeout"):
            timeouts += 1
        if problem:
            last = "; it is not run again" if timeouts == MAX_TIMEOUTS else ""
            logging.warning("--on_epoch after epoch %d: %s%s.", row["epoch"], problem, last)

    return run


def _run(command: str, row: dict[str, Any]) -> str:
    """Runs the command; returns what went wrong, an empty text for nothing."""
    # Files in place of pipes: a process that the command leaves behind cannot keep this one waiting for the end of a pipe.
    with tempfile.TemporaryFile() as row_file, tempfile.TemporaryFile() as output:
        row_file.write(json.dumps(row).encode() + b"\n")
        row_file.seek(0)
        try:
            # In a session of its own: Ctrl-C is for the job, and all of the command's processes can be killed.
            process = subprocess.Popen(
                ["/bin/sh", "-c", command],
                stdin=row_file,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return f"cannot be started ({error.strerror})"
        try:
            code = process.wait(TIMEOUT_SECS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"timeout: killed after {TIMEOUT_SECS:g} s"
        output.seek(0)
        lines = output.read().decode(errors="replace").split("\n")
        last_line = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
        return f"exit code {code}: {last_line[:200]}" if code else ""
