"""Killed at any moment, the job goes on as if nothing had happened. Real processes, of a network small enough for many."""

import csv
import json
import random
import re
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest

from tests.support.images import write_images
from tests.support.paths import TINY_JOB

SCRIPT = TINY_JOB
# Everything that has a state: both stages, dropout, augmentation, schedule with warm-up, smoothing, early stopping.
FLAGS = ["--weights=given", "--image_size=32", "--batch_size=8", "--head_epochs=8", "--epochs=30", "--learning_rate=3e-3",
         "--head_learning_rate=0.02", "--dropout=0.3", "--label_smoothing=0.1", "--warmup_epochs=1", "--precision=float32",
         "--preprocessing=rescale", "--early_stopping_patience=20", "--class_weight=balanced", "--steps_per_loop=1",
         "--checkpoint_secs=1"]  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "pictures", {"a": 40, "b": 30, "c": 25}, noise=90)


def start(images, job_dir, *more, **options) -> subprocess.Popen:
    weights = images.parent / "given.weights.h5"
    weights.write_bytes(b"")  # the tiny network does not load it, but its content names the features
    flags = [flag.replace("=given", f"={weights}") for flag in FLAGS]
    return subprocess.Popen(
        [sys.executable, SCRIPT, f"--data_dir={images}", f"--job_dir={job_dir}", *flags, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def finish(process: subprocess.Popen, timeout=300) -> str:
    text, _ = process.communicate(timeout=timeout)
    return text


TIMED = ("input_wait_seconds", "compute_seconds", "validation_seconds")


def rows_of(path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def what_is_left(job_dir) -> dict:
    """All that a run leaves but for times: weights as arrays, the rest as values."""
    metrics = json.loads((job_dir / "metrics.json").read_text())
    for name in ("seconds", "images_per_second"):
        metrics.pop(name)
    history = [line.split(",")[:7] for line in (job_dir / "history.csv").read_text().splitlines()]
    weights = {}
    with h5py.File(job_dir / "best.weights.h5") as file:
        file.visititems(lambda name, item: weights.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    [newest] = sorted((job_dir / "checkpoints").glob("0*.npz"))[-1:]
    with np.load(newest) as archive:
        last = {name: archive[name] for name in archive.files if name != "state.json"}
    predictions = (job_dir / "predictions.csv").read_text()
    return {"metrics": metrics, "history": history, "weights": weights, "last": last, "predictions": predictions}


def assert_same(one: dict, other: dict) -> None:
    assert one["history"] == other["history"]
    assert one["metrics"] == other["metrics"]
    assert one["predictions"] == other["predictions"]
    for kind in ("weights", "last"):
        assert one[kind].keys() == other[kind].keys()
        for name, value in one[kind].items():
            np.testing.assert_array_equal(value, other[kind][name], err_msg=f"{kind} {name}")


@pytest.fixture(scope="module")
def uninterrupted(images):
    """What a run leaves that nobody disturbed, and the seconds it took."""
    job_dir = images.parent / "uninterrupted"
    started = time.monotonic()
    process = start(images, job_dir)
    text = finish(process)
    assert process.returncode == 0, text
    return what_is_left(job_dir), time.monotonic() - started, text


KILLS = 20
CHAINS = 2  # that run side by side, one on each core


def test_twenty_kills_at_random_moments_change_nothing(images, uninterrupted):
    expected, seconds, _ = uninterrupted
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # shown when the test fails
    with ThreadPoolExecutor(CHAINS) as pool:
        chains = [
            pool.submit(kill_until_enough, KILLS // CHAINS, images, expected, seconds, f"{seed}-{chain}")
            for chain in range(CHAINS)
        ]
    assert sum(chain.result() for chain in chains) >= KILLS


def kill_until_enough(enough: int, images, expected: dict, seconds: float, seed: str) -> int:
    """Starts one job after another, each again and again until it ends by itself; returns how often one was killed."""
    rng = random.Random(seed)
    kills, jobs = 0, 0
    while kills < enough:
        jobs += 1
        job_dir = images.parent / f"killed-{seed}-{jobs}"
        while True:
            process = start(images, job_dir)
            # Mostly while it trains: the first part of the time goes by with imports.
            moment = rng.uniform(0.3, 0.95) * seconds if rng.random() < 0.8 else rng.uniform(0, seconds)
            try:
                text = finish(process, timeout=moment)
            except subprocess.TimeoutExpired:
                process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
                text = finish(process)
                kills += process.returncode != 0
                assert process.returncode in (0, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, 1, 143), text
            assert "Traceback" not in text or "KeyboardInterrupt" in text, text
            if process.returncode == 0:
                break
        assert_same(expected, what_is_left(job_dir))
    return kills


def wait_for(process: subprocess.Popen, text: str) -> str:
    """The output up to the line that holds `text`."""
    seen = ""
    while text not in seen:
        line = process.stdout.readline()
        assert line, f"ended without {text!r}:\n{seen}"
        seen += line
    return seen


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_143_and_the_next_start_goes_on(images, uninterrupted, tmp_path, number):
    process = start(images, tmp_path / "job")
    wait_for(process, "epoch 10 (all)")
    process.send_signal(number)
    text = finish(process)
    assert process.returncode == 143, text
    assert "saving, then ending" in text
    assert "The same command goes on from here" in text
    assert not (tmp_path / "job" / "metrics.json").exists()
    process = start(images, tmp_path / "job")
    text = finish(process)
    assert process.returncode == 0, text
    assert "Going on from the save after epoch 1" in text
    assert "computed once" not in text or "epoch 1 (head)" not in text
    assert_same(uninterrupted[0], what_is_left(tmp_path / "job"))


def test_a_damaged_newest_save_costs_an_epoch_and_nothing_else(images, uninterrupted, tmp_path):
    process = start(images, tmp_path / "job")
    wait_for(process, "epoch 12 (all)")
    process.kill()
    finish(process)
    newest = sorted((tmp_path / "job" / "checkpoints").glob("0*.npz"))[-1]
    newest.write_bytes(newest.read_bytes()[:-1000])
    process = start(images, tmp_path / "job")
    text = finish(process)
    assert process.returncode == 0, text
    assert f"{newest} is damaged" in text
    assert_same(uninterrupted[0], what_is_left(tmp_path / "job"))


def test_more_epochs_go_on_from_a_finished_run(images, uninterrupted, tmp_path):
    flags = ["--lr_schedule=constant", "--early_stopping_patience=0"]
    process = start(images, tmp_path / "job", *flags, "--epochs=2", "--profile_steps=2,4")
    assert "epoch 10 (all)" in finish(process)
    [profile] = (tmp_path / "job" / "logs").rglob("*.xplane.pb")
    assert profile.stat().st_size > 10_000
    times = rows_of(tmp_path / "job" / "time.csv")
    assert [row["stage"] for row in times] == ["head"] * 8 + ["all"] * 2
    process = start(images, tmp_path / "job", *flags, "--epochs=4")
    text = finish(process)
    assert process.returncode == 0, text
    after = rows_of(tmp_path / "job" / "time.csv")
    is_cached = [one[name] == other[name] for one, other in zip(times, after, strict=False) for name in TIMED]
    assert all(is_cached)
    assert [row["epoch"] for row in after] == [str(n) for n in range(1, 13)]
    for row, history in zip(after, rows_of(tmp_path / "job" / "history.csv"), strict=True):
        parts = {name: float(row[name]) for name in TIMED}
        assert min(parts.values()) > 0, row
        steps_seconds = parts["input_wait_seconds"] + parts["compute_seconds"]
        assert steps_seconds == pytest.approx(float(history["seconds"]), abs=0.002)
        assert float(row["ceiling_images_per_second"]) > float(row["images_per_second"]) * 0.999
    assert "epoch 12 (all)" in text
    assert "epoch 10 (all)" not in text
    process = start(images, tmp_path / "whole", *flags, "--epochs=4")
    finish(process)
    assert_same(what_is_left(tmp_path / "whole"), what_is_left(tmp_path / "job"))


def test_a_loss_that_is_no_number_goes_back_to_the_last_save_with_half_the_learning_rate(images, tmp_path):
    # Each step takes 3.5 times the weights off the weights, until they overflow; at half the learning rate 1.75 times.
    flags = ["--weights=none", "--head_epochs=0", "--epochs=6", "--optimizer=sgd", "--weight_decay=3.5e6", "--warmup_epochs=0",
             "--learning_rate=1e-6", "--lr_schedule=constant", "--early_stopping_patience=0"]  # fmt: skip
    process = start(images, tmp_path / "job", *flags, "--nan_retries=0")
    text = finish(process)
    assert process.returncode == 2, text
    assert re.search(r"error: Stage all, epoch [34], step \d+: the loss is (nan|inf)", text), text
    assert "The pictures of that step: '" in text
    assert "The last good state is kept" in text
    assert "Traceback" not in text
    process = start(images, tmp_path / "job", *flags)
    text = finish(process)
    assert process.returncode == 0, text
    assert "Going back to the last save with half the learning rate" in text
    history = (tmp_path / "job" / "history.csv").read_text().splitlines()[1:]
    losses, rates = zip(*((float(line.split(",")[2]), float(line.split(",")[6])) for line in history), strict=True)
    assert len(history) == 6
    assert set(np.float32(rates)) == {np.float32(1e-6), np.float32(5e-7)}
    assert rates[-1] == rates[-2] == pytest.approx(5e-7)
    assert losses[-1] < losses[-2]


def test_a_job_dir_that_vanishes_is_told_in_one_line(images, tmp_path):
    process = start(images, tmp_path / "job", "--epochs=500", "--early_stopping_patience=0")
    wait_for(process, "epoch 10 (all)")
    (tmp_path / "job").rename(tmp_path / "moved")
    text = finish(process)
    assert process.returncode == 2, text
    assert "start the same command again" in text
    assert not (tmp_path / "job").exists()
    (tmp_path / "moved").rename(tmp_path / "job")
    process = start(images, tmp_path / "job", "--epochs=500", "--early_stopping_patience=0")
    wait_for(process, "Going on from the save")
    process.kill()
    finish(process)


def test_the_full_network_with_adam_is_saved_within_15_seconds_of_the_signal(tmp_path):
    images = write_images(tmp_path / "pictures", {"a": 60, "b": 60})
    flags = [f"--data_dir={images}", f"--job_dir={tmp_path / 'job'}", "--weights=none", "--head_epochs=0", "--epochs=50",
             "--image_size=64", "--batch_size=8", "--precision=float32", "--checkpoint_secs=3000"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.task", *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(process, "epoch 1 (all)")
    time.sleep(1)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    text = finish(process)
    seconds = time.monotonic() - started
    assert process.returncode == 143, text
    newest = sorted((tmp_path / "job" / "checkpoints").glob("0*.npz"))[-1]
    print(f"{newest.stat().st_size / 1e6:.0f} MB saved and ended {seconds:.1f} s after SIGTERM")
    assert newest.stat().st_size > 3 * 90e6  # weights and Adam's two moments
    assert seconds < 15


def test_a_disk_that_takes_no_more_is_told_and_the_last_save_stays(images, tmp_path):
    job = ["--epochs=500", "--early_stopping_patience=0"]
    process = start(images, tmp_path / "job", *job)
    wait_for(process, "epoch 10 (all)")
    process.kill()
    finish(process)
    newest = sorted((tmp_path / "job" / "checkpoints").glob("0*.npz"))[-1]
    contents = newest.read_bytes()
    (newest.parent / ".1-2-000099.npz").write_bytes(b"half of it")  # as a kill in the middle of a save leaves it
    limit = len(contents) // 2  # bytes that a file may have: as on a full disk, writing fails half-way
    process = start(
        images, tmp_path / "job", *job, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit,) * 2)
    )
    text = finish(process)
    assert process.returncode == 2, text
    assert "File too large" in text
    assert newest.read_bytes() == contents
    assert not [path.name for path in newest.parent.iterdir() if path.name.startswith(".")]


def test_the_best_weights_do_not_end_the_process_where_the_disk_is_full(tmp_path):
    script = tmp_path / "write.py"
    script.write_text(
        "import resource, sys\n"
        "import keras\n"
        "import numpy as np\n"
        "from trainer import job_dir\n"
        "model = keras.Sequential([keras.Input([64]), *(keras.layers.Dense(64) for _ in range(20))])\n"
        "best = job_dir.Best(1, 0.5, 0.7, np.zeros((50, 3), np.float32), np.ones(50, bool))\n"
        "job_dir.write_best(sys.argv[1], model, best)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000,) * 2)\n"
        "try:\n"
        "    job_dir.write_best(sys.argv[1], model, best)\n"
        "except OSError as error:\n"
        "    print('told:', error.strerror)\n"
    )
    best = tmp_path / "best.weights.h5"
    done = subprocess.run([sys.executable, script, best], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "told: File too large\n"
    assert best.stat().st_size > 20 * 64 * 65 * 4
    assert [path.name for path in tmp_path.glob("*weights*")] == ["best.weights.h5"]
