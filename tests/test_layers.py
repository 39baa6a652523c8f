"""The imports are a star: commands know the stages, stages know values, nothing goes in a circle."""

import ast

from tests.support.paths import ROOT

TRAINER = ROOT / "trainer"

# module -> what it may import of this project. `errors` is open to all.
ALLOWED = {
    "__init__": set(),
    "errors": set(),
    "config": set(),
    "command": set(),
    "cluster": set(),
    "bucket": set(),
    "storage": {"bucket"},
    "demo": set(),
    "formats": set(),
    "decoders": {"formats"},
    "image": {"decoders"},
    "listing": {"bucket", "storage"},
    "shards": {"storage"},
    "examples": {"bucket", "formats", "listing", "shards", "storage"},
    "tfds_folder": {"bucket", "command", "listing", "storage"},
    "pictures": {"data", "examples", "shards", "storage"},
    "bucket_speed": {"data", "devices", "examples", "image", "shards", "storage"},
    "pack": {"command", "bucket", "examples", "shards", "storage", "tfds_folder"},
    "splits": {"examples", "listing", "storage"},
    "inspection": {"examples", "formats", "listing", "page", "storage"},
    "inspect_data": {"command", "figures", "inspection", "page", "storage", "tfds_folder"},
    "tensorboard": {"config", "storage"},
    "plan": {"config", "examples"},
    "devices": {"cluster"},
    "model": {"storage"},
    "gradcam": {"image", "model", "shards"},
    "scoring": set(),
    "wording": set(),
    "page": {"wording"},
    "record": {"scoring", "storage"},
    "figures": {"scoring", "wording"},
    "thumbnails": {"image", "page", "record", "shards"},
    "model_card": {"page", "record", "scoring", "storage"},
    "display": {"figures", "model_card", "record", "report", "storage", "tensorboard"},
    "checkpoint": {"storage"},
    "lease": {"bucket", "storage"},
    "export": {"gradcam", "image", "model", "storage"},
    "convert": {"export", "image", "model", "storage"},
    "deliver": {"config", "convert", "examples", "export", "image", "job_dir", "model", "shards", "storage"},
    "report": {"command", "figures", "page", "record", "storage", "thumbnails"},
    "job_dir": {"examples", "storage"},
    "data": {"devices", "image", "storage"},
    "train": {"checkpoint", "data", "devices"},
    "features": {"storage", "train"},
    "cost": set(),
    "terminal": {"cost", "train", "wording"},
    "stages": {"checkpoint", "data", "job_dir", "train"},
    "contenders": {"bucket_speed", "data", "devices", "image", "model", "train"},
    "contender_jobs": {"contenders", "data", "examples", "listing"},
    "benchmark": {"command", "contender_jobs", "contenders", "demo", "devices", "examples", "storage"},
    "labeller": {"formats", "gradcam", "image", "job_dir", "model", "storage"},
    "service": {"formats", "labeller", "page"},
    "serve": {"command", "labeller", "service", "storage"},
    "predict": {"command", "labeller", "listing", "storage"},
    "comparison": {"page", "record", "scoring", "storage", "thumbnails"},
    "evaluate": {
        *(
            "command",
            "comparison",
            "examples",
            "job_dir",
            "labeller",
            "predict",
            "record",
            "report",
            "scoring",
            "shards",
            "storage",
            "tfds_folder",
        ),
    },
    "task": {
        *("bucket", "cluster", "command", "config", "demo", "examples", "job", "metric_sink", "splits", "storage"),
        *("task_flags", "tfds_folder"),
    },
    "task_flags": {"config", "examples"},
    "metric_sink": set(),
    "tuning_figure": {"storage"},
    "tune": {"command", "config", "lease", "plan", "storage", "task", "tuning_figure"},
    "job_stages": {
        *("cluster", "config", "cost", "data", "devices", "examples", "features", "job_dir", "model", "pictures"),
        *("stages", "storage", "terminal", "train"),
    },
    "job": {
        *("cluster", "command", "config", "cost", "data", "deliver", "devices", "display", "examples", "gradcam"),
        *("job_dir", "job_stages", "lease", "model", "pictures", "plan", "record", "scoring", "splits", "stages"),
        *("storage", "tensorboard", "terminal", "train", "wording"),
    },
}
WITHOUT_TENSORFLOW = {
    *("errors", "config", "command", "cluster", "storage", "demo", "formats", "examples", "splits"),
    *("plan", "record", "scoring", "wording", "page", "figures", "thumbnails", "report", "predict", "evaluate"),
    *("task", "task_flags"),
    *("metric_sink", "tune", "tuning_figure", "lease", "benchmark", "labeller"),
    *("bucket", "listing", "shards", "tfds_folder", "inspection", "inspect_data", "pack"),
}
COMMANDS = {"task", "predict", "evaluate", "report", "inspect_data", "tune", "benchmark", "serve", "pack"}


def imports(tree: ast.AST, nodes) -> set[str]:
    """Names of this project's modules that are imported in those nodes."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "trainer":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trainer."):
            found.add(node.module.split(".")[1])
    return found


def modules():
    return {path.stem: ast.parse(path.read_text()) for path in TRAINER.glob("*.py")}


def test_each_module_imports_what_the_table_allows():
    found = {name: imports(tree, ast.walk(tree)) - {"errors"} for name, tree in modules().items()}
    assert found == ALLOWED


def test_what_runs_before_tensorflow_imports_nothing_that_imports_it():
    trees = modules()
    for name in WITHOUT_TENSORFLOW:
        top = {alias.name for node in trees[name].body if isinstance(node, ast.Import) for alias in node.names}
        assert not top & {"tensorflow", "keras"}, name
        assert imports(trees[name], trees[name].body) <= WITHOUT_TENSORFLOW, name


def test_only_commands_touch_flags_and_the_environment():
    for name, tree in modules().items():
        if name in COMMANDS | {"command"}:
            continue
        attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not attributes & {"os.environ", "flags.FLAGS"}, name
