"""Runs a command that is killed at each of its writes, one after another. Not a test itself.

    python killed_job.py LOG EVERY task|pack|predict|evaluate|report|tune [arguments of the command]

`task` is that of tiny_job.py, which the trials of `tune` run too.

Each start is killed by SIGKILL before the first write at which no earlier start was killed, when the contents are in a
temporary file and not yet in place; the next start resumes. With EVERY above 1, at every so manyth write. The starts are
forks of one process that has imported TensorFlow, to save time. Prints the writes, then the exit code of the last start.
"""

import collections
import os
import pathlib
import re
import signal
import sys

import trainer.evaluate as evaluate  # `from trainer import evaluate` is the function of the Python API
from tests.support import tiny_job
from trainer import cli, pack, predict, report, task, tune
from trainer.storage import files, lock

COMMANDS = {
    "task": (tiny_job.main, task.define_flags),
    "pack": (pack.main, pack.define_flags),
    "predict": (predict.main, predict.define_flags),
    "evaluate": (evaluate.main, evaluate.define_flags),
    "report": (report.main, report.define_flags),
    "tune": (tune.main, tune.define_flags),
}
# Written at each start. The other files belong to an epoch: a write of each epoch is another write.
SAME_IN_EACH_EPOCH = ("config.json", "split.csv", "labels.txt", "bad_files.csv")


class Killer:
    """Kills this process at the first write that is not among the earlier ones."""

    def __init__(self, seen: list[tuple], every: int, pipe: int):
        self._seen, self._every, self._pipe = seen, every, pipe
        self._newest_checkpoint = ""
        self._counts: collections.Counter = collections.Counter()

    def before(self, operation: str, path: str) -> None:
        """To be called before a file at `path` is replaced or deleted."""
        name = re.sub(r"^\.(\d+-)+", "", os.path.basename(path.rstrip("/")))
        if name == lock.LOCK_NAME or "probe" in name or "tfevents" in name:
            return
        epoch = "" if name in SAME_IN_EACH_EPOCH else self._newest_checkpoint
        self._counts[operation, name, epoch] += 1
        write = (operation, name, epoch, 0 if name in SAME_IN_EACH_EPOCH else self._counts[operation, name, epoch])
        if re.fullmatch(r"\d{6}\.npz", name) and operation != "remove":
            self._newest_checkpoint = name
        if write in self._seen:
            return
        os.write(self._pipe, (repr(write) + "\n").encode())
        self._seen.append(write)
        if len(self._seen) % self._every == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def hook_writes(before) -> None:
    """Calls `before(operation, path)` before each write to a folder or a bucket."""
    from trainer.storage import gcs

    def hooked(function, operation: str, position: int):
        def write(*arguments, **options):
            before(operation, arguments[position])
            return function(*arguments, **options)

        return write

    files.rename, files.remove = hooked(files.rename, "rename", 1), hooked(files.remove, "remove", 0)
    gcs.write, gcs.remove = hooked(gcs.write, "write", 0), hooked(gcs.remove, "remove", 0)


def start(command: str, log: str, seen: list[tuple], every: int) -> int:
    """One start in a process of its own; adds its new writes to `seen` and returns its wait status."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with open(log, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = 1
        try:
            lock.LEASE_SECONDS = 1.0
            hook_writes(Killer(list(seen), every, writer).before)
            main, define_flags = COMMANDS[command]
            cli.run(main, define_flags=define_flags)
        except SystemExit as exit_request:
            code = exit_request.code
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(writer)
    with open(reader) as lines:
        seen += [eval(line) for line in lines]
    return os.waitpid(child, 0)[1]


def main() -> None:
    """Starts the command until it is finished."""
    log, every, command = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    del sys.argv[1:4]
    tune.TRIAL_COMMAND = (sys.executable, tiny_job.__file__)
    cli.import_tensorflow()
    import keras  # noqa: F401

    from trainer import job  # noqa: F401

    seen: list[tuple] = []
    while os.WIFSIGNALED(status := start(command, log, seen, every)) and os.WTERMSIG(status) == signal.SIGKILL:
        assert len(seen) < 500, pathlib.Path(log).read_text()[-3000:]
    print(*seen, sep="\n")
    print(f"exit code {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main()
