"""Help and wrong input answer at once, in one line, with exit code 2 and without TensorFlow."""

import importlib
import os
import subprocess
import sys

import pytest

from tests.support.images import write_images
from tests.support.processes import run_command
from trainer.errors import UserError

COMMANDS = ["task", "predict", "evaluate", "report", "inspect_data", "benchmark", "serve"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_examples_and_every_flag_and_ends_well(name):
    answer = run_command(f"trainer.{name}", "--help")
    assert answer.returncode == 0, answer.stderr
    assert f"python -m trainer.{name}" in answer.stdout
    assert "--verbosity" in answer.stdout


@pytest.mark.parametrize(("name", "flag"), [("predict", "model_dir"), ("evaluate", "model_dir"), ("report", "job_dir"),
                                            ("inspect_data", "data_dir"), ("serve", "model_dir")])  # fmt: skip
def test_a_command_without_what_it_works_on_says_which_flag_is_missing(name, flag):
    answer = run_command(f"trainer.{name}")
    assert answer.returncode == 2
    assert answer.stderr.count("\n") == 1
    assert f"--{flag} is not set" in answer.stderr


def test_help_of_the_job_names_each_field_of_its_config():
    from trainer.config import DEFAULTS

    text = run_command("trainer.task", "--help").stdout
    assert [name for name in DEFAULTS if f"--{name}" not in text and f"--[no]{name}" not in text] == []


def imported_modules(*arguments) -> set[str]:
    """The modules that a command imports until it ends."""
    answer = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    return {line.rpartition("|")[2].strip() for line in answer.stderr.splitlines() if line.startswith("import time:")}


def wrong_inputs(tmp_path):
    def folder(name, counts):
        return write_images(tmp_path / name, counts)

    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.jpg").write_bytes(b"x")
    empty = folder("empty", {"cat": 2, "dog": 2})
    for file in (empty / "dog").iterdir():
        file.unlink()
    text = folder("text", {"cat": 2, "dog": 2})
    for file in text.rglob("*.jpg"):
        file.write_text("not a picture")
    good = folder("good", {"cat": 4, "dog": 4})
    (tmp_path / "file").write_text("")
    job = f"--job_dir={tmp_path / 'job'}"
    return {
        "missing folder": (["--data_dir=/no/such", job], "/no/such does not exist"),
        "a file": ([f"--data_dir={tmp_path / 'file'}", job], "is a file"),
        "no sub-folders": ([f"--data_dir={tmp_path / 'flat'}", job], "has no sub-folders"),
        "one class": ([f"--data_dir={folder('one', {'cat': 2})}", job], "one class only, 'cat'"),
        "an empty class": ([f"--data_dir={empty}", job], "Class 'dog'"),
        "no readable picture": ([f"--data_dir={text}", job], "holds no readable picture"),
        "image_size": ([f"--data_dir={good}", job, "--image_size=16"], "image_size is 16"),
        "batch_size 0": ([f"--data_dir={good}", job, "--batch_size=0"], "batch_size is 0"),
        "batch_size": ([f"--data_dir={good}", job, "--batch_size=7"], "there are 6 training pictures"),
        "learning rate": ([f"--data_dir={good}", job, "--learning_rate=nan"], "learning_rate is nan"),
        "profile_steps": (
            [f"--data_dir={good}", job, "--batch_size=4", "--profile_steps=2,3"],
            "an epoch has 2 steps",
        ),
        "unknown flag": (["--data_dri=x", job], "Did you mean: data_dir"),
        "no job_dir": ([f"--data_dir={good}"], "--job_dir is not set"),
        "job_dir not writable": (
            [f"--data_dir={good}", "--job_dir=/proc/job", "--batch_size=4"],
            "--job_dir=/proc/job cannot be written",
        ),
        "a word too much": (["pictures", job], "'pictures' is not a flag"),
        "TF_CONFIG": ([f"--data_dir={good}", job], "TF_CONFIG"),
    }


WRONG = """missing folder/a file/no sub-folders/one class/an empty class/no readable picture/image_size/batch_size 0/
batch_size/learning rate/profile_steps/unknown flag/no job_dir/job_dir not writable/a word too much/TF_CONFIG""".replace(
    "\n", ""
)


@pytest.mark.parametrize("case", WRONG.split("/"))
def test_wrong_input_is_one_line_and_exit_code_2_and_nothing_is_written(tmp_path, case):
    cases = wrong_inputs(tmp_path)
    assert list(cases) == WRONG.split("/")
    arguments, message = cases[case]
    environment = {"TF_CONFIG": "{"} if case == "TF_CONFIG" else {}
    answer = run_command("trainer.task", *arguments, **environment)
    assert answer.returncode == 2, answer.stderr
    assert message in answer.stderr
    errors = [line for line in answer.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "Traceback" not in answer.stderr
    assert not (tmp_path / "job").exists()


def test_help_and_wrong_input_do_without_tensorflow(tmp_path):
    assert "tensorflow" not in imported_modules("trainer.task", "--help")
    good = write_images(tmp_path / "good", {"cat": 4, "dog": 4})
    assert "tensorflow" not in imported_modules(
        "trainer.task", f"--data_dir={good}", f"--job_dir={tmp_path / 'job'}", "--batch_size=9"
    )


@pytest.mark.slow
def test_tensorflows_chatter_stays_off_the_terminal():
    answer = subprocess.run(
        [sys.executable, "-c", "from trainer import cli; cli.import_tensorflow()"],
        capture_output=True,
        text=True,
        check=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("TF_")},
    )
    assert answer.stderr == ""


@pytest.mark.parametrize("name", ["evaluate", "inspect_data", "pack", "report", "serve", "task", "tune"])
def test_a_word_that_is_no_flag_is_told_with_what_to_write(name):
    with pytest.raises(UserError, match=r"'pictures' is not a flag: write --"):
        importlib.import_module(f"trainer.{name}").main(["pictures"])
