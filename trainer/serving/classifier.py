"""A trained model that classifies encoded images: a SavedModel, or the network of a job_dir with its best weights.

Imports TensorFlow only when a model is loaded. Shapes: B images, C classes, H x W a heat map.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from trainer.artifacts import run_record
from trainer.artifacts.job_dir import EXTRA_DIR, FLAGS_OF_A_MODEL, JobDir
from trainer.artifacts.metrics import top_class
from trainer.config import DEFAULTS
from trainer.data import formats
from trainer.data.formats import decoding_error
from trainer.earlier_runs import recorded
from trainer.errors import UserError
from trainer.storage import files


class Outputs(NamedTuple):
    """What a model returns for B images. None: was not requested, or the model does not have it."""

    probabilities: np.ndarray  # float32 [B, C]
    heatmaps: np.ndarray | None = None  # float32 [B, H, W] in 0..1
    novelty: np.ndarray | None = None  # float32 [B], see models.novelty
    is_novel: np.ndarray | None = None  # bool [B]


@dataclasses.dataclass(frozen=True)
class Classifier:
    """Class names and functions of the contents of B image files, which raise if an image cannot be decoded.

    `explain` also returns heat maps; it is None for a model without them. Only a SavedModel has novelty, and not one of an
    earlier version. `resize` says which part of an image a heat map covers (see models.gradcam). Images become
    squares of `image_size` pixels; it is 0 for a model from before --resize, which does not contain it. `accuracy` is the
    one that leads the report of its run; None where the files of that run are not beside the model.
    """

    class_names: tuple[str, ...]
    predict: Callable[[list[bytes]], Outputs]
    explain: Callable[[list[bytes]], Outputs] | None = None
    resize: str = DEFAULTS["resize"]
    image_size: int = 0
    accuracy: dict[str, Any] | None = None
    about: dict[str, Any] = dataclasses.field(default_factory=dict)  # which model this is, as the health route says it


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """The result for one image: probabilities, or the error because of which there are none."""

    path: str
    probabilities: np.ndarray | None  # float32 [C]
    error: str = ""
    heatmap: np.ndarray | None = None  # float32 [H, W] in 0..1, if requested
    novelty: float | None = None  # how unlike the training images it is; None if the model does not say
    is_novel: bool | None = None  # whether it is likely to be of none of the classes

    @property
    def top(self) -> tuple[int, float]:
        """Index and probability of the most probable class. Only without `error`."""
        assert self.probabilities is not None
        index, probability = top_class(self.probabilities)
        return int(index), float(probability)


def check_model_dir(model_dir: str) -> None:
    """Raises UserError if the folder does not exist, or holds neither a SavedModel nor a run."""
    if not files.is_remote(model_dir) and not os.path.exists(model_dir):
        raise UserError(
            f"--model_dir={model_dir} does not exist: pass the saved_model folder of a run, or its job_dir."
        )
    if not files.exists(_graph_path(model_dir)) and not files.exists(JobDir(model_dir).config):
        raise UserError(
            f"--model_dir={model_dir} holds neither saved_model.pb nor config.json: pass the saved_model folder of a run, "
            "or its job_dir."
        )


def load(model_dir: str, *, for_many_calls: bool = False) -> Classifier:
    """The model in a SavedModel folder or in a job_dir. Raises UserError if it cannot be loaded.

    `for_many_calls` spends some seconds on a SavedModel, after which a call with few images takes less: see _with_constants.
    """
    check_model_dir(model_dir)
    if files.exists(_graph_path(model_dir)):
        with files.local_copy(model_dir) as local_dir:
            classifier = _load_saved_model(local_dir, for_many_calls=for_many_calls)
        job_dir = os.path.dirname(model_dir.rstrip("/"))
        is_of_job = JobDir(job_dir).saved_model == model_dir.rstrip("/")
        return dataclasses.replace(classifier, accuracy=_measured_accuracy(job_dir) if is_of_job else None)
    return dataclasses.replace(_load_job_dir(model_dir), accuracy=_measured_accuracy(model_dir))


def _measured_accuracy(job_dir: str) -> dict[str, Any] | None:
    """The accuracy that leads the report of a finished run, with its `kind`; None without a finished run."""
    try:
        run = run_record.read(job_dir)
    except UserError:
        return None
    if run.is_running or run.is_evaluation or not run.estimates:
        return None
    values = {"kind": "test", **run.test} if run.test else run.estimates[0]
    return {name: values[name] for name in ("kind", "accuracy", "low", "high", "correct", "images")}


def classify(classifier: Classifier, images: list[tuple[str, bytes]], *, explain: bool = False) -> list[Prediction]:
    """A Prediction for each image, given as path and file contents, in order; a bad image does not fail the others.

    `explain` requests heat maps, from a classifier that has them.
    """
    reasons = [formats.rejection_reason(contents) for _, contents in images]
    accepted = [image for image, reason in zip(images, reasons, strict=True) if not reason]
    model = classifier.explain if explain and classifier.explain else classifier.predict
    predictions = _classify_batch(model, accepted)
    return [
        Prediction(path, None, reason) if reason else next(predictions)
        for (path, _), reason in zip(images, reasons, strict=True)
    ]


def _graph_path(model_dir: str) -> str:
    return files.join(model_dir, "saved_model.pb")


def _load_saved_model(model_dir: str, *, for_many_calls: bool) -> Classifier:
    import tensorflow as tf

    _reject_unsafe_operations(model_dir)
    try:
        model = tf.saved_model.load(model_dir)
    except (OSError, ValueError, tf.errors.OpError) as error:  # ValueError: no graph
        reason = str(error).splitlines()[0]
        raise UserError(f"--model_dir={model_dir} cannot be loaded ({reason}): export it again.") from None
    missing = {"serving_default", "class_names"} - set(model.signatures)
    if missing:
        raise UserError(
            f"--model_dir={model_dir} was not exported by this trainer: it lacks {', '.join(sorted(missing))}."
        )
    names = model.signatures["class_names"]()["class_names"].numpy()
    signatures = dict(model.signatures)
    if for_many_calls:
        signatures["serving_default"] = _with_constants(signatures["serving_default"])

    # These functions keep a reference to the model; its signatures alone do not keep its variables alive.
    def call(signature: str, contents: list[bytes]) -> Outputs:
        outputs = signatures[signature](tf.constant(contents, tf.string))
        values = [outputs[name].numpy() if name in outputs else None for name in ("heatmap", "novelty", "is_novel")]
        return Outputs(outputs["probabilities"].numpy(), *values)

    image_size, resize = _network_input_of(model.signatures)
    return Classifier(
        class_names=tuple(name.decode() for name in names),
        predict=functools.partial(call, "serving_default"),
        explain=functools.partial(call, "explain") if "explain" in model.signatures else None,
        resize=resize,
        image_size=image_size,
        about=_about(model_dir),
    )


def _with_constants(signature: Any) -> Callable[..., dict[str, Any]]:
    """A function like `signature`, with constants in place of its variables, whose values must not change any more.

    TensorFlow then multiplies the factors of batch normalization into the kernels, and oneDNN brings the kernels into its
    own memory layout once and not in each call. ResNet50 in float32 at 224 pixels on two cores with AVX2 took 0.69 of the
    CPU time for one image, 0.91 for eight. The conversion takes 5 s and 2 GB of memory, of which 0.9 GB stay in use.
    """
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2  # not in tf.*

    converted = convert_variables_to_constants_v2(signature, lower_control_flow=False)
    return lambda *inputs: tf.nest.pack_sequence_as(signature.structured_outputs, converted(*inputs))


def _about(model_dir: str) -> dict[str, Any]:
    """The checksum of the weights, the version and the accuracy of a SavedModel; {} of one of an earlier version."""
    extra = files.join(model_dir, EXTRA_DIR)
    identity, metrics = (
        files.read_json_object(files.join(extra, name)) or {} for name in ("model.json", "metrics.json")
    )
    names = ("val_accuracy", "validation_images", "train_images")
    return identity | {name: metrics[name] for name in names if name in metrics}


def _network_input_of(signatures: Mapping[str, Any]) -> tuple[int, str]:
    """Image size and resize. A model from before --resize has no signature for them and stretches images."""
    if "network_input" not in signatures:
        return 0, DEFAULTS["resize"]
    outputs = signatures["network_input"]()
    return int(outputs["image_size"]), outputs["resize"].numpy().decode()


# Operations with effects outside the graph: Python functions, files by name. No export of this trainer contains one.
# SaveV2 and RestoreV2 are allowed because every SavedModel stores its variables with them, so the check is not complete.
_UNSAFE_OPERATIONS = re.compile(
    r"(Eager)?PyFunc.*|ReadFile|WriteFile|MatchingFiles|.*(Record|TextLine|File).*(Dataset|Reader).*|"
    r"InitializeTableFromTextFile.*"
)


def _reject_unsafe_operations(model_dir: str) -> None:
    """Raises UserError, before TensorFlow loads the SavedModel, if it contains operations with effects outside the graph."""
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf import saved_model_pb2

    saved_model = saved_model_pb2.SavedModel()
    try:
        saved_model.ParseFromString(files.read(_graph_path(model_dir)) or b"")
    except DecodeError:
        raise UserError(f"--model_dir={model_dir}: saved_model.pb is not a SavedModel: export it again.") from None
    graphs = [meta_graph.graph_def for meta_graph in saved_model.meta_graphs]
    nodes = [node for graph in graphs for node in graph.node]
    nodes += [node for graph in graphs for function in graph.library.function for node in function.node_def]
    unsafe = sorted({node.op for node in nodes if _UNSAFE_OPERATIONS.fullmatch(node.op)})
    if unsafe:
        raise UserError(
            f"--model_dir={model_dir} contains operations that run other programs or open files ({', '.join(unsafe)}), "
            "which no export of this trainer does: it is not loaded. Use only models of your own jobs."
        )


def _load_job_dir(directory: str) -> Classifier:
    import tensorflow as tf

    from trainer.data.preprocessing import decode_image, preprocess
    from trainer.models import backbones, folded, gradcam, networks

    paths = JobDir(directory)
    files.check_links(directory)
    settings = (paths.read_config(FLAGS_OF_A_MODEL) or {})["flags"]
    class_names = paths.read_class_names()
    if not files.exists(paths.best_weights):
        raise UserError(f"{paths.best_weights} does not exist yet: wait for the first epoch of the run.")
    network_input = backbones.input_from_flags(settings)
    network = folded.fold_network(
        networks.rebuild(
            paths.best_weights,
            num_classes=len(class_names),
            image_size=network_input.image_size,
            backbone=recorded(settings, "backbone"),
            head=settings["head"],
            temperature=paths.read_temperature(),
        )
    )

    # Without AutoGraph: it evaluates the annotations among the module's globals, where tf is not imported.
    @tf.function(input_signature=[tf.TensorSpec([None, *network.model.input_shape[1:]], tf.uint8)], autograph=False)
    def explain_images(images: tf.Tensor) -> gradcam.Explanation:
        return gradcam.explain(network, preprocess(images, network_input.preprocessing))

    def explain(contents: list[bytes]) -> Outputs:
        images = [decode_image(tf.constant(one), network_input) for one in contents]
        explanation = explain_images(tf.stack(images))
        return Outputs(explanation.probabilities.numpy(), explanation.heatmaps.numpy())

    def predict(contents: list[bytes]) -> Outputs:
        return Outputs(explain(contents).probabilities)

    return Classifier(class_names, predict, explain, network_input.resize, network_input.image_size)


def _classify_batch(model: Callable[[list[bytes]], Outputs], images: list[tuple[str, bytes]]) -> Iterator[Prediction]:
    """Calls the model for all images; if one fails the batch, for each half, so that a bad image costs few calls."""
    from trainer.data import decoders

    if not images:
        return
    try:
        outputs = model([contents for _, contents in images])
    except decoders.DECODE_ERRORS as error:
        if len(images) == 1:
            yield Prediction(images[0][0], None, decoding_error(error.message))
            return
        middle = len(images) // 2
        yield from _classify_batch(model, images[:middle])
        yield from _classify_batch(model, images[middle:])
        return
    for index, (path, _) in enumerate(images):
        yield Prediction(
            path,
            outputs.probabilities[index],
            heatmap=None if outputs.heatmaps is None else outputs.heatmaps[index],
            novelty=None if outputs.novelty is None else float(outputs.novelty[index]),
            is_novel=None if outputs.is_novel is None else bool(outputs.is_novel[index]),
        )
