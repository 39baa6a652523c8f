"""Starts a command by its name: `picture-trainer train`, `python -m trainer train`.

Only the module of that command is imported.
"""

import ast
import difflib
import importlib
import pathlib
import shutil
import sys
import textwrap

from trainer import cli

DEMO = "Trains on images that the project draws, on a CPU in a few minutes, and exports the model."


def main() -> None:
    """Runs the command that the first argument names. Without one, lists the commands."""
    program = "python -m trainer" if __name__ == "__main__" else "picture-trainer"
    name, arguments = (sys.argv[1] if len(sys.argv) > 1 else "help"), sys.argv[2:]
    if name == "--version":
        print(cli.version())
    elif name in ("help", "--help", "-h"):
        print(_list_of_commands(program))
    elif name not in cli.COMMANDS:
        similar = difflib.get_close_matches(name, cli.COMMANDS, n=1)
        hint = f"did you mean {similar[0]}?" if similar else f"pass one of {', '.join(cli.COMMANDS)}."
        print(f"error: {name!r} is not a command: {hint}\n`{program} --help` lists the commands.", file=sys.stderr)
        sys.exit(cli.EXIT_USER_ERROR)
    else:
        sys.argv = [f"{program} {name}", *(["--flagfile=demo"] if name == "demo" else []), *arguments]
        module = importlib.import_module(f"trainer.{cli.COMMANDS[name]}")
        cli.run(module.main, define_flags=module.define_flags)


def _list_of_commands(program: str) -> str:
    """The name and the purpose of each command. The purpose is the first line of its module, which is not imported."""
    lines = [f"Usage: {program} COMMAND [--flag=value ...]", ""]
    width = min(shutil.get_terminal_size().columns, 110)
    for name, module in cli.COMMANDS.items():
        source = pathlib.Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
        purpose = DEMO if name == "demo" else (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
        lines += textwrap.wrap(purpose, width, initial_indent=f"  {name:10} ", subsequent_indent=" " * 13)
    return "\n".join([*lines, "", f"`{program} COMMAND --help` lists the flags of a command."])


if __name__ == "__main__":
    main()
