"""The exported model refuses the validation images that metrics.json says, and images of none of the classes."""

import json

import numpy as np
import pytest
import tensorflow as tf

from tests.support import paths, resumable_job
from tests.support.images import write_images
from trainer.artifacts.job_dir import JobDir
from trainer.data.preprocessing import NetworkInput, decode_image, preprocess
from trainer.models import networks, novelty
from trainer.serving import batch, classifier

pytestmark = pytest.mark.slow

IMAGE_SIZE = 112  # of the real images; at 224 pixels more of the other images are refused


def test_a_fine_tuned_model_refuses_as_many_validation_images_as_the_metrics_say(tmp_path):
    images = write_images(tmp_path / "pictures", {"a": 150, "b": 60}, noise=90)
    job_dir = tmp_path / "job"
    resumable_job.run(images, job_dir, "--head_epochs=0", "--epochs=1", "--early_stopping_patience=0")
    known = json.loads((job_dir / "metrics.json").read_text())["novelty"]
    assert known["refused_validation"] == pytest.approx(2 / 42)
    rows = resumable_job.read_rows(JobDir(str(job_dir)).predictions)
    model = classifier.load(JobDir(str(job_dir)).saved_model)
    predictions = list(batch.predict(model, [str(images / row["path"]) for row in rows]))
    values = np.array([prediction.novelty for prediction in predictions])
    assert [prediction.is_novel for prediction in predictions] == (values > known["threshold"]).tolist()
    assert np.mean(values > known["threshold"]) == pytest.approx(known["refused_validation"])


def test_a_model_of_cats_and_dogs_refuses_at_least_85_percent_of_other_images(shared):
    network_input = NetworkInput(image_size=IMAGE_SIZE, resize="stretch", preprocessing="caffe")
    network = networks.build(
        num_classes=2,
        image_size=IMAGE_SIZE,
        backbone="ResNet50",
        weights=str(paths.WEIGHTS),
        head="average",
        precision="float32",
        seed=0,
    )

    def features(folder: str, count: int) -> np.ndarray:
        files = sorted(
            path for path in (shared / "data" / folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png")
        )
        chosen = np.random.default_rng(0).permutation(len(files))[:count]
        images = tf.stack([decode_image(tf.constant(files[i].read_bytes()), network_input) for i in chosen])
        return network.backbone.predict(preprocess(images, "caffe"), batch_size=32, verbose=0)

    cats_and_dogs = features("cats_and_dogs", 300)
    known = novelty.fit(cats_and_dogs[:240], cats_and_dogs[240:])
    assert known.refused_validation == 0.05
    others = np.concatenate([features(f"domains/{name}", 40) for name in ("hand_signs", "textures", "tile_defects")])
    refused = novelty.scores(tf.constant(others), tf.constant(known.bank)).numpy() > known.threshold
    assert refused.mean() >= 0.85
