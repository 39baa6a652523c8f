"""Writes the generated parts of docs/architecture.md: the drawing, and each file in one line.

python docs/architecture.py

The drawing is the import table that tests/test_imports.py holds the code to, without the arrows that follow from others;
the lines are the first ones of the modules' docstrings.
"""

import ast
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
sys.path.insert(0, str(ROOT / "tests"))

from test_imports import ALLOWED, TRAINER  # noqa: E402

# What every stage writes files or talks to people with: arrows from these would hide the way of the data.
EVERYWHERE = {"storage", "bucket", "config", "command", "wording"}


def drawing(root: str = "task") -> str:
    """What `root` is built on, as Mermaid: an arrow goes from a module to those that take what it gives."""
    taken = {name: allowed - EVERYWHERE for name, allowed in ALLOWED.items()}
    names = _below(root, taken) | {root}
    lines = ["```mermaid", "flowchart LR"]
    for name in sorted(names):
        others = {below for other in taken[name] for below in _below(other, taken)}
        lines += [f"    {other} --> {name}" for other in sorted(taken[name] - others)]
    return "\n".join([*lines, "```"])


def _below(name: str, taken: dict[str, set[str]]) -> set[str]:
    return {below for other in taken[name] for below in {other} | _below(other, taken)}


def lines_of_files() -> str:
    """A table of the modules, each with the first sentence of its docstring."""
    rows = ["| file | what |", "| --- | --- |"]
    for path in sorted(TRAINER.glob("*.py")):
        if path.stem != "__init__":
            first = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]
            rows.append(f"| `trainer/{path.name}` | {first} |")
    return "\n".join(rows)


def with_generated_parts(page: str) -> str:
    """The page with what stands between its markers made anew."""
    for name, part in (("drawing", drawing()), ("files", lines_of_files())):
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, behind = page.partition(start)
        page = f"{before}{start}{part}\n{end}{behind.partition(end)[2]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(with_generated_parts(PAGE.read_text()))
