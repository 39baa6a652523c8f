"""Best weights -> a SavedModel that takes the bytes of pictures, let out only if it agrees with the live model.

Its signatures, each for any number of pictures at once:
    serving_default   bytes string [B] -> label string [B], probability float32 [B], probabilities float32 [B, C]
    serving_pixels    pixels uint8 [B, h, w, 3], RGB -> the same
    explain           bytes string [B] -> the same and heatmap float32 [B, H, W] in 0..1 (see gradcam)
    class_names       -> class_names string [C], in the order of `probabilities`

Over HTTP a picture is {"bytes": {"b64": "..."}}: TensorFlow Serving and Vertex AI decode any object with the one key b64
that stands for a string (JsonDecodeBase64Object in tensorflow_serving/util/json_tensor.cc), whatever the input's name.
They write an output's strings as base64 only if its name ends in _bytes; so `label` comes as text.

Shapes: B pictures of a request, h x w pixels of theirs, S pixels to a side of what the network sees, C classes.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging

from trainer.data.preprocessing import decode_image, preprocess, resize
from trainer.models import gradcam
from trainer.models.resnet import Network
from trainer.storage import files

# Between SavedModel and in-memory model, both float32: TF32 convolutions differ by less.
MAX_PROBABILITY_DIFFERENCE = 1e-3


class ParityError(RuntimeError):
    """An exported model does not give the probabilities of the in-memory model."""


class ParityReference(NamedTuple):
    """What an exported model must agree with: a network, and its probabilities for n images."""

    network: Network
    encoded: list[bytes]  # n images as they are in their files
    images: tf.Tensor  # uint8 [n, S, S, 3], decoded as in training
    expected: np.ndarray  # float32 [n, C], from the network


class ServingModule(tf.Module):
    """What is saved: decoding, preprocessing, network and class names in one graph, without Keras objects."""

    def __init__(
        self, network: Network, class_names: tuple[str, ...], image_size: int, preprocessing: str, with_webp: bool
    ):
        super().__init__()
        self.weights = [variable.value for variable in network.model.variables]  # tracked, so that they are saved
        self._names = tf.constant(class_names)
        self._image_size, self._with_webp = image_size, with_webp

        # One trace of the network for all signatures; where nobody asks for the heat map, TensorFlow prunes it.
        @tf.function(input_signature=[tf.TensorSpec([None, image_size, image_size, 3], tf.uint8)])
        def explain(images: tf.Tensor) -> gradcam.Explanation:
            return gradcam.explain(network, preprocess(images, preprocessing))

        self._explain = explain

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="bytes")])
    def classify(self, contents: tf.Tensor) -> dict[str, tf.Tensor]:
        """serving_default."""
        return self._answer(self._explain(self._decode(contents)))

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3], tf.uint8, name="pixels")])
    def classify_pixels(self, pixels: tf.Tensor) -> dict[str, tf.Tensor]:
        """serving_pixels; sizes other than the network's are squeezed as in training."""
        return self._answer(self._explain(resize(pixels, self._image_size)))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="bytes")])
    def explain(self, contents: tf.Tensor) -> dict[str, tf.Tensor]:
        """explain."""
        explanation = self._explain(self._decode(contents))
        return {**self._answer(explanation), "heatmap": explanation.heatmaps}

    @tf.function(input_signature=[])
    def class_names(self) -> dict[str, tf.Tensor]:
        """class_names."""
        return {"class_names": self._names}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def _decode(self, contents: tf.Tensor) -> tf.Tensor:
        size = self._image_size
        return tf.map_fn(
            lambda content: decode_image(content, size, with_webp=self._with_webp),
            contents,
            fn_output_signature=tf.TensorSpec([size, size, 3], tf.uint8),
        )

    def _answer(self, explanation: gradcam.Explanation) -> dict[str, tf.Tensor]:
        probabilities = explanation.probabilities
        return {
            "label": tf.gather(self._names, tf.argmax(probabilities, axis=1)),
            "probability": tf.reduce_max(probabilities, axis=1),
            "probabilities": probabilities,
        }


def save(
    directory: str,
    reference: ParityReference,
    *,
    class_names: tuple[str, ...],
    image_size: int,
    preprocessing: str,
    with_webp: bool = True,
) -> float:
    """Writes the SavedModel of the reference's network; returns the largest difference of a probability.

    Without `with_webp` the model refuses WebP, and servers that lack TensorFlow's operation for it can load it. Raises
    ParityError, and leaves `directory` as it was, if a signature differs by more than MAX_PROBABILITY_DIFFERENCE.
    """
    module = ServingModule(reference.network, class_names, image_size, preprocessing, with_webp)
    signatures = {
        "serving_default": module.classify,
        "serving_pixels": module.classify_pixels,
        "explain": module.explain,
        "class_names": module.class_names,
    }
    with files.atomic_directory(directory) as temporary:
        verbosity = logging.get_verbosity()
        logging.set_verbosity(min(verbosity, logging.WARNING))  # TensorFlow logs how long each part of saving took
        tf.saved_model.save(module, temporary, signatures=signatures)
        logging.set_verbosity(verbosity)
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


def check_parity(what: str, probabilities: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference of probabilities, both float32 [n, C]. Raises ExportMismatch above MAX_DIFFERENCE."""
    difference = float(np.abs(probabilities - expected).max())
    if not difference <= MAX_PROBABILITY_DIFFERENCE:  # NaN fails too
        raise ParityError(
            f"{what} gives probabilities that differ by up to {difference:.3g} from the live model's on {len(expected)} "
            f"validation pictures, more than {MAX_PROBABILITY_DIFFERENCE}: training and serving do not see the same. It was not exported."
        )
    return difference
