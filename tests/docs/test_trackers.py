"""docs/trackers.md and the Python examples of README.md: the commands are valid, and the programs are Python."""

import json
import re
import shlex

import pytest

from tests.support.paths import ROOT
from tests.support.trainer_flags import parse
from trainer.artifacts.job_dir import HISTORY_COLUMNS
from trainer.reporting import epoch_command

TRACKERS = (ROOT / "docs" / "trackers.md").read_text()
COMMANDS = re.findall(r"^python -m trainer\.task .*$", TRACKERS, re.MULTILINE)


@pytest.mark.parametrize("page", ["README.md", "README.es.md", "docs/trackers.md"])
def test_each_python_example_is_python(page):
    examples = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert examples
    for example in examples:
        compile(example, page, "exec")


def test_each_command_is_valid():
    assert len(COMMANDS) == 3
    assert all(parse(shlex.split(command)[3:]).on_epoch for command in COMMANDS)


def test_the_first_command_writes_the_documented_line(tmp_path, monkeypatch):
    (line,) = re.findall(r"^\{.*\}$", TRACKERS, re.MULTILINE)
    row = json.loads(line)
    assert tuple(row) == (*HISTORY_COLUMNS, "job_dir")
    monkeypatch.chdir(tmp_path)
    job_dir = row.pop("job_dir")
    epoch_command.make_runner(parse(shlex.split(COMMANDS[0])[3:]).on_epoch, job_dir)(row)
    assert (tmp_path / "epochs.jsonl").read_text() == line + "\n"
