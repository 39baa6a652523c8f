"""Inspects every image of a folder before training, and reports problems.

    python -m trainer.inspect_data --data_dir=images
    python -m trainer.inspect_data --data_dir=images --fix=removed
        moves bad files, and all copies of an image but one, to the folder removed, from where they can be moved back
    python -m trainer.inspect_data --data_dir=images --weights=imagenet

Reports classes, sizes, formats, unreadable files with their reasons, exact duplicates within a class and under two
labels, images that look alike (also between training and validation), small images and unbalanced classes. With
--weights, lists the images of which another class is more probable than their label: they are no problem, but worth a
look. Writes inspect.json, inspect.html, sizes.png and label_issues.csv to --output_dir. Exit code 0, or 1 with --strict
if there is a problem.
"""

import functools
import os
import shutil
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import markupsafe
import numpy as np
from absl import flags, logging

from trainer import cli, config
from trainer.artifacts.job_dir import JobDir
from trainer.config import Config
from trainer.data import inspection, label_file, listing, tfds
from trainer.data.dataset import Examples
from trainer.data.inspection import InspectedFile, Inspection
from trainer.errors import UserError
from trainer.reporting import html, plots, thumbnails
from trainer.storage import files

if TYPE_CHECKING:  # imports TensorFlow
    from trainer.training.label_review import LabelReview

MAX_LINES = 5  # per problem on the terminal
MAX_CLASSES = 30  # on the terminal
MAX_GROUPS, MAX_GROUP_FILES = 24, 6  # of thumbnails on the page
MAX_LABELS = 24  # with a thumbnail on the page


class Problem(NamedTuple):
    """A kind of problem, with one text for each file, group of files or class that has it."""

    title: str
    details: list[str]


class Inspected(NamedTuple):
    """What the command prints and writes: the inspection, its problems, the doubtful labels if requested, and the page."""

    result: Inspection
    problems: list[Problem]
    review: "LabelReview | None"
    summary: dict[str, Any]
    page: str  # HTML


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of this command in `values`."""
    define_string = functools.partial(flags.DEFINE_string, flag_values=values)
    define_string("labels", "", "File of paths and labels, in place of folders per class, as in trainer.task.")
    define_string("data_dir", "", "Folder with one sub-folder of images per class, local or gs://; or tfds:NAME.")
    define_string("output_dir", "inspection", "Folder for inspect.json, inspect.html and sizes.png.")
    define_string("fix", "", "Folder to which bad files, and all files of equal content but the first, are moved; or a "
                  "file *.txt, to which their paths are written, one per line.")  # fmt: skip
    define_string("weights", "", "Weights of a ResNet50, to list labels that are likely wrong: imagenet, or a path.")
    flags.DEFINE_integer(
        "image_size",
        config.DEFAULTS["image_size"],
        "Side in pixels of the images for --weights.",
        lower_bound=32,
        flag_values=values,
    )
    flags.DEFINE_boolean("strict", False, "Exit with code 1 if there is a problem.", flag_values=values)


def main(arguments: list[str]) -> int:
    """Inspects the folder; returns the exit code."""
    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag: pass --data_dir={arguments[0]} if it is the folder.")
    found = run(flags.FLAGS)
    data_dir = label_file.data_dir_for(flags.FLAGS.labels, flags.FLAGS.data_dir)
    label_lines = _label_lines(found.result, found.review, flags.FLAGS.weights)
    print("\n".join(_lines(found.result, found.problems, data_dir) + label_lines))
    if found.result.to_remove() and not flags.FLAGS.fix and not flags.FLAGS.labels:
        num_files = len(found.result.to_remove())
        print(f"to move {num_files} bad files and copies away: {cli.this_command('--fix=removed')}")
    print(f"page: {files.join(flags.FLAGS.output_dir, 'inspect.html')}")
    return 1 if found.problems and flags.FLAGS.strict else 0


def run(values: flags.FlagValues) -> Inspected:
    """Inspects the folder and writes what the flags say; nothing without --output_dir and --fix."""
    labels, data_dir, output_dir, fix, weights, image_size = cli.flag_values(
        ("labels", "data_dir", "output_dir", "fix", "weights", "image_size"), values
    ).values()
    if not labels:
        cli.require("data_dir", values=values)
    elif fix:
        raise UserError(f"--fix={fix} lists files of class folders: with --labels, correct {labels}.")
    data_dir = label_file.data_dir_for(labels, data_dir)
    if weights == "none" or (weights not in ("", "imagenet") and not files.exists(weights)):
        raise UserError(f"--weights={weights} is not a file: pass imagenet, or the path of the weights of a ResNet50.")
    if fix and not fix.endswith(".txt"):
        _check_fix_folder(data_dir, fix)
    started = time.monotonic()
    with tfds.as_folder(data_dir) as directory:
        result = inspection.inspect(directory, progress=cli.shows_bars(), labels_file=labels)
        seconds, num_files = time.monotonic() - started, len(result.inspected)
        logging.info("%d files in %.1f s, %.0f per second.", num_files, seconds, num_files / seconds)
        problems = find_problems(result)
        review = _review_labels(result, directory, weights, image_size) if weights else None
        summary, page = _write(result, problems, review, directory, output_dir)
    if fix:
        (_write_fix if fix.endswith(".txt") else _move_to)(result, data_dir, fix)
    return Inspected(result, problems, review, summary, page)


def find_problems(result: Inspection) -> list[Problem]:
    """The problems for which --strict fails."""

    def groups(of: list[list[InspectedFile]]) -> list[str]:
        return [" = ".join(f"{file.path!r}" for file in group) for group in of]

    counts = result.class_counts
    empty = [name for name, count in counts.items() if not count]
    single = [name for name, count in counts.items() if count == 1]
    unbalanced = []
    if result.is_unbalanced:
        smallest, largest = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        unbalanced = [f"{smallest!r}: {counts[smallest]}, {largest!r}: {counts[largest]}"]
    small = [f"{file.path!r}: {file.width} x {file.height}" for file in result.small]
    problems = [
        Problem(
            "files that are not readable images: remove or replace them",
            [f"{file.path!r}: {file.reason}" for file in result.bad],
        ),
        Problem("classes without an image: add some, or remove the folder", empty),
        Problem("classes of one image, which is used for training and not for validation: add some", single),
        Problem(
            "classes named like parts of a data set: pass the folder of the classes, or train with --accept_layout",
            [repr(name) for name in result.class_names if listing.side_of(name)],
        ),
        Problem("the same content under two labels: keep one", groups(result.two_label_duplicates)),
        Problem("the same content more than once in a class: keep one", groups(result.same_label_duplicates)),
        Problem("images that look alike under two labels: check them", groups(result.two_label_near_duplicates)),
        Problem(
            "images that look alike in training and validation: the validation accuracy will be too high",
            groups(result.leaks),
        ),
        Problem(
            "images that other programs rotate or flip, and training does not: save them upright",
            [f"{file.path!r}: orientation {file.ignored_orientation}" for file in result.ignored_orientations],
        ),
        Problem(f"images smaller than {inspection.SMALL_SIDE} pixels", small),
        Problem("unbalanced classes: consider --class_weight=balanced", unbalanced),
    ]
    return [problem for problem in problems if problem.details]


def _lines(result: Inspection, problems: list[Problem], data_dir: str) -> list[str]:
    summary = inspection.summary(result)
    lines = [f"{data_dir}: {len(result.good)} images in {len(result.class_names)} classes"]
    counts = [f"  {count:7d} {name!r}" for name, count in result.class_counts.items()]
    lines += _shortened(counts, MAX_CLASSES, "classes")
    lines.append("formats: " + ", ".join(f"{name} {count}" for name, count in summary["formats"].items()))
    if summary["small_side"]:
        lines.append("smaller side: {min} to {max} pixels, median {median:g}".format(**summary["small_side"]))
    lines += [f"note: {note}." for note in result.notes]
    if result.misnamed:
        lines.append(f"note: {len(result.misnamed)} files have the extension of another format, which does no harm:")
        misnamed = [f"  {file.path!r} is a {file.image_format}" for file in result.misnamed]
        lines += _shortened(misnamed, MAX_LINES, "files")
    if result.near_duplicates:
        lines.append(f"note: {len(result.near_duplicates)} groups of images look alike within a class.")
    for problem in problems:
        lines.append(f"problem: {problem.title} ({len(problem.details)})")
        lines += _shortened([f"  {text}" for text in problem.details], MAX_LINES, "more")
    return lines if problems else [*lines, "No problems found."]


def _review_labels(result: Inspection, data_dir: str, weights: str, image_size: int) -> "LabelReview | None":
    """What heads that have not seen an image say of its label, as a job with these weights finds it; None if they cannot."""
    from trainer.training import folder_features, label_review

    ids = {name: index for index, name in enumerate(result.class_names)}
    examples = Examples(
        np.array([file.path for file in result.good], object),
        np.array([ids[file.class_name] for file in result.good], np.int32),
        np.array([file.content_hash for file in result.good], object),
    )
    if not len(examples):
        return None
    settings = Config(data_dir=data_dir, weights=weights, image_size=image_size)
    values, is_readable = folder_features.compute(data_dir, examples, result.class_names, settings)
    return label_review.of_features(
        examples.take(is_readable), values[is_readable], num_classes=len(ids), is_balanced=False, seed=settings.seed
    )


def _label_rows(result: Inspection, review: "LabelReview") -> list[dict[str, Any]]:
    """The rows of label_issues.csv."""
    examples, probabilities = review.listed()
    rows = zip(examples.paths, examples.labels, probabilities, strict=True)
    return [
        {
            "path": path,
            "label": result.class_names[label],
            "suggested_label": result.class_names[of_image.argmax()],
            "probability": round(float(of_image[label]), 6),
        }
        for path, label, of_image in rows
    ]


def _label_lines(result: Inspection, review: "LabelReview | None", weights: str) -> list[str]:
    if review is None:
        reason = "there are too many images, or too few" if weights else "--weights=imagenet does that"
        return [f"Labels were not examined: {reason}."]
    lines = [
        f"labels to check: for {len(review.issues)} of {len(review.examples)} images another class is more probable than the "
        "label (an image that is not listed may still have a wrong one)"
    ]
    rows = _label_rows(result, review)
    shown = [f"  {row['path']!r}: {row['label']!r} or rather {row['suggested_label']!r}" for row in rows]
    return lines + _shortened(shown, MAX_LINES, "more in label_issues.csv")


def _shortened(lines: list[str], length: int, what: str) -> list[str]:
    return lines if len(lines) <= length else [*lines[:length], f"  and {len(lines) - length} {what}"]


def _write(
    result: Inspection, problems: list[Problem], review: "LabelReview | None", data_dir: str, output_dir: str
) -> tuple[dict[str, Any], str]:
    """Returns the summary and the page, and writes both and sizes.png and label_issues.csv if there is an `output_dir`."""
    summary = inspection.summary(result)
    doubtful = []
    if output_dir:
        files.make_directory(output_dir)
    if review:
        if output_dir:
            JobDir(output_dir).write_label_issues(*review.listed(), result.class_names)
        rows = _label_rows(result, review)
        summary |= {"labels_examined": len(review.examples), "label_issues": rows}
        shown = [InspectedFile(row["path"], f"{row['label']} or rather {row['suggested_label']}?", "") for row in rows][
            :MAX_LABELS
        ]
        doubtful = thumbnails.of_groups(data_dir, [shown], num_groups=1, num_files=MAX_LABELS)[0]
    if output_dir:
        files.write_json(files.join(output_dir, "inspect.json"), summary)
    histogram = ""
    if result.good:
        with plots.style():
            figure = plots.size_histogram(np.array([file.small_side for file in result.good]))
            if output_dir:
                files.atomic_write(files.join(output_dir, "sizes.png"), plots.png(figure))
            histogram = markupsafe.Markup(plots.svg_element(plots.svg(figure, "sizes")))

    def with_thumbnails(groups: list[list[InspectedFile]]) -> list[list[dict]]:
        return thumbnails.of_groups(data_dir, groups, num_groups=MAX_GROUPS, num_files=MAX_GROUP_FILES)

    sections = [
        ("Same content under two labels", result.two_label_duplicates),
        ("Similar images under two labels", result.two_label_near_duplicates),
        ("Similar images in training and validation", result.leaks),
        ("Same content more than once in a class", result.same_label_duplicates),
        ("Similar images within a class", result.near_duplicates),
    ]
    text = html.render(
        "inspect.html",
        data_dir=data_dir,
        result=result,
        problems=problems,
        summary=summary,
        histogram=histogram,
        sections=[(title, len(groups), with_thumbnails(groups)) for title, groups in sections if groups],
        doubtful=doubtful,
        largest=max([1, *result.class_counts.values()]),
    )
    if output_dir:
        files.atomic_write(files.join(output_dir, "inspect.html"), text)
    return summary, text


def _write_fix(result: Inspection, data_dir: str, path: str) -> None:
    removable = [listing.join(data_dir, file.path) for file in result.to_remove()]
    # A list of files cannot remove a folder, and cannot hold a name with a line break.
    listed = [name for name in removable if "\n" not in name and _is_file(name)]
    files.atomic_write(path, b"".join(os.fsencode(name) + b"\n" for name in listed))  # rm takes bytes, not escapes
    logging.info("%s lists %d files to remove.", path, len(listed))
    for name in sorted(set(removable) - set(listed)):
        logging.warning("%r cannot be listed in %s: remove it by hand.", name, path)


def _check_fix_folder(data_dir: str, folder: str) -> None:
    """Raises UserError unless files can be moved from `data_dir` to a folder outside of it."""
    if files.is_remote(data_dir) or files.is_remote(folder) or data_dir.startswith("tfds:"):
        raise UserError(
            f"--fix={folder} moves files of a local folder to another one: pass --fix=list.txt for their list."
        )
    if os.path.commonpath([os.path.realpath(data_dir), os.path.realpath(folder)]) == os.path.realpath(data_dir):
        raise UserError(
            f"--fix={folder} is inside of --data_dir={data_dir}, as a class is: pass a folder outside of it."
        )


def _move_to(result: Inspection, data_dir: str, folder: str) -> None:
    """Moves the files to remove to `folder`, each to the path that it has in `data_dir`; never over another file."""
    moved = 0
    for file in result.to_remove():
        path = listing.join(data_dir, file.path)
        target = os.path.join(folder, listing.unescape_name(file.path))
        if not _is_file(path) or os.path.lexists(target):
            logging.warning("%r is not moved: it is a folder, or %s exists.", path, target)
            continue
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.move(path, target)
        moved += 1
    logging.info("%d files were moved to %s.", moved, folder)
    for group in result.two_label_duplicates:
        kept = group[0]
        others = sorted({file.class_name for file in group} - {kept.class_name})
        logging.warning("%r is kept; its copy was under %s: check its label.", kept.path, ", ".join(map(repr, others)))


def _is_file(path: str) -> bool:
    return files.is_remote(path) or (os.path.lexists(path) and not os.path.isdir(path))


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
