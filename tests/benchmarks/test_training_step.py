"""Suite `step`: the training loop and Keras fit, on a small network."""

import numpy as np
import pytest

from tests.support import tiny_job
from tests.support.images import write_images
from trainer.benchmarks import results, training_step
from trainer.data import listing


@pytest.mark.slow
def test_step_measures_the_loop_and_keras_fit(tmp_path):
    images = write_images(tmp_path / "images", {"a": 20, "b": 20}, size=64)
    suite = training_step.step_suite(
        str(images),
        np.array(listing.list_files(str(images)).paths),
        workload=training_step.Workload(image_size=32, batch_size=4, steps=2),
        half_precision="mixed_bfloat16",
        include_xla=False,
        build=tiny_job.build,
    )
    result = results.measure(suite, rounds=1)
    assert result["figures"].keys() >= {"trainer loop, float32", "Keras fit, mixed_bfloat16"}
    assert 0 <= result["figures"]["trainer loop on files, mixed_bfloat16"]["input_wait_share"][0] < 1
    assert [target["aim"] for target in result["aims"]] == [
        "CPU time of a step, trainer loop / Keras fit, float32",
        "CPU time of a step, trainer loop / Keras fit, mixed_bfloat16",
        "step rate, trainer loop on files / in memory",
    ]
    assert "XLA: --noxla is set" in result["left_out"]
