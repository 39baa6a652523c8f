"""What README.md says is so: its commands are taken by the commands, its flags and files exist."""

import importlib
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from conftest import flags_of

from trainer import config, task

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.partition("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]


def test_there_are_commands():
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("line", COMMANDS)
def test_each_command_is_taken(line):
    words = shlex.split(line)
    if words[0] == "make":
        answer = subprocess.run(
            ["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert answer.returncode == 0, answer.stderr
    elif words[:2] == ["docker", "build"]:  # tests/container_check.sh builds and runs the image itself
        assert f"ARG {words[words.index('--build-arg') + 1].split('=')[0]}" in (ROOT / "Dockerfile").read_text()
    elif words[:2] == ["docker", "run"]:
        words = words[words.index("trainer") + 1 :]  # what stands behind the image's name
        module, words = (words[1], words[2:]) if words[0] == "-m" else ("trainer.task", words)
        flags_of(importlib.import_module(module).define_flags)([sys.executable, *words])
    elif words[0] == "pip":
        assert words == ["pip", "install", "--constraint", "constraints.txt", "--editable", ".[cpu]"]
        assert (ROOT / "constraints.txt").exists()
    else:
        assert words[:2] == ["python", "-m"], "a command that no test knows how to check"
        values = flags_of(importlib.import_module(words[2]).define_flags)
        values([sys.executable, *with_flag_files(words[3:])])  # raises on a flag or a value that is not taken


def with_flag_files(words: list[str]) -> list[str]:
    """The words with the lines of each --flagfile in its place."""
    lines = []
    for word in words:
        path = word.removeprefix("--flagfile=")
        lines += flag_lines(ROOT / path) if path != word else [word]
    return lines


def flag_lines(path: pathlib.Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.startswith("--")]


def test_the_flag_table_tells_the_defaults():
    rows = re.findall(r"^\| `--(\w+)` \| (\S+) \|", README, re.MULTILINE)
    assert len(rows) >= 10
    for name, default in rows:
        assert str(config.DEFAULTS[name]).lower() == default.lower(), name


def test_the_file_tree_is_complete():
    named = set(re.findall(r"trainer/(\w+)\.py", README))
    assert named <= {path.stem for path in (ROOT / "trainer").glob("*.py")}


@pytest.mark.parametrize("path", sorted((ROOT / "deploy" / "flags").glob("*.flags")), ids=lambda path: path.name)
def test_each_flag_file_is_a_run_that_may_be(path):
    values = flags_of(task.define_flags)
    values([sys.executable, *flag_lines(path)])
    config.Config(**{name: values[name].value for name in config.DEFAULTS if name in values})


def test_the_articles_recipe_is_in_its_flag_file():
    steps = """--preprocessing=rescale --validation_split=0.2 --image_size=224 --weights=imagenet --head=flatten --summary
        --batch_norm=train --optimizer=adam --learning_rate=1e-4 --lr_schedule=constant --epochs=100 --head_epochs=0"""
    assert set(steps.split()) <= set(flag_lines(ROOT / "deploy" / "flags" / "article.flags"))
