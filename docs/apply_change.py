"""Applies a worked change of docs/changes to the code under trainer/.

    python docs/apply_change.py backbone

docs/changes/NAME.toml holds a list of edits. Each replaces the text `old` by the text `new` in the one file under trainer/
that contains `old`, wherever that is.
"""

import pathlib
import sys
import tomllib

CHANGES = pathlib.Path(__file__).parent / "changes"


def apply(name: str, trainer: pathlib.Path) -> list[pathlib.Path]:
    """Makes the edits of the change `name` in the folder `trainer`; returns the changed files, one for each edit.

    Raises ValueError, before any file is written, if the `old` of an edit occurs in no place or in several.
    """
    texts = {path: path.read_text() for path in sorted(trainer.rglob("*.py"))}
    changed = []
    for edit in tomllib.loads((CHANGES / f"{name}.toml").read_text())["edit"]:
        old, new = edit["old"], edit["new"]
        places = [path for path, text in texts.items() for _ in range(text.count(old))]
        if len(places) != 1:
            raise ValueError(f"{name}.toml: {old!r} occurs {len(places)} times under {trainer}, expected once.")
        texts[places[0]] = texts[places[0]].replace(old, new)
        changed.append(places[0])
    for path in set(changed):
        path.write_text(texts[path])
    return changed


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python docs/apply_change.py {'|'.join(sorted(path.stem for path in CHANGES.glob('*.toml')))}")
    for path in apply(sys.argv[1], pathlib.Path(__file__).parents[1] / "trainer"):
        print(path)
