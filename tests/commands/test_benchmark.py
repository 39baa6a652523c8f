"""trainer.benchmark: flags, and the files of a run."""

import json

import pytest

from tests.support.images import write_images
from tests.support.processes import run_command
from trainer.benchmarks import results


@pytest.mark.slow
def test_the_command_writes_results_and_keeps_earlier_suites(tmp_path):
    images = write_images(tmp_path / "images", {"a": 20, "b": 20}, size=64)
    output_dir = tmp_path / "benchmark"
    output_dir.mkdir()
    earlier = {"suite": "resume", "title": "earlier", "figure": "seconds", "left_out": [], "rounds": 1,
               "figures": {"cold start": {"seconds": [1.0]}}, "aims": []}  # fmt: skip
    results.write(str(output_dir), {"machine": results.machine(), "note": "", "suites": [earlier]})
    answer = run_command(
        "trainer.benchmark",
        f"--data_dir={images}",
        f"--output_dir={output_dir}",
        "--suite=growth,input",
        "--rounds=1",
        "--image_size=32",
        "--large_pictures=2",
        "--growth_sizes=20,40",
        "--note=On a shared machine.",
    )
    assert answer.returncode == 0, answer.stderr
    assert "## growth" in answer.stdout
    written = json.loads((output_dir / "benchmark.json").read_text())
    kept, growth, original, large = written["suites"]
    assert kept == earlier
    assert growth["figures"].keys() == {"20 images", "40 images"}
    for suite in (original, large):
        assert "image_dataset_from_directory" in suite["figures"]
    text = (output_dir / "benchmark.md").read_text()
    assert "On a shared machine." in text
    assert "| CPU time, trainer pipeline / plain decode | at most 1.15 |" in text
    assert (output_dir / "benchmark.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--suite=speed", "'speed' is not a suite: pass --suite with one or more of accuracy,job,step,"),
        ("--growth_sizes=20,few", "--growth_sizes is '20,few': pass comma-separated integers of 20 or more."),
        ("--suite=bucket", "--data_dir is not set"),
        (
            "--earlier_checkout=nowhere",
            "--earlier_checkout=nowhere has no trainer/task.py: pass the folder of a checkout",
        ),
    ],
)
def test_a_wrong_flag_is_a_user_error(flag, message):
    answer = run_command("trainer.benchmark", flag)
    assert answer.returncode == 2
    assert message in answer.stderr
