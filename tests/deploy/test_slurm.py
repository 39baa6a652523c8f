"""The files of deploy/slurm, submitted with sbatch to a Slurm cluster on this machine."""

import os
import pathlib
import re
import shlex
import signal
import sys

import numpy as np
import pytest

from tests.support import resumable_job, slurm_cluster, trainer_flags
from tests.support.images import write_images
from tests.support.paths import ROOT, TINY_JOB
from tests.support.resumable_job import read_rows
from trainer import tune
from trainer.artifacts.job_dir import JobDir
from trainer.config import Config
from trainer.runtime import cluster as cluster_variables

FILES = {path.stem: path for path in (ROOT / "deploy" / "slurm").glob("*.sbatch")}
ONE_GPU, SEVERAL_NODES, TUNING = (str(FILES[name]) for name in ("one-gpu", "several-nodes", "tuning"))

# Reacts to signals as the trainer does, without its start of seconds: exits with 143 on SIGTERM and with 0 after RESTARTS.
PROGRAM = """
trap 'echo saved; exit 143' TERM
echo started
[ "${SLURM_RESTART_COUNT:-0}" = "$RESTARTS" ] && exit 0
[ "$CODE" ] && exit "$CODE"
while true; do sleep 0.1; done
"""


@pytest.fixture(scope="module")
def cluster():
    if missing := slurm_cluster.missing():
        pytest.skip(
            "requires root and, on Debian: apt-get install -y --no-install-recommends "
            f"{' '.join(slurm_cluster.PACKAGES)} (missing: {', '.join(missing)})"
        )
    with slurm_cluster.run() as started:
        yield started


@pytest.fixture
def submit(cluster, tmp_path):
    """Submits a file whose jobs run PROGRAM."""
    (tmp_path / "program.sh").write_text(PROGRAM)

    def submit(*arguments: str, restarts: int = 1, code: int | str = "", **environment: str) -> str:
        variables = {"TRAIN_COMMAND": f"bash {tmp_path}/program.sh", "RESTARTS": str(restarts), "CODE": str(code)}
        return cluster.submit(f"--output={tmp_path}/%A_%a.log", *arguments, **variables, **environment)

    return submit


def end_of(path: pathlib.Path) -> str:
    return path.read_text().split("\n# The rest is the same in each file.")[1]


def test_all_files_start_and_requeue_the_trainer_in_the_same_way():
    assert len({end_of(path) for path in FILES.values()}) == 1


def test_the_variables_that_the_page_passes_to_enroot_describe_the_cluster():
    page = (ROOT / "deploy" / "README.md").read_text()
    (names,) = re.findall(r"printf -- '--env %s ' ([A-Z_\s\\]+)\)", page)
    variables = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_NODEID": "1",
        "CUDA_VISIBLE_DEVICES": "0",
    }
    passed = {name: variables[name] for name in shlex.split(names.replace("\\\n", " "))}
    assert cluster_variables.resolve(passed) == cluster_variables.resolve(variables)
    assert cluster_variables.resolve(passed).workers == 2


@pytest.mark.slow
def test_a_job_that_reaches_its_time_limit_saves_and_is_requeued(cluster, submit):
    job = submit("--time=2", ONE_GPU)
    cluster.wait_for(job, "JobState", "COMPLETED")
    assert cluster.field(job, "Restarts") == "1"
    assert cluster.output(job).count("saved") == 1


@pytest.mark.slow
def test_a_preempted_job_saves_and_is_requeued(cluster, submit):
    job = submit(SEVERAL_NODES)
    cluster.wait_until(lambda: cluster.output(job).count("started") == 2, secs=30, what=lambda: cluster.output(job))
    other = cluster.submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    cluster.wait_for(other, "JobState", "COMPLETED", secs=30)  # half of the grace time: the job has left by itself
    cluster.wait_for(job, "JobState", "COMPLETED")
    assert cluster.field(job, "Restarts") == "1"
    assert cluster.output(job).count("saved") == 2


@pytest.mark.slow
def test_a_cancelled_job_saves_and_is_not_requeued(cluster, submit):
    job = submit(ONE_GPU)
    cluster.wait_until(lambda: "started" in cluster.output(job), secs=30, what=lambda: cluster.output(job))
    cluster.call("scancel", job)
    cluster.wait_until(lambda: not cluster.call("squeue", "--noheader"), secs=60, what=lambda: cluster.output(job))
    assert cluster.field(job, "JobState") == "CANCELLED"
    assert cluster.field(job, "Restarts") == "0"
    assert "saved" in cluster.output(job)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "restarts"), [pytest.param(2, "0", id="user-error"), pytest.param(75, "1", id="retry")]
)
def test_a_failed_job_is_requeued_as_often_as_its_exit_code_allows(cluster, submit, code, restarts):
    job = submit(ONE_GPU, restarts=3, code=code, MAX_RESTARTS="1")
    cluster.wait_for(job, "JobState", "FAILED")
    assert cluster.field(job, "Restarts") == restarts
    assert cluster.field(job, "ExitCode") == f"{code}:0"


@pytest.mark.slow
def test_only_the_stopped_trial_of_an_array_is_requeued(cluster, submit):
    job = submit("--array=0-1", TUNING, STUDY_DIR="study")
    trials = [f"{job}_{number}" for number in range(2)]  # the number of the first is also that of the array
    for trial in trials:
        cluster.wait_until(lambda trial=trial: "started" in cluster.output(trial), secs=30, what=lambda: job)
    cluster.call("scancel", "--signal=TERM", trials[0])
    cluster.wait_for(trials[0], "JobState", "COMPLETED")
    assert [cluster.field(trial, "Restarts") for trial in trials] == ["1", "0"]
    assert cluster.field(trials[1], "JobState") == "RUNNING"
    cluster.call("scancel", job)


@pytest.mark.slow
def test_the_trials_of_the_array_cover_the_grid_and_share_the_features(cluster, tmp_path):
    job = cluster.submit(
        "--array=0-19",
        f"--output={tmp_path}/%a.log",
        TUNING,
        "--data_dir=pictures",
        TRAIN_COMMAND="echo",
        STUDY_DIR="s",
    )
    cluster.wait_until(lambda: not cluster.call("squeue", "--noheader"), secs=120, what=lambda: job)
    trials = [trainer_flags.parse(shlex.split((tmp_path / f"{number}.log").read_text())) for number in range(20)]
    assert [trial.job_dir for trial in trials] == [f"s/trial-{number:02d}" for number in range(20)]
    assert {trial.cache_dir for trial in trials} == {"s/features"}
    values = [(trial.learning_rate, trial.dropout, trial.label_smoothing) for trial in trials]
    assert len(set(values)) == 20
    for name, column in zip(("learning_rate", "dropout", "label_smoothing"), zip(*values, strict=True), strict=True):
        assert all(tune.SPACE[name].lowest <= value <= tune.SPACE[name].highest for value in column)


@pytest.mark.slow
@pytest.mark.parametrize(("file", "nodes"), [(ONE_GPU, 1), (SEVERAL_NODES, 2)])
def test_each_task_gets_the_flags_and_the_gpus_of_its_node(cluster, tmp_path, file, nodes):
    (tmp_path / "show.sh").write_text('echo "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES; $*"\n')
    job = cluster.submit(
        f"--output={tmp_path}/log", "--gpus-per-node=2", file, "--job_dir=j", TRAIN_COMMAND=f"bash {tmp_path}/show.sh"
    )
    cluster.wait_for(job, "JobState", "COMPLETED")
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == nodes
    for line in lines:
        gpus, _, arguments = line.partition("; ")
        assert gpus == "CUDA_VISIBLE_DEVICES=0,1"
        settings: Config = trainer_flags.parse(shlex.split(arguments))
        assert (settings.recipe, settings.require_gpu, settings.job_dir) == ("finetune", True, "j")


def find_task(job: str, node: int) -> int:
    """The process of the trainer on a node of the job."""
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_text().split("\0")
            command = (path / "cmdline").read_text().split("\0")
        except OSError:  # ended in the meantime, or belongs to the kernel
            continue
        variables = {f"SLURM_JOB_ID={job}", f"SLURM_NODEID={node}", "SLURM_STEP_NUM_TASKS=2"}
        if variables <= set(environment) and command[:2] == [sys.executable, str(TINY_JOB)]:
            return int(path.name)
    raise AssertionError(f"job {job} has no task on node {node}")


@pytest.mark.slow
def test_a_job_on_two_nodes_whose_chief_is_killed_equals_one_process(cluster, tmp_path):
    images = write_images(tmp_path / "pictures", {"a": 24, "b": 18, "c": 15}, noise=90)
    weights = tmp_path / "given.weights.h5"
    weights.write_bytes(b"")  # tiny_job.py does not load it
    flags = [*resumable_job.FLAGS, "--head_epochs=0", "--epochs=3", f"--data_dir={images}", f"--weights={weights}"]

    def submit(file: str, name: str) -> str:
        return cluster.submit(
            f"--output={tmp_path}/{name}.log", file, *flags, f"--job_dir={tmp_path / name}", "--norequire_gpu",
            TRAIN_COMMAND=f"{sys.executable} {TINY_JOB}",
        )  # fmt: skip

    job = submit(SEVERAL_NODES, "two")
    cluster.wait_until(
        lambda: "    2  whole network" in cluster.output(job), secs=300, what=lambda: cluster.output(job)
    )
    os.kill(find_task(job, node=0), signal.SIGKILL)
    cluster.wait_for(job, "Restarts", "1", secs=120)
    cluster.wait_for(job, "JobState", "COMPLETED", secs=300)
    output = cluster.output(job)
    assert output.count("Resuming from the checkpoint") == 2, output  # both workers
    assert "Exit code 137: requeueing" in output
    assert "Traceback" not in output
    assert JobDir(str(tmp_path / "two")).read_metrics()["workers"] == 2
    one, two = (JobDir(str(tmp_path / name)).history for name in ("one", "two"))
    job = submit(ONE_GPU, "one")  # up to its last epoch, without the export
    cluster.wait_until(
        lambda: os.path.exists(one) and len(read_rows(one)) == 3, secs=300, what=lambda: cluster.output(job)
    )
    cluster.call("scancel", job)
    names = ["loss", "accuracy", "val_loss", "val_accuracy", "learning_rate"]
    values = [[[float(row[name]) for name in names] for row in read_rows(path)] for path in (one, two)]
    assert len(values[1]) == 3
    np.testing.assert_allclose(values[0], values[1], rtol=1e-3)
