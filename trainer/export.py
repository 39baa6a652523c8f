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

import numpy as np
import tensorflow as tf
from absl import logging

from trainer import gradcam, image, storage
from trainer.model import Network

MAX_DIFFERENCE = (
    1e-3  # of probabilities, between SavedModel and live model, both float32: TF32 convolutions differ by less
)


class ExportMismatch(RuntimeError):
    """What was exported does not say what the live model says."""


class Classifier(tf.Module):
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
        def explain(pictures: tf.Tensor) -> gradcam.Explanation:
            return gradcam.explain(network, image.preprocess(pictures, preprocessing))

        self._explain = explain

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="bytes")])
    def classify(self, contents: tf.Tensor) -> dict[str, tf.Tensor]:
        """serving_default."""
        return self._answer(self._explain(self._decode(contents)))

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3], tf.uint8, name="pixels")])
    def classify_pixels(self, pixels: tf.Tensor) -> dict[str, tf.Tensor]:
        """serving_pixels; sizes other than the network's are squeezed as in training."""
        return self._answer(self._explain(image.squeeze(pixels, self._image_size)))

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
            lambda content: image.decode(content, size, with_webp=self._with_webp),
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
    network: Network,
    *,
    class_names: tuple[str, ...],
    image_size: int,
    preprocessing: str,
    samples: list[bytes],
    pictures: tf.Tensor,
    expected: np.ndarray,
    with_webp: bool = True,
) -> float:
    """Writes the SavedModel; returns the largest difference of probabilities on the samples.

    `samples` are encoded pictures, `pictures` uint8 [len(samples), S, S, 3] what training data makes of them, and
    `expected` float32 [len(samples), C] what the live model says of these. Without `with_webp` the model refuses WebP, and
    servers load it that lack TensorFlow's operation for it. Raises ExportMismatch, and leaves `directory` as it was, if a
    signature differs by more than MAX_DIFFERENCE.
    """
    classifier = Classifier(network, class_names, image_size, preprocessing, with_webp)
    signatures = {
        **{"serving_default": classifier.classify, "serving_pixels": classifier.classify_pixels},
        **{"explain": classifier.explain, "class_names": classifier.class_names},
    }
    with storage.whole_tree(directory) as temporary:
        verbosity = logging.get_verbosity()
        logging.set_verbosity(min(verbosity, logging.WARNING))  # how long TensorFlow's parts of saving took
        tf.saved_model.save(classifier, temporary, signatures=signatures)
        logging.set_verbosity(verbosity)
        served = tf.saved_model.load(temporary).signatures
        contents = tf.constant(samples)
        return max(
            check(f"The SavedModel's signature {name}", answer["probabilities"].numpy(), expected)
            for name, answer in (
                ("serving_default", served["serving_default"](bytes=contents)),
                ("serving_pixels", served["serving_pixels"](pixels=pictures)),
                ("explain", served["explain"](bytes=contents)),
            )
        )


def check(what: str, probabilities: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference of probabilities, both float32 [n, C]. Raises ExportMismatch above MAX_DIFFERENCE."""
    difference = float(np.abs(probabilities - expected).max())
    if not difference <= MAX_DIFFERENCE:  # NaN fails too
        raise ExportMismatch(
            f"{what} gives probabilities that differ by up to {difference:.3g} from the live model's on {len(expected)} "
            f"validation pictures, more than {MAX_DIFFERENCE}: training and serving do not see the same. It was not exported."
        )
    return difference
