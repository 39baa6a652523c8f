"""What README.md, its translation and the tutorial say is so: commands are taken, flags and files exist."""

import importlib
import json
import pathlib
import re
import shlex
import statistics
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from tests.support.trainer_flags import flags_of
from trainer import config, task

PAGES = ["README.md", "README.es.md", "docs/tutorial.md"]
README = (ROOT / "README.md").read_text()


def commands_of(page: str) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("page", PAGES)
def test_there_are_commands(page):
    assert len(commands_of(page)) >= 8


@pytest.mark.parametrize("line", sorted({line for page in PAGES for line in commands_of(page)}))
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
        assert words[:-1] == ["pip", "install", "--constraint", "constraints.txt", "--editable"]
        assert f'"{words[-1][2:-1]}": [' in (ROOT / "setup.py").read_text()
    elif words[0] == "source":
        assert f"VENV := {words[1].split('/')[0]}\n" in (ROOT / "Makefile").read_text()
    elif words[:3] == ["kubectl", "apply", "-k"]:  # tests/test_deploy_kubernetes.py renders and checks what it holds
        assert (ROOT / words[3] / "kustomization.yaml").exists()
    elif words[:2] == ["kubectl", "logs"]:
        assert f"name: {words[-1].split('/')[1]}\n" in (ROOT / "deploy/kubernetes/base/job.yaml").read_text()
    elif words[:3] == ["python", "deploy/submit.py", "vertex"]:
        # tests/test_deploy_vertex.py submits each specification
        assert (ROOT / words[3].removeprefix("--config=")).exists()
        assert words[4:] in ([], ["--dry_run"])
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


def flag_table(page: str) -> list[tuple[str, str]]:
    return re.findall(r"^\| `--(\w+)` \| (\S+) \|", (ROOT / page).read_text(), re.MULTILINE)


def test_the_flag_table_tells_the_defaults():
    rows = flag_table("README.md")
    assert len(rows) >= 10
    for name, default in rows:
        assert str(config.DEFAULTS[name]).lower() == default.lower(), name


def test_the_spanish_readme_names_the_same_commands_flags_and_files():
    assert commands_of("README.es.md") == commands_of("README.md")
    assert flag_table("README.es.md") == flag_table("README.md")
    spanish = (ROOT / "README.es.md").read_text()
    for named in (r"--\w+", r"`[\w/]+\.(?:json|csv|html|png|txt|h5|md)`", r"\]\([\w./-]+\)", r"\b\d+[.,]\d{2,}\b"):
        assert {*re.findall(named, README)} - {"](README.es.md)"} <= {*re.findall(named, spanish)}, named


def test_the_figures_of_the_comparison_are_those_of_the_benchmark():
    suites = json.loads((ROOT / "docs" / "benchmark" / "benchmark.json").read_text())["suites"]
    by_title = {suite["title"]: suite["figures"] for suite in suites}
    small, large, growth, step, accuracy = (
        next(figures for title, figures in by_title.items() if word in title)
        for word in ("as they are", "12-megapixel", "grow", "training steps", "96.49")
    )

    def medians(figures: dict, name: str, *baselines: str) -> list[str]:
        return [f"{statistics.median(figures[baseline][name]):#.3g}" for baseline in baselines]

    pipelines = ("our pipeline", "image_dataset_from_directory", "ImageDataGenerator", "plain decode")
    ours, articles = accuracy
    torch = next(name for name in step if name.startswith("PyTorch"))
    expected = [
        [
            *medians(accuracy, "seconds_to_goal", ours),
            f"{100 * accuracy[articles]['best_val_accuracy'][0]:#.3g}",
            *medians(accuracy, "seconds_to_goal", articles),
        ],
        medians(step, "images_per_second", "our loop, float32", "Keras fit, float32", torch),
        medians(step, "images_per_second", "our loop, mixed_bfloat16", "Keras fit, mixed_bfloat16"),
        medians(small, "cpu_seconds_per_1000", *pipelines),
        medians(large, "cpu_seconds_per_1000", *pipelines),
        medians(growth, "list_and_split_seconds", "100,000 pictures"),
    ]
    table = README.partition("| what | here | instead |\n| --- | --- | --- |\n")[2].partition("\n\n")[0]
    told = [re.findall(r"\b(\d+\.?\d*)\.?(?= (?:s|img/s|%))", row.split(" | ", 1)[1]) for row in table.splitlines()]
    assert told == [[figure.rstrip(".") for figure in row] for row in expected]


def test_each_picture_is_there_and_made_by_a_script():
    names = {
        name for page in PAGES for name in re.findall(r"!\[[^]]+\]\(docs/images/([\w.]+)\)", (ROOT / page).read_text())
    }
    assert names == {path.name for path in (ROOT / "docs" / "images").iterdir()} >= {"report.png", "served.png"}
    script = (ROOT / "docs" / "screenshots.py").read_text()
    assert all(f'"{name}"' in script for name in names)


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


def test_every_package_is_told_of_and_no_other():
    table = (ROOT / "CONTRIBUTING.md").read_text().split("# What it stands on")[1]
    told = {name for cell in re.findall(r"^\| ([a-z][\w., -]*) \|", table, re.MULTILINE) for name in cell.split(", ")}
    required = set(re.findall(r'"([A-Za-z][\w.-]*?)(?:\[[\w-]+\])?>=[\d.]', (ROOT / "setup.py").read_text()))
    assert told - {"package"} == required
