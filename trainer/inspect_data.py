"""The data doctor: looks at every picture of a folder before a job does, and says what is wrong.

    python -m trainer.inspect_data --data_dir=pictures
    python -m trainer.inspect_data --data_dir=pictures --fix=list.txt && xargs -d '\\n' rm -- < list.txt

Tells classes, sizes, formats, files that are no pictures with their reasons, the same picture twice or under two labels,
pictures that look alike (and would be trained on and validated with), small ones, classes out of balance. Leaves
inspect.json, inspect.html and sizes.png in --output_dir. Exit code 0, or 1 with --strict if something is wrong.
"""

import os
import sys
import time

import markupsafe
import numpy as np
from absl import flags, logging

from trainer import cli
from trainer.data import inspection, tfds
from trainer.data.inspection import InspectedFile, Inspection
from trainer.errors import UserError
from trainer.reporting import html, plots, thumbnails
from trainer.storage import files

SHOWN = 5  # lines per finding on the terminal


CLASSES_SHOWN = 30


SHOWN_GROUPS, SHOWN_FILES = 24, 6  # of thumbnails in the page


def define_flags() -> None:
    """The flags of this command."""
    flags.DEFINE_string("data_dir", "", "Folder with one sub-folder of pictures per class.")
    flags.DEFINE_string("output_dir", "inspection", "Folder for inspect.json, inspect.html and sizes.png.")
    flags.DEFINE_string("fix", "", "Write here, one path per line, what to remove: bad files, all copies but the first, and "
                        "all files whose bytes stand under two labels.")  # fmt: skip
    flags.DEFINE_boolean("strict", False, "End with exit code 1 if something is wrong.")


def main(arguments: list[str]) -> int:
    """Inspects the folder; returns the exit code."""
    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag: write --data_dir={arguments[0]} if it is the folder.")
    cli.require("data_dir")
    data_dir, output_dir, fix = cli.flag_values(("data_dir", "output_dir", "fix")).values()
    started = time.monotonic()
    with tfds.as_folder(data_dir) as directory:
        found = inspection.inspect(directory, progress=sys.stderr.isatty())
        seconds = time.monotonic() - started
        findings = find_problems(found)
        _write(found, findings, directory, output_dir)
    if fix:
        _write_fix(found, data_dir, fix)
    print("\n".join(_lines(found, findings, data_dir)))
    logging.info("%d files in %.1f s, %.0f per second.", len(found.files), seconds, len(found.files) / seconds)
    print(f"page: {output_dir}/inspect.html")
    return 1 if findings and flags.FLAGS.strict else 0


def find_problems(found: Inspection) -> list[tuple[str, list[str]]]:
    """The findings that --strict refuses: a sentence each, and the files it is about."""

    def groups(of: list[list[InspectedFile]]) -> list[str]:
        return [" = ".join(f"{file.path!r}" for file in group) for group in of]

    empty = [name for name, count in found.class_counts.items() if not count]
    single = [name for name, count in found.class_counts.items() if count == 1]
    counts = found.class_counts
    ends = (min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__))
    unbalanced = [", ".join(f"{name!r}: {counts[name]}" for name in ends)] if found.is_unbalanced else []
    findings = [
        ("files that are no readable pictures: remove or replace them", [f"{f.path!r}: {f.reason}" for f in found.bad]),
        ("classes without a picture: add some, or remove the folder", empty),
        ("classes of one picture: it is trained on and never validated", single),
        ("the same bytes under two labels: decide for one", groups(found.two_label_duplicates)),
        ("the same bytes more than once in a class: one copy is enough", groups(found.same_label_duplicates)),
        ("pictures that look alike under two labels: look at them", groups(found.two_label_near_duplicates)),
        (
            "pictures that look alike, one to train on and one to validate: the accuracy will be too good",
            groups(found.leaks),
        ),
        (
            f"pictures smaller than {inspection.SMALL_SIDE} pixels",
            [f"{f.path!r}: {f.width} x {f.height}" for f in found.small],
        ),
        ("classes out of balance: consider --class_weight=balanced", unbalanced),
    ]
    return [(sentence, about) for sentence, about in findings if about]


def _lines(found: Inspection, findings: list[tuple[str, list[str]]], data_dir: str) -> list[str]:
    summary = inspection.summary(found)
    lines = [f"{data_dir}: {len(found.good)} pictures in {len(found.class_names)} classes"]
    counts = [f"  {count:7d} {name!r}" for name, count in found.class_counts.items()]
    lines += _shortened(counts, CLASSES_SHOWN, "classes")
    lines.append("formats: " + ", ".join(f"{kind} {count}" for kind, count in summary["formats"].items()))
    if summary["small_side"]:
        lines.append(
            "smaller side: {min} to {max} pixels, half of them below {median:g}".format(**summary["small_side"])
        )
    if found.misnamed:
        lines.append(f"note: {len(found.misnamed)} endings name another format; harmless, the content decides:")
        lines += _shortened([f"  {f.path!r} is a {f.kind}" for f in found.misnamed], SHOWN, "files")
    if found.near_duplicates:
        lines.append(f"note: {len(found.near_duplicates)} groups look alike within a class.")
    for sentence, about in findings:
        lines.append(f"wrong: {sentence} ({len(about)})")
        lines += _shortened([f"  {text}" for text in about], SHOWN, "more")
    return lines if findings else [*lines, "Nothing is wrong."]


def _shortened(lines: list[str], length: int, what: str) -> list[str]:
    return lines if len(lines) <= length else [*lines[:length], f"  and {len(lines) - length} {what}"]


def _write(found: Inspection, findings: list[tuple[str, list[str]]], data_dir: str, output_dir: str) -> None:
    files.make_directory(output_dir)
    files.write_json(os.path.join(output_dir, "inspect.json"), inspection.summary(found))
    histogram = ""
    if found.good:
        with plots.style():
            figure = plots.size_histogram(np.array([file.small_side for file in found.good]))
            files.atomic_write(os.path.join(output_dir, "sizes.png"), plots.png(figure))
            histogram = markupsafe.Markup(plots.svg(figure, "sizes"))

    def shown(groups: list[list[InspectedFile]]) -> list[list[dict]]:
        return thumbnails.of_groups(data_dir, groups, num_groups=SHOWN_GROUPS, num_files=SHOWN_FILES)

    sections = [
        ("Same bytes under two labels", found.two_label_duplicates),
        ("Alike under two labels", found.two_label_near_duplicates),
        ("Alike, one trained on and one validated with", found.leaks),
        ("Same bytes twice in a class", found.same_label_duplicates),
        ("Alike within a class", found.near_duplicates),
    ]
    text = html.render(
        "inspect.html",
        data_dir=data_dir,
        found=found,
        findings=findings,
        summary=inspection.summary(found),
        histogram=histogram,
        sections=[(title, len(groups), shown(groups)) for title, groups in sections if groups],
        largest=max([1, *found.class_counts.values()]),
    )
    files.atomic_write(os.path.join(output_dir, "inspect.html"), text)


def _write_fix(found: Inspection, data_dir: str, path: str) -> None:
    removable = [files.join(data_dir, file.path) for file in found.to_remove()]
    # A folder is not removed by a list of files, and a name of two lines cannot stand in one.
    listed = [name for name in removable if "\n" not in name and _is_file(name)]
    files.atomic_write(path, "".join(f"{name}\n" for name in listed))
    logging.info("%s lists %d files to remove.", path, len(listed))
    for name in sorted(set(removable) - set(listed)):
        logging.warning("%r cannot be listed in %s: remove it by hand.", name, path)


def _is_file(path: str) -> bool:
    return files.is_remote(path) or (os.path.lexists(path) and not os.path.isdir(path))


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
