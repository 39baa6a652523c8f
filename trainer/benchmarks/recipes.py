"""Suite `accuracy`, the recipes: their accuracy on images that were cut off before. Each measurement is a process.

`python -c` runs the recipes of Keras and scikit-learn of this module in those processes.
Shapes: N images, F features, C classes.
"""

import functools
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator

import keras
import numpy as np
import tensorflow as tf

from trainer.artifacts.metrics import expected_calibration_error, top_class
from trainer.benchmarks.end_to_end import TASK, TimedProcess, link, python_command
from trainer.benchmarks.suite import RECIPES, Baseline, Metrics, Suite
from trainer.data import listing
from trainer.data.preprocessing import NetworkInput, decode_image, preprocess

TEST_FRACTION = 0.2  # of each class, which no recipe sees
EVALUATE = (TASK[0], "-m", "trainer.evaluate")
# The guide "Transfer learning & fine-tuning" of keras.io: a frozen backbone with a new head, then all layers at 1e-5.
GUIDE_HEAD_EPOCHS, GUIDE_EPOCHS = 20, 10
ARTICLE_EPOCHS = 100


def recipe_suites(
    folders: list[str],
    weights: str,
    directory: str,
    *,
    history_dir: str,
    image_size: int,
    sizes: list[int],
    names: list[str],
    limit_seconds: float,
    task: tuple[str, ...] = TASK,
) -> list[Suite]:
    """One suite for each folder and size: `sizes` are images per class, 0 for all. Round i draws the images by seed i.

    `names` selects from RECIPES. A recipe of Keras is killed after `limit_seconds` and counts with the accuracy of its last
    complete epoch. The history of each job is kept in `history_dir`.
    """
    suites = []
    for folder, size in itertools.product(folders, sizes):
        title = f"{os.path.basename(folder.rstrip('/'))}, {size or 'all'} images per class, {image_size} pixels"
        work_dir = os.path.join(directory, f"{os.path.basename(folder.rstrip('/'))}-{size}")
        draw = functools.partial(draw_folder, folder, work_dir, size)
        trainer = functools.partial(_run_trainer, draw, weights, image_size, task, os.path.join(history_dir, title))
        other = functools.partial(_run_function, draw, weights, image_size, limit_seconds)
        measures: dict[str, Callable[[int], Metrics]] = {
            "default": functools.partial(trainer, "head"),
            "finetune": functools.partial(trainer, "finetune"),
            "logistic_regression": functools.partial(other, fit_logistic_regression),
            "keras_guide": functools.partial(other, train_keras_guide),
            "article": functools.partial(other, train_article),
        }
        baselines = [Baseline(_label(name), _seeded(measures[name])) for name in RECIPES if name in names]
        suites.append(Suite(name="accuracy", title=title, metric="test_accuracy", baselines=baselines))
    return suites


def _label(name: str) -> str:
    labels = {
        "default": "trainer --recipe=head",
        "finetune": "trainer --recipe=finetune",
        "logistic_regression": "logistic regression on the same features",
        "keras_guide": "Keras' transfer-learning guide",
        "article": "article recipe in Keras",
    }
    return labels[name]


def _seeded(measure: Callable[[int], Metrics]) -> Callable[[], Metrics]:
    """The seed counts the rounds, so that all recipes see the same images in a round."""
    seeds = itertools.count()
    return lambda: measure(next(seeds))


def draw_folder(folder: str, work_dir: str, size: int, seed: int) -> str:
    """A folder of links to `train`, with `size` images per class (0: all), and to `test`, a fifth of each class."""
    root = os.path.join(work_dir, str(seed))
    found, rng = listing.list_files(folder), np.random.default_rng(seed)
    paths, labels = np.array(found.paths, object), np.array(found.labels)
    for label in range(len(found.class_names)):
        members = rng.permutation(paths[labels == label])
        num_test = max(1, round(TEST_FRACTION * len(members)))
        parts = {"test": members[:num_test], "train": members[num_test:][: size or None]}
        for part, chosen in parts.items():
            for path in chosen:
                link(os.path.join(folder, path), os.path.join(root, part, path))
    return root


def _run_trainer(
    draw: Callable[[int], str],
    weights: str,
    image_size: int,
    task: tuple[str, ...],
    history_dir: str,
    recipe: str,
    seed: int,
) -> Metrics:
    root = draw(seed)
    job_dir, report_dir = os.path.join(root, f"job-{recipe}"), os.path.join(root, f"report-{recipe}")
    flags = [f"--data_dir={root}/train", f"--job_dir={job_dir}", f"--weights={weights}", f"--image_size={image_size}"]
    # The jobs of a round share their features, so that the second one measures what fine-tuning adds.
    flags += [f"--recipe={recipe}", f"--seed={seed}", f"--cache_dir={os.path.join(root, 'features')}"]
    seconds = TimedProcess([*task, *flags]).wait(0)
    evaluate = [f"--model_dir={job_dir}/saved_model", f"--data_dir={root}/test", f"--report_dir={report_dir}"]
    TimedProcess([*EVALUATE, *evaluate]).wait(0)
    os.makedirs(history_dir, exist_ok=True)
    shutil.copyfile(os.path.join(job_dir, "history.csv"), os.path.join(history_dir, f"{recipe}-{seed}.csv"))
    with open(os.path.join(report_dir, "metrics.json")) as file:
        metrics = json.load(file)
    error = _calibration_error(os.path.join(report_dir, "predictions.csv"))
    return {"test_accuracy": metrics["val_accuracy"], "test_calibration_error": error, "seconds": seconds}


def _calibration_error(predictions_path: str) -> float:
    rows = np.genfromtxt(predictions_path, delimiter=",", names=True, dtype=None, encoding="utf-8")
    return expected_calibration_error(rows["probability"], rows["label"] == rows["predicted"])


def _run_function(
    draw: Callable[[int], str],
    weights: str,
    image_size: int,
    limit_seconds: float,
    function: Callable[..., None],
    seed: int,
) -> Metrics:
    process = TimedProcess(python_command(function, draw(seed), weights, image_size, seed), limit_seconds=limit_seconds)
    metrics: Metrics = {}
    for _, line in process.lines():
        if line.startswith("metrics "):  # after each epoch
            metrics = json.loads(line.removeprefix("metrics "))
    metrics["seconds"] = process.wait(0, -9)
    return metrics


def _print_metrics(probabilities: np.ndarray, labels: np.ndarray) -> None:
    predicted, confidence = top_class(probabilities)
    error = expected_calibration_error(confidence, predicted == labels)
    metrics = {"test_accuracy": float((predicted == labels).mean()), "test_calibration_error": error}
    print("metrics", json.dumps(metrics), flush=True)


def _datasets(root: str, image_size: int, seed: int) -> Iterator[tf.data.Dataset]:
    """Training and test images float32 with labels, as image_dataset_from_directory reads them."""
    for part in ("train", "test"):
        yield keras.utils.image_dataset_from_directory(
            os.path.join(root, part),
            image_size=(image_size, image_size),
            batch_size=32,
            shuffle=part == "train",
            seed=seed,
            verbose=False,
        )


def _backbone(weights: str, image_size: int) -> keras.Model:
    backbone = keras.applications.ResNet50(
        weights="imagenet" if weights == "imagenet" else None,
        include_top=False,
        input_shape=(image_size, image_size, 3),
    )
    if weights not in ("imagenet", "none"):
        backbone.load_weights(weights)
    return backbone


def fit_logistic_regression(root: str, weights: str, image_size: str, seed: str) -> None:
    """Pooled features of images that are read as the trainer does, standardized; LogisticRegressionCV by accuracy."""
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    size = int(image_size)
    pooled = keras.layers.GlobalAveragePooling2D()(_backbone(weights, size).output)
    network = keras.Model(_backbone_input(pooled), pooled)
    features, labels = [], []
    for part in ("train", "test"):
        inputs, labels_of_part = network_inputs(os.path.join(root, part), size)
        features.append(network.predict(inputs, verbose=0))
        labels.append(labels_of_part)
    search = LogisticRegressionCV(
        Cs=8, cv=5, scoring="accuracy", l1_ratios=(0,), max_iter=1000, use_legacy_attributes=False
    )
    model = make_pipeline(StandardScaler(), search).fit(features[0], labels[0])
    _print_metrics(model.predict_proba(features[1]), labels[1])


def network_inputs(folder: str, image_size: int) -> tuple[tf.data.Dataset, np.ndarray]:
    """Batches float32 [B, S, S, 3] of the inputs of ResNet50, as the trainer reads them by default, and the labels int [N]."""
    network_input = NetworkInput(image_size, resize="stretch", preprocessing="caffe")
    found = listing.list_files(folder)
    images = tf.data.Dataset.from_tensor_slices([os.path.join(folder, path) for path in found.paths]).map(
        lambda path: decode_image(tf.io.read_file(path), network_input)
    )
    inputs = images.batch(32).map(lambda batch: preprocess(batch, network_input.preprocessing))
    return inputs, np.array(found.labels)


def _backbone_input(output: keras.KerasTensor) -> keras.KerasTensor:
    return keras.utils.get_source_inputs(output)[0]


def train_keras_guide(root: str, weights: str, image_size: str, seed: str) -> None:
    """A frozen backbone with a new head, then all layers at a low rate, batch statistics frozen in both."""
    keras.utils.set_random_seed(int(seed))
    training, test = _datasets(root, int(image_size), int(seed))
    backbone = _backbone(weights, int(image_size))
    backbone.trainable = False
    inputs = keras.Input(backbone.input.shape[1:])
    x = keras.layers.RandomRotation(0.1)(keras.layers.RandomFlip("horizontal")(inputs))
    x = backbone(keras.applications.resnet50.preprocess_input(x), training=False)
    x = keras.layers.Dropout(0.2)(keras.layers.GlobalAveragePooling2D()(x))
    num_classes = len(training.class_names)
    network = keras.Model(inputs, keras.layers.Dense(num_classes, activation="softmax")(x))
    for epochs, rate in ((GUIDE_HEAD_EPOCHS, 1e-3), (GUIDE_EPOCHS, 1e-5)):
        network.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy")
        network.fit(training, epochs=epochs, verbose=0, callbacks=[_TestAccuracy(test)])
        for layer in backbone.layers:
            layer.trainable = not isinstance(layer, keras.layers.BatchNormalization)


def train_article(root: str, weights: str, image_size: str, seed: str) -> None:
    """The article's recipe: pixels times 1/255, Flatten, softmax, all layers with Adam at 1e-4, the last epoch."""
    keras.utils.set_random_seed(int(seed))
    training, test = _datasets(root, int(image_size), int(seed))
    backbone = _backbone(weights, int(image_size))
    x = keras.layers.Flatten()(backbone.output)
    outputs = keras.layers.Dense(len(training.class_names), activation="softmax")(x)
    network = keras.Sequential([keras.layers.Rescaling(1 / 255), keras.Model(backbone.input, outputs)])
    network.compile(keras.optimizers.Adam(1e-4), "sparse_categorical_crossentropy")
    network.fit(training, epochs=ARTICLE_EPOCHS, verbose=0, callbacks=[_TestAccuracy(test)])


class _TestAccuracy(keras.callbacks.Callback):
    """Prints the metrics of the test part after each epoch."""

    def __init__(self, test: tf.data.Dataset):
        super().__init__()
        self._test = test

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Called by Keras."""
        labels = np.concatenate([labels.numpy() for _, labels in self._test])
        _print_metrics(self.model.predict(self._test, verbose=0), labels)
