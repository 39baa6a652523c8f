"""Help and user errors: at once, in one line, with exit code 2 and without importing TensorFlow."""

import datetime
import importlib
import json
import logging
import os
import re
import subprocess
import sys
import time

import pytest

from tests.support.images import write_images
from tests.support.paths import ROOT
from tests.support.processes import run_command
from trainer import cli
from trainer.config import DEFAULTS
from trainer.errors import UserError

COMMANDS = ["task", "predict", "evaluate", "report", "inspect_data", "tune", "benchmark", "serve", "pack"]
FAILING_COMMAND = """
from absl import flags
from trainer import cli
from trainer.errors import UserError

def main(arguments):
    raise {error}

cli.run(main, define_flags=lambda: flags.DEFINE_enum("log_format", "{log_format}", ["text", "json"], "Format."))
"""


def test_without_a_command_all_are_listed():
    listed = run_command("trainer")
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout.startswith("Usage: python -m trainer COMMAND")
    assert re.findall(r"^  (\w+) ", listed.stdout, re.MULTILINE) == list(cli.COMMANDS)
    assert set(cli.COMMANDS.values()) == set(COMMANDS)
    assert run_command("trainer", "--help").stdout == listed.stdout


@pytest.mark.parametrize(("name", "hint"), [("trian", "did you mean train?"), ("x", "pass one of train, predict")])
def test_an_unknown_command_is_the_users_error(name, hint):
    result = run_command("trainer", name, "--help")
    assert_user_error(result, f"error: {name!r} is not a command: {hint}")
    assert result.stderr.endswith("\n`python -m trainer --help` lists the commands.\n")


def test_a_command_that_is_no_module_is_no_silent_success():
    result = run_command("trainer.train", "--data_dir=pictures")
    assert result.returncode != 0
    assert "No module named trainer.train" in result.stderr


@pytest.mark.parametrize(
    ("started", "program"),
    [
        (("trainer", "train"), "python -m trainer train"),
        (("trainer", "demo"), "python -m trainer demo"),
        (("trainer.task",), "python -m trainer.task"),
    ],
)
def test_the_hint_of_a_wrong_flag_has_the_program_as_it_was_started(started, program):
    result = run_command(*started, "--imagesize=32")
    assert result.returncode == 2
    assert result.stderr.splitlines()[1] == f"`{program} --help` lists the flags."


@pytest.mark.parametrize("module", COMMANDS)
def test_the_other_commands_are_named_as_this_one_was_started(module, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", ["picture-trainer inspect"])
    name = "train" if module == "task" else module.removesuffix("_data")
    assert cli.command(module) == f"picture-trainer {name}"
    monkeypatch.setattr(sys, "argv", ["deploy/submit.py"])
    assert cli.command(module) == f"python -m trainer.{module}"


@pytest.mark.parametrize("option", ["-flagfile", "--flagfile"])
def test_a_flag_file_of_the_project_is_found_by_name_unless_a_file_has_it(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [f"{option}={ROOT}/deploy/flags/article.flags", "--flagfile=mine", "article"]
    assert cli._with_flag_file_paths([f"{option}=article", "--flagfile=mine", "article"]) == paths
    (tmp_path / "article").touch()
    assert cli._with_flag_file_paths([f"{option}=article"]) == [f"{option}=article"]


WITHOUT_MODULES = """
import runpy, sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None  # cannot be imported
sys.argv.pop(0)
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("name", ["task", "tune", "benchmark", "predict"])
def test_windows_is_one_line_that_names_wsl(name):
    """Windows has neither fcntl nor resource."""
    command = [sys.executable, "-c", WITHOUT_MODULES, "fcntl,resource", f"trainer.{name}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert_user_error(result, "On Windows, install and run the project in WSL")
    assert result.stderr.count("\n") == 1


def test_tensorflow_that_is_not_installed_is_one_line(folders):
    command = [sys.executable, "-c", WITHOUT_MODULES, "tensorflow", "trainer.report", "--job_dir=job"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert_user_error(result, "TensorFlow is not installed: pip install tensorflow-cpu on Linux")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_the_command_line_and_the_flags(name):
    result = run_command(f"trainer.{name}", "--help")
    assert result.returncode == 0, result.stderr
    assert f"python -m trainer.{name}" in result.stdout
    assert "--verbosity" in result.stdout


def test_help_of_the_job_has_every_field_of_the_config():
    text = run_command("trainer.task", "--help").stdout
    assert [name for name in DEFAULTS if f"--{name}" not in text and f"--[no]{name}" not in text] == []


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("predict", "model_dir"),
        ("evaluate", "model_dir"),
        ("report", "job_dir"),
        ("inspect_data", "data_dir"),
        ("serve", "model_dir"),
    ],
)
def test_a_missing_flag_is_named(name, flag):
    result = run_command(f"trainer.{name}")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert f"--{flag} is not set" in result.stderr


@pytest.mark.parametrize("name", ["evaluate", "inspect_data", "pack", "report", "serve", "task", "tune"])
def test_an_argument_that_is_not_a_flag_is_the_users_error(name):
    with pytest.raises(UserError, match=r"'pictures' is not a flag: \w+ --"):
        importlib.import_module(f"trainer.{name}").main(["pictures"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of images, each with one problem, except `good`."""
    directory = tmp_path_factory.mktemp("folders")
    (directory / "file").write_text("")
    (directory / "flat").mkdir()
    (directory / "flat" / "a.jpg").write_bytes(b"x")
    write_images(directory / "one_class", {"cat": 2})
    write_images(directory / "empty_class", {"cat": 2, "dog": 2})
    for path in (directory / "empty_class" / "dog").iterdir():
        path.unlink()
    write_images(directory / "text", {"cat": 2, "dog": 2})
    for path in (directory / "text").rglob("*.jpg"):
        path.write_text("not an image")
    write_images(directory / "good", {"cat": 4, "dog": 4})
    return directory


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        pytest.param("missing", [], "missing does not exist", id="missing-folder"),
        pytest.param("file", [], "is a file", id="file"),
        pytest.param("flat", [], "has no sub-folders", id="no-sub-folders"),
        pytest.param("one_class", [], "only one class, 'cat'", id="one-class"),
        pytest.param("empty_class", [], "Class 'dog'", id="empty-class"),
        pytest.param("text", [], "no readable image", id="no-readable-image"),
        pytest.param("good", ["--image_size=16"], "image_size is 16", id="image-size"),
        pytest.param("good", ["--batch_size=0"], "batch_size is 0", id="batch-size-0"),
        pytest.param("good", ["--weights=no.h5"], "--weights=no.h5 does not exist: pass imagenet, none", id="weights"),
        pytest.param("good", ["--data_dir="], "--data_dir is not set: pass the folder", id="no-data-dir"),
        pytest.param("good", ["--learning_rate=nan"], "learning_rate is nan", id="learning-rate"),
        pytest.param("good", ["--batch_size=4", "--profile_steps=2,3"], "an epoch has 2 steps", id="profile-steps"),
        pytest.param("good", ["--data_dri=x"], "Did you mean: data_dir", id="unknown-flag"),
        pytest.param("good", ["--job_dir="], "--job_dir is not set", id="no-job-dir"),
        pytest.param(
            "good",
            ["--job_dir=/proc/job", "--batch_size=4"],
            "--job_dir=/proc/job cannot be written",
            id="job-dir-not-writable",
        ),
        pytest.param("good", ["pictures"], "'pictures' is not a flag", id="not-a-flag"),
        pytest.param("good", ["--job_dir=j\udcff"], "is not UTF-8: rename it", id="not-utf-8"),
        pytest.param("good", ["--data_dir=~/gone"], "/gone does not exist", id="home"),
    ],
)
def test_a_wrong_input_is_one_line_with_exit_code_2(folders, tmp_path, data, arguments, message):
    result = run_command("trainer.task", f"--data_dir={folders / data}", f"--job_dir={tmp_path / 'job'}", *arguments)
    assert_user_error(result, message)
    assert not (tmp_path / "job").exists()


def test_a_wrong_environment_is_one_line_with_exit_code_2(folders, tmp_path):
    result = run_command(
        "trainer.task", f"--data_dir={folders / 'good'}", f"--job_dir={tmp_path / 'job'}", TF_CONFIG="{"
    )
    assert_user_error(result, "TF_CONFIG is '{'; expected JSON")
    assert not (tmp_path / "job").exists()


def assert_user_error(result: subprocess.CompletedProcess, message: str) -> None:
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error:")]) == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        ("UserError('flag is 1:\\n pass 2')", 2, "flag is 1: pass 2"),
        ("PermissionError(13, 'denied', 'gs://bucket/x')", 2, "gs://bucket/x: denied"),
        ("TimeoutError(110, 'unavailable', 'gs://bucket/x')", 75, "gs://bucket/x: unavailable"),
    ],
)
def test_expected_errors_are_one_line_with_their_exit_code(error, exit_code, message):
    for log_format in ("text", "json"):
        program = FAILING_COMMAND.format(error=error, log_format=log_format)
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert result.returncode == exit_code
        if log_format == "text":
            assert result.stderr == f"error: {message}\n"
        else:
            entry = json.loads(result.stderr)
            assert (entry["severity"], entry["message"]) == ("ERROR", message)


@pytest.mark.parametrize("error", ["RuntimeError('bug')", "PermissionError(13, 'denied', '/local')"])
def test_unexpected_errors_keep_their_traceback_and_exit_code_1(error):
    for log_format in ("text", "json"):
        program = FAILING_COMMAND.format(error=error, log_format=log_format)
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert result.returncode == 1
        text = result.stderr if log_format == "text" else json.loads(result.stderr.splitlines()[-1])["message"]
        assert text.startswith("Traceback")


def imported_modules(*arguments) -> set[str]:
    """The modules that a command imports until it exits."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    return {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}


def test_help_and_wrong_input_do_not_import_tensorflow(folders, tmp_path):
    assert "tensorflow" not in imported_modules("trainer.task", "--help")
    modules = imported_modules(
        "trainer.task", f"--data_dir={folders / 'good'}", f"--job_dir={tmp_path / 'job'}", "--profile_steps=9,9"
    )
    assert "trainer.data.dataset" in modules
    assert "tensorflow" not in modules


@pytest.mark.slow
def test_the_import_of_tensorflow_writes_nothing_to_stderr():
    result = subprocess.run(
        [sys.executable, "-c", "from trainer import cli; cli.import_tensorflow()"],
        capture_output=True,
        text=True,
        check=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("TF_")},
    )
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("level", "expected"), [(logging.INFO, "13:05:59 text"), (logging.WARNING, "13:05:59 warning: text")]
)
def test_log_lines_have_the_time_and_the_level(level, expected):
    record = logging.LogRecord("trainer", level, "file.py", 1, "text", None, None)
    record.created = time.mktime((2026, 1, 2, 13, 5, 59, 0, 0, -1))
    assert cli.Lines().format(record) == expected


@pytest.mark.parametrize(
    ("flags", "environment", "is_json"),
    [
        ([], {}, False),
        ([], {"CLOUD_ML_PROJECT_ID": "1"}, True),
        ([], {"AIP_MODEL_DIR": "m"}, True),
        (["--log_format=text"], {"CLOUD_ML_PROJECT_ID": "1"}, False),
        (["--log_format=json"], {}, True),
    ],
)
def test_on_a_platform_errors_are_json(flags, environment, is_json):
    result = run_command("trainer.task", "--data_dir=/no/such", "--job_dir=j", *flags, **environment)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    message = json.loads(line)["message"] if is_json else line.removeprefix("error: ")
    assert message.startswith("--data_dir=/no/such does not exist")


@pytest.mark.slow
def test_on_kubernetes_each_log_line_is_json(tmp_path):
    images = write_images(tmp_path / "images", {"cat": 8, "dog": 8})
    flags = [f"--data_dir={images}", f"--job_dir={tmp_path / 'job'}", "--batch_size=4", "--dry_run"]
    result = run_command("trainer.task", *flags, KUBERNETES_SERVICE_HOST="10.0.0.1")
    assert result.returncode == 0, result.stderr
    entries = [json.loads(line) for line in result.stderr.splitlines()]
    assert {tuple(entry) for entry in entries} == {("severity", "message", "time")}
    assert {entry["severity"] for entry in entries} <= {"INFO", "WARNING"}
    times = [datetime.datetime.fromisoformat(entry["time"]) for entry in entries]
    assert times == sorted(times)
    assert datetime.datetime.now(datetime.UTC) - times[0] < datetime.timedelta(hours=1)


def test_a_python_warning_is_one_json_entry():
    program = FAILING_COMMAND.format(
        error="__import__('warnings').warn('text') or RuntimeError('a\\nb')", log_format="json"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    warning, error = (json.loads(line) for line in result.stderr.splitlines())
    assert warning["severity"] == "WARNING"
    assert "UserWarning: text" in warning["message"]
    assert error["severity"] == "CRITICAL"
    assert "RuntimeError: a\nb" in error["message"]
