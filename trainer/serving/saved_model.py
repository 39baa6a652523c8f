"""Best weights -> a SavedModel that takes encoded images, exported only after a parity check with the in-memory model.

Signatures, each for any batch size:
    serving_default   bytes string [B] -> label string [B], probability float32 [B], probabilities float32 [B, C],
                      novelty float32 [B], is_novel bool [B] (see models.novelty)
    serving_pixels    pixels uint8 [B, h, w, 3], RGB -> the same outputs
    explain           bytes string [B] -> the same outputs and heatmap float32 [B, H, W] in 0..1 (see models.gradcam)
    class_names       -> class_names string [C], in the order of `probabilities`
    network_input     -> image_size int32 [], resize string []: the square that images become (see preprocessing.resize),
                         of which `heatmap` is the map

In JSON an image is {"bytes": {"b64": "..."}}: TensorFlow Serving and Vertex AI decode an object whose only key is b64
into a string (JsonDecodeBase64Object in tensorflow_serving/util/json_tensor.cc), whatever the name of the input.
They encode an output string as base64 only if the output's name ends in _bytes; `label` is therefore plain text.

Shapes: B images of a request, h x w their pixels, S pixels to a side of the network's input, H x W a heat map, C classes.
"""

import dataclasses
import datetime
import hashlib
import pathlib

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


class ParityError(RuntimeError):
    """An exported model does not give the probabilities of the in-memory model."""


@dataclasses.dataclass(frozen=True, eq=False)
class ParityReference:
    """An in-memory network and its probabilities for n images, which an exported model must reproduce."""

    network: Network
    encoded: list[bytes]  # contents of n image files
    images: tf.Tensor  # uint8 [n, S, S, 3], decoded as in training
    expected: np.ndarray  # float32 [n, C], from the network
    novelty: Novelty | None = None  # of the network; without it, the outputs of that name are missing


class ServingModule(tf.Module):
    """Decoding, preprocessing, network and class names in one graph, without Keras objects."""

    def __init__(
        self,
        network: Network,
        *,
        class_names: tuple[str, ...],
        network_input: NetworkInput,
        with_webp: bool,
        known: Novelty | None,
    ):
        super().__init__()
        self.weights = [variable.value for variable in network.model.variables]  # tracked, so that they are saved
        self._class_names = tf.constant(class_names)
        self._network_input = network_input
        self._with_webp = with_webp
        self._bank = None if known is None else tf.Variable(known.bank, trainable=False)
        self._threshold = 0.0 if known is None else known.threshold

        # One trace of the network for all signatures; TensorFlow prunes the heat map where it is not an output.
        @tf.function(input_signature=[tf.TensorSpec([None, *network.model.input_shape[1:]], tf.uint8)])
        def explain(images: tf.Tensor) -> gradcam.Explanation:
            # With oneDNN a convolution of no images has the shape of its input (TensorFlow 2.21): compute at least one.
            num_images = tf.shape(images)[0]
            padded = tf.pad(images, [[0, tf.cast(num_images == 0, tf.int32)], [0, 0], [0, 0], [0, 0]])
            explanation = gradcam.explain(network, preprocess(padded, network_input.preprocessing))
            return gradcam.Explanation(*(output[:num_images] for output in explanation))

        self._explain = explain

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="bytes")])
    def classify(self, contents: tf.Tensor) -> dict[str, tf.Tensor]:
        """Signature serving_default."""
        return self._outputs(self._explain(self._decode(contents)))

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3], tf.uint8, name="pixels")])
    def classify_pixels(self, pixels: tf.Tensor) -> dict[str, tf.Tensor]:
        """Signature serving_pixels; resizes as in training."""
        return self._outputs(self._explain(resize(pixels, self._network_input)))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="bytes")])
    def explain(self, contents: tf.Tensor) -> dict[str, tf.Tensor]:
        """Signature explain."""
        explanation = self._explain(self._decode(contents))
        return {**self._outputs(explanation), "heatmap": explanation.heatmaps}

    @tf.function(input_signature=[])
    def class_names(self) -> dict[str, tf.Tensor]:
        """Signature class_names."""
        return {"class_names": self._class_names}

    @tf.function(input_signature=[])
    def network_input(self) -> dict[str, tf.Tensor]:
        """Signature network_input."""
        return {
            "image_size": tf.constant(self._network_input.image_size),
            "resize": tf.constant(self._network_input.resize),
        }

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def _decode(self, contents: tf.Tensor) -> tf.Tensor:
        size = self._network_input.image_size
        return tf.map_fn(
            lambda content: decode_image(content, self._network_input, with_webp=self._with_webp),
            contents,
            fn_output_signature=tf.TensorSpec([size, size, 3], tf.uint8),
        )

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
) -> float:
    """Writes the SavedModel of the reference's network; returns the largest difference of a probability.

    Without `with_webp` the model rejects WebP, and servers without TensorFlow's WebP operation can load it. Raises
    ParityError, and leaves `directory` unchanged, if a signature differs by more than MAX_PROBABILITY_DIFFERENCE.
    """
    module = ServingModule(
        reference.network,
        class_names=class_names,
        network_input=network_input,
        with_webp=with_webp,
        known=reference.novelty,
    )
    signatures = {
        "serving_default": module.classify,
        "serving_pixels": module.classify_pixels,
        "explain": module.explain,
        "class_names": module.class_names,
        "network_input": module.network_input,
    }
    with files.atomic_directory(directory) as temporary:
        verbosity = logging.get_verbosity()
        logging.set_verbosity(min(verbosity, logging.WARNING))  # TensorFlow logs the duration of each part
        tf.saved_model.save(module, temporary, signatures=signatures)
        logging.set_verbosity(verbosity)
        _write_identity(temporary)
        served = tf.saved_model.load(temporary).signatures
        contents = tf.constant(reference.encoded)
        outputs = {
            "serving_default": served["serving_default"](bytes=contents),
            "serving_pixels": served["serving_pixels"](pixels=reference.images),
            "explain": served["explain"](bytes=contents),
        }
        return max(
            check_parity(f"The SavedModel's signature {name}", output["probabilities"].numpy(), reference.expected)
            for name, output in outputs.items()
        )


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


def check_parity(name: str, probabilities: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference between probabilities of the model `name` and `expected`, both float32 [n, C].

    Raises ParityError if it is above MAX_PROBABILITY_DIFFERENCE or not a number.
    """
    difference = float(np.abs(probabilities - expected).max())
    if not difference <= MAX_PROBABILITY_DIFFERENCE:  # NaN fails too
        raise ParityError(
            f"{name} gives probabilities that differ by up to {difference:.3g} from the in-memory model on "
            f"{len(expected)} validation images, more than {MAX_PROBABILITY_DIFFERENCE}: training and serving do not "
            "compute the same. It was not exported."
        )
    return difference
