"""Best weights -> a SavedModel that takes encoded images, exported only after a parity check with the in-memory model.

Signatures, each for any batch size:
    serving_default   bytes string [B] -> label string [B], probability float32 [B], probabilities float32 [B, C],
                      novelty float32 [B], is_novel bool [B] (see models.novelty)
    serving_pixels    pixels uint8 [B, h, w, 3], RGB -> the same outputs
    explain           bytes string [B] -> the same outputs and heatmap float32 [B, H, W] in 0..1 (see models.gradcam)
    features          bytes string [B] -> features float32 [B, F], of which the novelty is computed
    features_pixels   pixels uint8 [B, h, w, 3], RGB -> features float32 [B, F]
    class_names       -> class_names string [C], in the order of `probabilities`
    network_input     -> image_size int32 [], resize string []: the square that images become (see preprocessing.resize),
                         of which `heatmap` is the map

In JSON an image is {"bytes": {"b64": "..."}}: TensorFlow Serving and Vertex AI decode an object whose only key is b64
into a string (JsonDecodeBase64Object in tensorflow_serving/util/json_tensor.cc), whatever the name of the input.
They encode an output string as base64 only if the output's name ends in _bytes; `label` is therefore plain text.

Shapes: B images of a request, n images of the parity check, h x w pixels of an image, S pixels to a side of the network's
input, H x W a heat map, C classes, F features (the channels of the last feature map, averaged over its cells).
"""

import dataclasses
import datetime
import functools
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

import trainer
from trainer.artifacts.job_dir import EXTRA_DIR
from trainer.data.preprocessing import NetworkInput, decode_image, preprocess, resize
from trainer.models import gradcam, novelty
from trainer.models.networks import Network
from trainer.models.novelty import Novelty
from trainer.storage import files

# Between two models in float32; on a GPU, exporter.full_float32 makes it so.
MAX_PROBABILITY_DIFFERENCE = 1e-3
# Of a network in bfloat16 from the one in float32. ResNet50's features differ by 1 %: 0.1 of a logit of 10, and up to 0.025
# of a probability. More than four times that is not rounding.
MAX_BFLOAT16_DIFFERENCE = 0.1
# Images at a time in the parity check: ResNet50 at 224 pixels takes 0.1 GB for 8 of them in a graph, 4.8 GB for 32 eagerly.
PARITY_BATCH_SIZE = 8
# For the signatures beside serving_default: they share its network, and differ in what is before and after it.
_NUM_IMAGES_OF_OTHER_SIGNATURES = 2


class ParityError(RuntimeError):
    """An exported model does not give the probabilities of the in-memory model."""


@dataclasses.dataclass(frozen=True)
class Export:
    """What metrics.json says of an exported model. The accuracies are those on `images` validation images, if measured."""

    max_difference: float  # of a probability from the in-memory network's, on the images of the parity check
    num_bytes: int | None = None  # of a converted model; that of a SavedModel varies with the names of its functions
    accuracy: float | None = None
    network_accuracy: float | None = None
    images: int | None = None

    def as_json(self) -> dict[str, Any]:
        """The values that were measured."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclasses.dataclass(frozen=True, eq=False)
class ParityReference:
    """A network to export and the probabilities of n images, which an exported model must reproduce."""

    network: Network
    encoded: list[bytes]  # contents of n image files
    images: tf.Tensor  # uint8 [n, S, S, 3], decoded as in training
    expected: np.ndarray  # float32 [n, C], from the in-memory network
    novelty: Novelty | None = None  # of the network; without it, the outputs of that name are missing


@functools.lru_cache(1)
def decoder(network_input: NetworkInput, *, with_webp: bool) -> Callable[[tf.Tensor], tf.Tensor]:
    """decode_image as one graph, which is traced once for the parity check and the signatures."""
    decode = tf.function(lambda contents: decode_image(contents, network_input, with_webp=with_webp), autograph=False)
    return decode.get_concrete_function(tf.TensorSpec([], tf.string))


class ServingFunctions:
    """The signatures as functions of tensors, without Keras objects: decoding, preprocessing, network and class names."""

    def __init__(
        self,
        network: Network,
        *,
        class_names: tuple[str, ...],
        network_input: NetworkInput,
        with_webp: bool,
        known: Novelty | None,
    ):
        self._class_names = tf.constant(class_names)
        self._network_input = network_input
        self._bank = None if known is None else tf.Variable(known.bank, trainable=False)
        self._threshold = 0.0 if known is None else known.threshold
        self.variables = [variable.value for variable in network.model.variables] + ([self._bank] if known else [])
        size = network_input.image_size

        # One trace of the network for all signatures; TensorFlow prunes the heat map where it is not an output.
        @tf.function(input_signature=[tf.TensorSpec([None, size, size, 3], tf.uint8)], autograph=False)
        def explain(images: tf.Tensor) -> gradcam.Explanation:
            # With oneDNN a convolution of no images has the shape of its input (TensorFlow 2.21): compute at least one.
            num_images = tf.shape(images)[0]
            padded = tf.pad(images, [[0, tf.cast(num_images == 0, tf.int32)], [0, 0], [0, 0], [0, 0]])
            explanation = gradcam.explain(network, preprocess(padded, network_input.preprocessing))
            return gradcam.Explanation(*(output[:num_images] for output in explanation))

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)
        def explain_encoded(contents: tf.Tensor) -> gradcam.Explanation:
            return explain(
                tf.map_fn(
                    decoder(network_input, with_webp=with_webp),
                    contents,
                    fn_output_signature=tf.TensorSpec([size, size, 3], tf.uint8),
                )
            )

        self._explain, self._explain_encoded = explain, explain_encoded

    def trace(self) -> dict[str, Any]:
        """The concrete function of each signature. tf.saved_model.save would trace each tf.function once more."""
        contents = tf.TensorSpec([None], tf.string, name="bytes")
        pixels = tf.TensorSpec([None, None, None, 3], tf.uint8, name="pixels")
        signatures: dict[str, tuple[Callable, list[tf.TensorSpec]]] = {
            "serving_default": (lambda contents: self._outputs(self._explain_encoded(contents)), [contents]),
            "serving_pixels": (lambda pixels: self._outputs(self._explain_pixels(pixels)), [pixels]),
            "explain": (self._explained, [contents]),
            "features": (lambda contents: {"features": self._explain_encoded(contents).features}, [contents]),
            "features_pixels": (lambda pixels: {"features": self._explain_pixels(pixels).features}, [pixels]),
            "class_names": (lambda: {"class_names": tf.identity(self._class_names)}, []),
            "network_input": (self._network_inputs, []),
        }
        return {
            name: tf.function(function, autograph=False).get_concrete_function(*specs)
            for name, (function, specs) in signatures.items()
        }

    def _explain_pixels(self, pixels: tf.Tensor) -> gradcam.Explanation:
        return self._explain(resize(pixels, self._network_input))

    def _explained(self, contents: tf.Tensor) -> dict[str, tf.Tensor]:
        explanation = self._explain_encoded(contents)
        return {**self._outputs(explanation), "heatmap": explanation.heatmaps}

    def _network_inputs(self) -> dict[str, tf.Tensor]:
        return {
            "image_size": tf.constant(self._network_input.image_size),
            "resize": tf.constant(self._network_input.resize),
        }

    def _outputs(self, explanation: gradcam.Explanation) -> dict[str, tf.Tensor]:
        probabilities = explanation.probabilities
        outputs = {
            "label": tf.gather(self._class_names, tf.argmax(probabilities, axis=1)),
            "probability": tf.reduce_max(probabilities, axis=1),
            "probabilities": probabilities,
        }
        if self._bank is not None:
            outputs["novelty"] = novelty.scores(explanation.features, self._bank)
            outputs["is_novel"] = outputs["novelty"] > self._threshold
        return outputs


def save(
    directory: str,
    reference: ParityReference,
    *,
    class_names: tuple[str, ...],
    network_input: NetworkInput,
    with_webp: bool = True,
    bound: float = MAX_PROBABILITY_DIFFERENCE,
) -> Export:
    """Writes the SavedModel of the reference's network.

    Without `with_webp` the model rejects WebP, and servers without TensorFlow's WebP operation can load it. Raises
    ParityError, and leaves `directory` unchanged, if a probability of a signature differs by more than `bound`.
    """
    functions = ServingFunctions(
        reference.network,
        class_names=class_names,
        network_input=network_input,
        with_webp=with_webp,
        known=reference.novelty,
    )
    tracked = tf.Module()
    tracked.variables_of_functions = functions.variables
    with files.atomic_directory(directory) as temporary:
        verbosity = logging.get_verbosity()
        logging.set_verbosity(min(verbosity, logging.WARNING))  # TensorFlow logs the duration of each part
        tf.saved_model.save(tracked, temporary, signatures=functions.trace())
        logging.set_verbosity(verbosity)
        _write_identity(temporary)
        return Export(_check_signatures(temporary, reference, bound))


def _write_identity(directory: str) -> None:
    """Writes assets.extra/model.json: which model this is. TensorFlow ignores that folder, whose name it reserves for others.

    Source: https://github.com/tensorflow/tensorflow/blob/v2.21.0/tensorflow/python/saved_model/README.md
    """
    checksum = hashlib.sha256()
    for path in sorted(pathlib.Path(directory, "variables").iterdir()):
        checksum.update(path.read_bytes())
    extra = pathlib.Path(directory, EXTRA_DIR)
    extra.mkdir()
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    identity = {
        "sha256_of_variables": checksum.hexdigest(),
        "exported": created,
        "picture_trainer": trainer.__version__,
    }
    files.write_json(str(extra / "model.json"), identity)


def _check_signatures(directory: str, reference: ParityReference, bound: float) -> float:
    """The largest difference of a probability of the SavedModel in `directory`. Raises ParityError."""
    model = tf.saved_model.load(directory)
    num_images = len(reference.encoded)
    few = np.unique(np.linspace(0, num_images - 1, min(_NUM_IMAGES_OF_OTHER_SIGNATURES, num_images)).astype(int))
    differences = []
    for name, index in {"serving_default": np.arange(num_images), "serving_pixels": few, "explain": few}.items():
        rows = []
        for start in range(0, len(index), PARITY_BATCH_SIZE):
            batch = index[start : start + PARITY_BATCH_SIZE]
            if name == "serving_pixels":
                outputs = model.signatures[name](pixels=tf.gather(reference.images, batch))
            else:
                outputs = model.signatures[name](bytes=tf.constant([reference.encoded[i] for i in batch]))
            rows.append(outputs["probabilities"].numpy())
        signature = f"The SavedModel's signature {name}"
        differences.append(check_parity(signature, np.concatenate(rows), reference.expected[index], bound=bound))
    return max(differences)


def check_parity(
    name: str, probabilities: np.ndarray, expected: np.ndarray, *, bound: float = MAX_PROBABILITY_DIFFERENCE
) -> float:
    """The largest difference between probabilities of the model `name` and `expected`, both float32 [n, C].

    Raises ParityError if it is above `bound` or not a number.
    """
    difference = float(np.abs(probabilities - expected).max())
    if not difference <= bound:  # NaN fails too
        raise ParityError(
            f"{name} gives probabilities that differ by up to {difference:.3g} from the in-memory model on "
            f"{len(expected)} validation images, more than {bound}: training and serving do not compute the same. It was "
            "not exported."
        )
    return difference
