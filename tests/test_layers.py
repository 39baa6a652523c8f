"""Imports point only downwards through the layers, and only commands touch flags and the environment."""

import ast
import itertools
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

COMMANDS = ["task", "predict", "evaluate", "report", "inspect_data", "tune", "benchmark", "serve", "pack"]
# Top to bottom. A module may import from lower layers and from its own package, never from its own layer's other packages.
LAYERS = [
    ["__main__", "api"],  # __main__ imports the module of one command by its name, when it starts it
    COMMANDS,
    ["job"],
    ["job_results"],
    ["prepared_job"],
    ["serving", "benchmarks"],
    ["training", "reporting"],
    ["models", "artifacts"],
    ["data", "earlier_runs", "recipes"],
    ["config", "cli", "storage", "runtime"],
    ["flag_info"],
    ["errors", "formatting"],
]
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}
FILES = sorted((ROOT / "trainer").rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text()) for path in FILES}


def package_of(module: str) -> str:
    return module.split(".")[1]


def imports_of(tree: ast.AST) -> set[str]:
    """Modules of the project that are imported, at the top or inside functions, as in trainer.data.splits."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trainer":
            found |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.startswith("trainer.")}
    return {name if name in MODULES else name.rpartition(".")[0] for name in found}


@pytest.mark.parametrize("module", [name for name in MODULES if not name.endswith("__init__")])
def test_imports_point_only_downwards(module):
    for imported in imports_of(MODULES[module]):
        is_same_package = package_of(imported) == package_of(module)
        assert is_same_package or LEVEL[package_of(imported)] > LEVEL[package_of(module)], imported


def test_no_package_imports_anything():
    for name, tree in MODULES.items():
        if name.endswith("__init__") and name != "trainer.__init__":
            assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)], name


def test_the_api_is_imported_when_it_is_used():
    program = (
        "import sys, trainer; assert 'numpy' not in sys.modules; trainer.train; assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_no_imports_form_a_circle():
    remaining = {name: imports_of(tree) & set(MODULES) for name, tree in MODULES.items()}
    while leaves := {name for name, imported in remaining.items() if not imported & set(remaining)}:
        remaining = {name: imported for name, imported in remaining.items() if name not in leaves}
    assert not remaining


def test_only_commands_touch_flags_and_the_environment():
    for name, tree in MODULES.items():
        if package_of(name) not in {*COMMANDS, "cli", "api"}:
            attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            assert not attributes & {"os.environ", "flags.FLAGS"}, name


def test_every_module_belongs_to_a_layer():
    packages = {package_of(name) for name in MODULES if name != "trainer.__init__"}
    assert packages == set(itertools.chain.from_iterable(LAYERS))
