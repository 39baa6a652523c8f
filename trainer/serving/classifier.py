"""A trained model to ask: a SavedModel, or the network rebuilt from a run's job_dir. TensorFlow is imported when one is loaded.

Shapes: B pictures, C classes, H x W of a heat map.
"""

import itertools
import os
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from trainer.artifacts.job_dir import JobDir
from trainer.artifacts.metrics import top_class
from trainer.data import formats
from trainer.errors import UserError
from trainer.storage import files


class Classifier(NamedTuple):
    """A model to ask about the bytes of B pictures; both raise on one that they cannot decode.

    `probabilities` gives float32 [B, C]; `explain`, None where the model cannot, that and heat maps float32 [B, H, W].
    """

    class_names: tuple[str, ...]
    probabilities: Callable[[list[bytes]], np.ndarray]
    explain: Callable[[list[bytes]], tuple[np.ndarray, np.ndarray]] | None = None


class Prediction(NamedTuple):
    """What the model says of one picture; `error` tells why it says nothing."""

    path: str
    probabilities: np.ndarray | None  # float32 [C]
    error: str = ""
    heatmap: np.ndarray | None = None  # float32 [H, W] in 0..1, where it was asked for

    @property
    def top(self) -> tuple[int, float]:
        """Index and probability of the most probable class. Only without `error`."""
        assert self.probabilities is not None
        index, probability = top_class(self.probabilities)
        return int(index), float(probability)


def check_model_dir(model_dir: str) -> None:
    """Raises UserError if there is neither a SavedModel nor a run in the folder; imports TensorFlow for gs:// alone."""
    if not any(files.exists(os.path.join(model_dir, name)) for name in ("saved_model.pb", "config.json")):
        raise UserError(
            f"--model_dir={model_dir} holds neither saved_model.pb nor config.json: pass the saved_model folder of a run, "
            "or its job_dir."
        )


def load(model_dir: str) -> Classifier:
    """The model in a SavedModel folder or in a job_dir. Raises UserError if neither is there."""
    check_model_dir(model_dir)
    if files.exists(files.join(model_dir, "saved_model.pb")):
        with files.local_copy(model_dir) as local_dir:
            return _load_saved_model(local_dir)
    return _load_job_dir(model_dir)


def _load_saved_model(model_dir: str) -> Classifier:
    import tensorflow as tf

    _refuse_unsafe_operations(model_dir)
    try:
        model = tf.saved_model.load(model_dir)
    except (OSError, ValueError, tf.errors.OpError) as error:  # ValueError: one without a graph
        reason = str(error).splitlines()[0]
        raise UserError(f"--model_dir={model_dir} cannot be loaded ({reason}): export it again.") from None
    missing = {"serving_default", "class_names"} - set(model.signatures)
    if missing:
        raise UserError(
            f"--model_dir={model_dir} was not exported by this trainer: it lacks {', '.join(sorted(missing))}."
        )
    names = model.signatures["class_names"]()["class_names"].numpy()

    def probabilities(contents: list[bytes]) -> np.ndarray:
        return model.signatures["serving_default"](bytes=tf.constant(contents))["probabilities"].numpy()

    def explain(contents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        answer = model.signatures["explain"](bytes=tf.constant(contents))
        return answer["probabilities"].numpy(), answer["heatmap"].numpy()

    # The functions hold the model, which its signatures do not keep alive by themselves.
    class_names = tuple(name.decode() for name in names)
    return Classifier(class_names, probabilities, explain if "explain" in model.signatures else None)


# Operations that reach out of the graph: Python of the process that made it, files by name. No export of this trainer has
# one. SaveV2 and RestoreV2 stay, with which every SavedModel keeps its variables, so this is a lock and not a wall.
_UNSAFE_OPERATIONS = re.compile(r"(Eager)?PyFunc.*|ReadFile|WriteFile|MatchingFiles|.*(Record|TextLine|File).*(Dataset|Reader).*|"
                           r"InitializeTableFromTextFile.*")  # fmt: skip


def _refuse_unsafe_operations(model_dir: str) -> None:
    """Raises UserError, before TensorFlow loads it, for a SavedModel with operations that reach out of the graph."""
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf import saved_model_pb2

    saved_model = saved_model_pb2.SavedModel()
    try:
        saved_model.ParseFromString(files.read(f"{model_dir}/saved_model.pb") or b"")
    except DecodeError:
        raise UserError(f"--model_dir={model_dir}: saved_model.pb is no SavedModel: export it again.") from None
    graphs = [meta_graph.graph_def for meta_graph in saved_model.meta_graphs]
    nodes = [node for graph in graphs for node in graph.node]
    nodes += [node for graph in graphs for function in graph.library.function for node in function.node_def]
    found = sorted({node.op for node in nodes if _UNSAFE_OPERATIONS.fullmatch(node.op)})
    if found:
        raise UserError(
            f"--model_dir={model_dir} holds operations that run other programs or open files ({', '.join(found)}), which no "
            "export of this trainer does: it is not loaded. Use models of your own jobs only."
        )


def _load_job_dir(directory: str) -> Classifier:
    import tensorflow as tf

    from trainer.data.preprocessing import decode_image, preprocess
    from trainer.models import gradcam, resnet

    paths = JobDir(directory)
    settings = (paths.read_config() or {})["flags"]
    class_names = paths.read_class_names()
    if not files.exists(paths.best_weights):
        raise UserError(f"{directory} holds no best.weights.h5 yet: wait for the run's first epoch.")
    network = resnet.rebuild(
        paths.best_weights,
        num_classes=len(class_names),
        image_size=settings["image_size"],
        head=settings["head"],
    )

    # AutoGraph looks annotations up again, among the globals, where there is no tf.
    @tf.function(input_signature=[tf.TensorSpec([None, *network.model.input_shape[1:]], tf.uint8)], autograph=False)
    def classify(images: tf.Tensor) -> gradcam.Explanation:
        return gradcam.explain(network, preprocess(images, settings["preprocessing"]))

    def explain(contents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        images = [decode_image(tf.constant(one), settings["image_size"]) for one in contents]
        explanation = classify(tf.stack(images))
        return explanation.probabilities.numpy(), explanation.heatmaps.numpy()

    return Classifier(class_names, lambda contents: explain(contents)[0], explain)


def classify(classifier: Classifier, images: list[tuple[str, bytes]], *, explain: bool = False) -> list[Prediction]:
    """A Prediction for each picture, a name and the bytes of a file, in order; errors are told in them.

    `explain` asks for heat maps too, of a labeller that has them.
    """
    reasons = [formats.rejection_reason(contents) for _, contents in images]
    good = [image for image, reason in zip(images, reasons, strict=True) if not reason]
    answers = _classify_batch(classifier.explain if explain and classifier.explain else classifier.probabilities, good)
    return [
        Prediction(name, None, reason) if reason else next(answers)
        for (name, _), reason in zip(images, reasons, strict=True)
    ]


def _classify_batch(model: Callable, images: list[tuple[str, bytes]]) -> Iterator[Prediction]:
    """Asks for all at once; where one breaks the batch, for each half, so that one bad picture costs few calls."""
    import tensorflow as tf

    if not images:
        return
    try:
        answer = model([contents for _, contents in images])
    except tf.errors.InvalidArgumentError as error:
        if len(images) == 1:
            yield Prediction(images[0][0], None, f"cannot be decoded: {_decode_error_reason(error.message)}")
            return
        middle = len(images) // 2
        yield from _classify_batch(model, images[:middle])
        yield from _classify_batch(model, images[middle:])
        return
    rows, heatmaps = answer if isinstance(answer, tuple) else (answer, itertools.repeat(None))
    for (name, _), row, heatmap in zip(images, rows, heatmaps):  # noqa: B905 (repeat has no end)
        yield Prediction(name, row, "", heatmap)


def _decode_error_reason(message: str) -> str:
    """The one line of TensorFlow's message that says what is wrong, without the names of its operations."""
    chatter = ("Graph execution error", "Detected at node", "<stack traces", "\t", "[[")
    lines = [line for line in message.splitlines() if line.strip() and not line.startswith(chatter)]
    text = re.sub(r"\{\{.*?\}\} ?|\[Op:.*?\]", "", lines[0] if lines else message)
    return re.sub(r"^assertion failed: \[(.*)\]", r"\1", text).strip()
