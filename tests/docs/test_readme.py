"""README.md, the tutorial and their translations: commands, flags, files, numbers and packages are those of the project."""

import importlib
import json
import pathlib
import re
import shlex
import statistics
import subprocess
import sys

import pytest

import trainer
from tests.support.paths import ROOT
from tests.support.trainer_flags import flags_of
from trainer import cli, config, task

PAGES = ["README.md", "README.es.md", "docs/tutorial.md", "docs/tutorial.es.md"]
README = (ROOT / "README.md").read_text()
SPANISH_README = (ROOT / "README.es.md").read_text()


def commands_of(page: str) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_commands(page):
    assert len(commands_of(page)) >= 8


@pytest.mark.parametrize("line", sorted({line for page in PAGES for line in commands_of(page)}))
def test_each_command_is_valid(line):
    words = shlex.split(line)
    if words[0] == "make":
        answer = subprocess.run(
            ["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert answer.returncode == 0, answer.stderr
    elif words[:2] == ["docker", "build"]:  # tests/support/container_check.sh builds and runs the image
        assert f"ARG {words[words.index('--build-arg') + 1].split('=')[0]}" in (ROOT / "Dockerfile").read_text()
    elif words[:2] == ["docker", "run"]:
        words = words[words.index("trainer") + 1 :]  # the arguments after the name of the image
        module, words = (words[1], words[2:]) if words[0] == "-m" else ("trainer.task", words)
        flags_of(importlib.import_module(module).define_flags)([sys.executable, *words])
    elif words[:2] == ["pip", "wheel"]:  # tests/test_install.py builds the wheel
        assert words[2:] == ["--no-deps", "--wheel-dir=dist", "."]
    elif words[0] == "pip":
        project, _, extra = words[-1].removesuffix("]").partition("[")
        editable = ["--editable"] if project == "." else []
        assert words[:-1] == ["pip", "install", "--constraint", "constraints.txt", *editable]
        assert project in (".", f"dist/picture_trainer-{trainer.__version__}-py3-none-any.whl")
        assert f'"{extra}": [' in (ROOT / "setup.py").read_text()
    elif words[:3] == ["python3", "-m", "venv"]:
        assert f"VENV := {words[3]}\n" in (ROOT / "Makefile").read_text()
    elif words[0] == "source":
        assert f"VENV := {words[1].split('/')[0]}\n" in (ROOT / "Makefile").read_text()
    elif words[:3] == ["kubectl", "apply", "-k"]:  # tests/deploy/test_kubernetes.py checks the overlay
        assert (ROOT / words[3] / "kustomization.yaml").exists()
    elif words[:2] == ["kubectl", "logs"]:
        assert f"name: {words[-1].split('/')[1]}\n" in (ROOT / "deploy/kubernetes/base/job.yaml").read_text()
    elif words[:3] == ["python", "deploy/submit.py", "vertex"]:
        # tests/deploy/test_vertex.py submits each specification
        assert (ROOT / words[3].removeprefix("--config=")).exists()
        assert words[4:] in ([], ["--dry_run"])
    else:
        if words[0] == "picture-trainer":
            words = ["python", "-m", f"trainer.{cli.COMMANDS[words[1]]}", *words[2:]]
        assert words[:2] == ["python", "-m"], "no test checks this kind of command"
        values = flags_of(importlib.import_module(words[2]).define_flags)
        values([sys.executable, *with_flag_files(words[3:])])  # raises for an unknown flag or a wrong value


def with_flag_files(words: list[str]) -> list[str]:
    """The words, with each --flagfile replaced by its lines."""
    lines = []
    for word in words:
        path = word.removeprefix("--flagfile=")
        lines += flag_lines(ROOT / path) if path != word else [word]
    return lines


def flag_lines(path: pathlib.Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.startswith("--")]


def flag_table(page: str) -> list[tuple[str, str]]:
    return re.findall(r"^\| `--(\w+)` \| (\S+) \|", (ROOT / page).read_text(), re.MULTILINE)


def numbers_of(text: str, *, is_spanish: bool = False) -> set[str]:
    """The numbers of the prose and tables, outside code and links, as Python writes them."""
    text = re.sub(r"```.*?```|`[^`\n]*`|\]\(.*?\)|http\S+", " ", text, flags=re.DOTALL)
    if is_spanish:
        text = re.sub(r"(?<=\d) (?=\d{3}\b)", "", text)
        text = re.sub(r"(?<=\d),(?=\d)", ".", text)
    else:
        text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    return set(re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", text))


def test_the_spanish_pages_have_the_same_commands_flags_and_headings():
    for name in ("README", "docs/tutorial"):
        english, spanish = (ROOT / f"{name}.md").read_text(), (ROOT / f"{name}.es.md").read_text()
        assert commands_of(f"{name}.es.md") == commands_of(f"{name}.md")
        for pattern in (r"^#+ ", r"^\| "):  # headings, and rows of tables
            assert len(re.findall(pattern, spanish, re.MULTILINE)) == len(re.findall(pattern, english, re.MULTILINE)), (
                pattern
            )
    assert flag_table("README.es.md") == flag_table("README.md")


def test_the_spanish_readme_has_the_same_numbers_and_files():
    spanish = re.sub(r"<!-- (\w+) -->.*?<!-- end of \1 -->", "", SPANISH_README, flags=re.DOTALL)
    english = re.sub(r"<!-- (\w+) -->.*?<!-- end of \1 -->", "", README, flags=re.DOTALL)
    for pattern in (r"--\w+", r"`[\w./]+\.(?:json|csv|html|png|txt|h5|md|tflite|onnx|py|flags)`", r"\]\(\w[\w./-]*\)"):
        names = {*re.findall(pattern, english)} - {"](README.es.md)"}
        assert names <= {*re.findall(pattern, spanish)}, pattern
    assert len(numbers_of(english)) > 70
    assert numbers_of(english) <= numbers_of(spanish, is_spanish=True)


@pytest.mark.parametrize("page", ["README.es.md", "docs/tutorial.es.md"])
def test_a_spanish_page_has_a_decimal_comma_in_its_prose(page):
    code = r"```.*?```|`[^`\n]*`( \| \S+ \|)?|\]\(.*?\)|http\S+"  # with the default of a flag in its table
    prose = re.sub(code, " ", (ROOT / page).read_text(), flags=re.DOTALL)
    assert set(re.findall(r"\d\.\d+", prose)) <= {
        "3.11",
        "3.13",
        "2.0",
        "3.0",
    }  # Python 3.11 to 3.13, Apache-2.0, AGPL-3.0
    assert not re.findall(r"\b\d{1,3},000\b", prose)


def figures_of(folder: str, *words: str) -> list[dict]:
    """The metrics of the suites of docs/`folder` whose titles contain these words."""
    suites = json.loads((ROOT / "docs" / folder / "benchmark.json").read_text())["suites"]
    return [next(suite["figures"] for suite in suites if word in suite["title"]) for word in words]


def medians(metrics: dict, name: str, *baselines: str, digits: str = "#.3g") -> list[str]:
    return [f"{statistics.median(metrics[baseline][name]):{digits}}".rstrip(".") for baseline in baselines]


def rows_after(place: str) -> list[list[str]]:
    """The numbers of seconds and percent in each row of the first table of measurements after this text of the README."""
    header = "| measurement | this project | alternatives |\n| --- | --- | --- |\n"
    rows = README.partition(place)[2].partition(header)[2].partition("\n\n")[0].splitlines()
    return [re.findall(r"\b(\d+\.?\d*)(?= ?(?:s\b|%))", row.split(" | ", 1)[1]) for row in rows]


def test_the_measurements_in_readme_are_those_of_the_benchmark():
    job, accuracy, inference, step, small, large, growth = figures_of(
        "benchmark",
        "whole jobs",
        "96.49",
        "features by",
        "training steps",
        "original images",
        "12-megapixel",
        "growing",
    )
    pipelines = ("trainer pipeline", "image_dataset_from_directory", "ImageDataGenerator", "plain decode")
    recipes = [
        [f"{100 * metrics['best_val_accuracy'][0]:.1f}", f"{metrics['seconds'][0]:.0f}"]
        for metrics in accuracy.values()
    ]
    networks = [
        f"{name}, float32, 32 images at a time"
        for name in ("trainer folded", "Keras predict", "onnxruntime", "openvino")
    ]
    steps = [
        f"{name}, float32"
        for name in ("trainer loop", "Keras fit", "PyTorch of transformers", "PyTorch of transformers, compiled")
    ]
    assert rows_after("## Cost and benchmark") == [
        medians(job, "cpu_seconds", "trainer job", "earlier job"),
        medians(job, "cpu_seconds", "trainer job, features in the cache", "earlier job, features in the cache"),
        recipes[0] + recipes[1],
        medians(inference, "cpu_seconds_per_1000", *networks),
        medians(step, "cpu_seconds_per_1000", *steps),
        medians(small, "cpu_seconds_per_1000", *pipelines),
        medians(large, "cpu_seconds_per_1000", *pipelines),
        medians(growth, "list_and_split_seconds", "100,000 images"),
    ]
    memory = medians(job, "peak_mib", "trainer job", "earlier job", digits=",.0f")
    assert "peak memory was {} MiB, that of the earlier version {} MiB".format(*memory) in README


def test_the_measurements_of_the_intel_machine_in_readme_are_those_of_its_benchmark():
    accuracy, step = figures_of("benchmark/intel_amx", "96.49", "training steps")
    ours, articles = accuracy
    assert rows_after("an Intel Xeon with AMX, an earlier") == [
        [
            *medians(accuracy, "seconds_to_goal", ours),
            f"{100 * accuracy[articles]['best_val_accuracy'][0]:#.3g}",
            *medians(accuracy, "seconds_to_goal", articles),
        ],
        medians(step, "cpu_seconds_per_1000", "trainer loop, mixed_bfloat16", "Keras fit, mixed_bfloat16"),
    ]


def test_the_recipes_in_readme_are_those_that_were_measured():
    suites = json.loads((ROOT / "docs" / "recipe" / "recipes.json").read_text())["suites"]
    labels = ("trainer --recipe=head", "trainer --recipe=finetune")
    means = [[statistics.mean(suite["figures"][label]["test_accuracy"]) for label in labels] for suite in suites]
    rows = re.findall(r"^\| .+ \| (0\.\d{3}) \| (0\.\d{3}) \|$", README, re.MULTILINE)
    assert rows == [(f"{head:.3f}", f"{tuned:.3f}") for head, tuned in means]


def test_each_screenshot_exists_and_has_a_script():
    names = {
        name for page in PAGES for name in re.findall(r"!\[[^]]+\]\(docs/images/([\w.]+)\)", (ROOT / page).read_text())
    }
    assert names == {path.name for path in (ROOT / "docs" / "images").iterdir()} >= {"report.png", "served.png"}
    script = (ROOT / "docs" / "screenshots.py").read_text()
    assert all(f'"{name}"' in script for name in names)


def test_each_linked_file_exists():
    pages = [*PAGES, "CONTRIBUTING.md", "docs/architecture.md"]
    for page in pages:
        for link in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", (ROOT / page).read_text()):
            assert (ROOT / page).parent.joinpath(link).exists(), (page, link)


def test_git_ignores_what_the_commands_of_the_readme_write():
    written = {
        path.partition("/")[0]
        for line in commands_of("README.md")
        for path in re.findall(r"--(?:job_dir|output_dir|report_dir|output|wheel-dir)=(?!gs:|/)(\S+)", line)
    }
    assert written >= {"job", "study", "inspection"}
    paths = [f"{name}/" if "." not in name else name for name in written | {"pictures", "demo_job"}]
    ignored = subprocess.run(["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True, check=False)
    assert set(ignored.stdout.split()) == set(paths)


def test_the_file_tree_is_complete():
    tree = README.partition("<!-- files -->\n```\n")[2].partition("\n```")[0]
    listed, folders = set(), [""]
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[: depth + 1], name]
        listed.add("".join(folders[1:]))
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "trainer").rglob("*.py")}
    assert {name for name in listed if name.startswith("trainer/") and name.endswith(".py")} == {
        name for name in modules if not name.endswith("__init__.py")
    }
    assert {f"trainer/{path.name}/" for path in (ROOT / "trainer").iterdir() if (path / "__init__.py").exists()} == {
        name for name in listed if re.fullmatch(r"trainer/\w+/", name)
    }
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {name.partition("/")[0] for name in tracked if not name.startswith(".")}
    assert {name.partition("/")[0] for name in listed} == top


@pytest.mark.parametrize("path", sorted((ROOT / "deploy" / "flags").glob("*.flags")), ids=lambda path: path.name)
def test_each_flag_file_is_a_valid_configuration(path):
    values = flags_of(task.define_flags)
    values([sys.executable, *flag_lines(path)])
    config.Config(**{name: values[name].value for name in config.DEFAULTS if name in values})


def test_the_recipe_of_the_article_is_in_its_flag_file():
    steps = """--preprocessing=rescale --validation_split=0.2 --image_size=224 --weights=imagenet --head=flatten --summary
        --batch_norm=train --optimizer=adam --learning_rate=1e-4 --lr_schedule=constant --epochs=100 --head_epochs=0"""
    assert set(steps.split()) <= set(flag_lines(ROOT / "deploy" / "flags" / "article.flags"))


def test_contributing_lists_the_packages_of_setup_py():
    table = (ROOT / "CONTRIBUTING.md").read_text().split("# Dependencies")[1]
    cells = re.findall(r"^\| ([a-z][\w., -]*) \|", table, re.MULTILINE)
    listed = {name for cell in cells for name in cell.split(", ")}
    required = set(re.findall(r'"([A-Za-z][\w.-]*?)(?:\[[\w-]+\])?>=[\d.]', (ROOT / "setup.py").read_text()))
    assert listed - {"package"} == required
