"""A Slurm cluster of two nodes on this machine: munged, slurmctld and two slurmd, on loopback. Not a test itself.

Needs root and Debian's packages. The nodes are called 127.0.0.1 and 127.0.0.2, names that resolve everywhere. Each has
eight CPUs and two GPUs on paper, so that it accepts the jobs of deploy/slurm.
"""

import contextlib
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator

from tests.support.processes import free_ports

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
# A job that is requeued waits until its credential expires, two minutes by default.
_CONFIGURATION = """
ClusterName=local
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=127.0.0.1 NodeHostname={host} Port={first_port} CPUs=8 RealMemory=64000 Gres=gpu:2
NodeName=127.0.0.2 NodeHostname={host} Port={second_port} CPUs=8 RealMemory=64000 Gres=gpu:2
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=10
"""
_GPUS = "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n"  # device files that exist everywhere


def missing() -> list[str]:
    """What this machine lacks to run the cluster."""
    lacking = [name for name in _PROGRAMS if not shutil.which(name, path=_path())]
    return lacking if os.geteuid() == 0 else [*lacking, "root"]


@contextlib.contextmanager
def run() -> Iterator["SlurmCluster"]:
    """Starts the cluster and waits until both nodes are idle; stops its jobs and its processes at the end."""
    with tempfile.TemporaryDirectory(prefix="slurm") as name, contextlib.ExitStack() as stack:
        directory = pathlib.Path(name)
        controller, first, second = free_ports(3)
        for folder in ("state", "127.0.0.1", "127.0.0.2"):
            (directory / folder).mkdir()
        configuration = directory / "slurm.conf"
        configuration.write_text(
            _CONFIGURATION.format(
                directory=directory,
                controller_port=controller,
                first_port=first,
                second_port=second,
                host=os.uname().nodename.partition(".")[0],
            )
        )
        (directory / "gres.conf").write_text(_GPUS)
        key = directory / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        munge = [f"--{kind}={directory}/munge.{kind.partition('-')[0]}" for kind in ("socket", "pid-file", "log-file")]
        commands = [
            ["munged", "--foreground", "--force", f"--key-file={key}", f"--seed-file={directory}/munge.seed", *munge],
            ["slurmctld", "-D", "-f", str(configuration)],
            ["slurmd", "-D", "-N", "127.0.0.1", "-f", str(configuration)],
            ["slurmd", "-D", "-N", "127.0.0.2", "-f", str(configuration)],
        ]
        cluster = SlurmCluster(configuration)
        with (directory / "log").open("wb") as log:
            for command in commands:
                program = shutil.which(command[0], path=_path())
                daemon = subprocess.Popen([program, *command[1:]], stdout=log, stderr=log)
                stack.callback(daemon.wait)
                stack.callback(daemon.terminate)
        cluster.wait_until(
            lambda: cluster.call("sinfo", "--noheader", "--partition=low", "--states=idle", "--format=%D") == "2",
            secs=30,
            what=lambda: (directory / "log").read_text(),
        )
        yield cluster
        cluster.call("scancel", "--user=root")
        cluster.wait_until(lambda: not cluster.call("squeue", "--noheader"), secs=60, what=lambda: "jobs remain")


class SlurmCluster:
    """The commands of a running cluster."""

    def __init__(self, configuration: pathlib.Path) -> None:
        self.environment = {"PATH": _path(), "SLURM_CONF": str(configuration)}

    def call(self, *command: str, **environment: str) -> str:
        """Runs a command of Slurm; returns its output. A failure is an empty output, as of a controller that starts."""
        return subprocess.run(
            command,
            env={**os.environ, **self.environment, **environment},
            stdout=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        ).stdout.strip()

    def submit(self, *arguments: str, **environment: str) -> str:
        """Submits a file with sbatch; returns the number of the job."""
        job = self.call("sbatch", "--parsable", *arguments, **environment)
        assert job.isdigit(), job
        return job

    def field(self, job: str, name: str) -> str:
        """A field of the job as scontrol shows it, such as JobState or Restarts."""
        match = re.search(rf"\b{name}=(\S+)", self.call("scontrol", "show", "job", job))
        return match[1] if match else ""

    def wait_for(self, job: str, name: str, value: str, *, secs: float = 120) -> None:
        """Waits until a field of the job has a value."""
        self.wait_until(
            lambda: self.field(job, name) == value,
            secs=secs,
            what=lambda: self.call("scontrol", "show", "job", job) + self.output(job),
        )

    def output(self, job: str) -> str:
        """What the job and its steps have written so far."""
        path = pathlib.Path(self.field(job, "StdOut"))
        return path.read_text() if path.is_file() else ""

    @staticmethod
    def wait_until(condition, *, secs: float, what) -> None:
        """Waits until `condition()` is true; fails with the text of `what()` after `secs`."""
        deadline = time.monotonic() + secs
        while not condition():
            assert time.monotonic() < deadline, what()
            time.sleep(0.3)


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin"  # where Debian installs daemons
