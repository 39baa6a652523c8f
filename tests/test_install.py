"""The wheel, installed in an environment of its own and used in an empty folder; and the platforms that setup.py supports."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

import trainer
from tests.support.images import write_images
from tests.support.paths import ROOT
from trainer import cli

uv = pytest.importorskip("uv", reason="uv is not installed: pip install '.[dev]'")


def run_uv(*arguments, **keywords) -> subprocess.CompletedProcess:
    return subprocess.run([uv.find_uv_bin(), *map(str, arguments)], capture_output=True, text=True, **keywords)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this code. It is built in a copy, because setuptools keeps files of earlier builds in build/."""
    source = tmp_path_factory.mktemp("source")
    for name in ("trainer", "deploy/flags"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--wheel", "--no-build-isolation", f"--python={sys.executable}", f"--out-dir={source / 'dist'}"]
    build = run_uv("build", *options, source, check=False)
    assert build.returncode == 0, build.stderr
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def picture_trainer(wheel, tmp_path_factory):
    """The console command of the wheel, in a new environment with the packages of the tests."""
    environment = tmp_path_factory.mktemp("environment")
    run_uv("venv", "--clear", f"--python={sys.executable}", environment, check=True)
    run_uv("pip", "install", "--no-deps", "--offline", f"--python={environment}", wheel, check=True)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    # Python does not read the .pth files of a folder that another .pth file adds: not that of the editable install.
    (site_packages / "packages_of_the_tests.pth").write_text(sysconfig.get_path("purelib"))
    return environment / "bin" / "picture-trainer"


def run(*command, cwd: pathlib.Path) -> subprocess.CompletedProcess:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([*map(str, command)], cwd=cwd, env=variables, capture_output=True, text=True, check=False)


def test_the_wheel_has_every_file_of_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "trainer", "deploy/flags"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert packed == {name.replace("deploy/flags/", "trainer/flags/") for name in tracked if (ROOT / name).exists()}


def test_the_version_is_the_same_everywhere(picture_trainer, wheel, tmp_path):
    assert run(picture_trainer, "--version", cwd=tmp_path).stdout == f"picture-trainer {trainer.__version__}\n"
    assert wheel.name.split("-")[1] == trainer.__version__
    assert f"ARG VERSION={trainer.__version__}\n" in (ROOT / "Dockerfile").read_text()


@pytest.mark.slow
def test_each_command_answers_help_without_importing_tensorflow(picture_trainer, tmp_path):
    python = picture_trainer.parent / "python"
    for name in cli.COMMANDS:
        help_text = run(python, "-X", "importtime", picture_trainer, name, "--help", cwd=tmp_path)
        assert help_text.returncode == 0, help_text.stderr
        assert f"Flags of picture-trainer {name}:\n" in help_text.stdout
        assert "python -m trainer" not in help_text.stdout
        imported = {line.rpartition("|")[2].strip() for line in help_text.stderr.splitlines()}
        assert "trainer.errors" in imported
        assert "tensorflow" not in imported
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_the_wheel_inspects_and_plans_in_an_empty_folder(picture_trainer, tmp_path):
    write_images(tmp_path / "pictures", {"cat": 40, "dog": 40})
    inspected = run(picture_trainer, "inspect", "--data_dir=pictures", cwd=tmp_path)
    assert inspected.returncode == 0, inspected.stderr
    assert "<html" in (tmp_path / "inspection" / "inspect.html").read_text()
    flags = ["--data_dir=pictures", "--job_dir=job", "--flagfile=article", "--image_size=64", "--dry_run"]
    planned = run(picture_trainer, "train", *flags, cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "100 epochs" in planned.stdout
    wrong = run(picture_trainer, "train", "--flagfile=article", "--epoch=3", cwd=tmp_path)
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[1:] == ["`picture-trainer train --help` lists the flags."]
    assert {path.name for path in tmp_path.iterdir()} == {"pictures", "inspection"}


@pytest.fixture(scope="module")
def package_index():
    """Skips the test where the package index cannot be reached."""
    probe = run_uv("pip", "compile", "--no-cache", "-", input="six\n", env={**os.environ, "UV_HTTP_RETRIES": "0"})
    if probe.returncode != 0:
        pytest.skip(f"the package index cannot be reached: {probe.stderr.strip().splitlines()[-1]}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "python", "tensorflow"),
    [
        ("x86_64-unknown-linux-gnu", "3.13", "tensorflow-cpu"),
        ("aarch64-unknown-linux-gnu", "3.11", "tensorflow"),
        ("aarch64-unknown-linux-gnu", "3.13", "tensorflow"),
        ("aarch64-apple-darwin", "3.11", "tensorflow"),
        ("aarch64-apple-darwin", "3.13", "tensorflow"),
    ],
)
def test_each_platform_has_the_packages_of_constraints(platform, python, tensorflow, wheel, package_index):
    pins = [line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    built = {"cloudml-hypertune", "promise"}  # pure Python, published as source only
    answer = run_uv(
        "pip", "compile", "-",
        f"--python={sys.executable}",
        f"--python-platform={platform}",
        f"--python-version={python}",
        f"--constraint={ROOT / 'constraints.txt'}",
        *[f"--only-binary={name}" for name in pins if name not in built],
        input=f"picture-trainer[cpu,dev] @ {wheel.as_uri()}",
        env={**os.environ, "MACOSX_DEPLOYMENT_TARGET": "14.0"},  # onnxruntime has no packages for macOS 13
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert set(re.findall(r"^(tensorflow(?:-cpu)?)==", answer.stdout, re.MULTILINE)) == {tensorflow}
