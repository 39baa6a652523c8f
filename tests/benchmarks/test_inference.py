"""Suite `inference`: the folded network and Keras predict, on a small network."""

import pytest

from tests.support import tiny_job
from trainer.benchmarks import results
from trainer.benchmarks.inference import inference_suite
from trainer.benchmarks.training_step import Workload


@pytest.mark.slow
def test_inference_compares_the_folded_network_with_keras_predict_in_the_same_precision():
    workload = Workload(image_size=32, batch_size=4, steps=2)
    suite = inference_suite(workload=workload, half_precision="mixed_bfloat16", build=tiny_job.build)
    result = results.measure(suite, rounds=1)
    cases = [f"{kind}, {size} at a time" for kind in ("float32", "mixed_bfloat16") for size in ("4 images", "1 image")]
    runtimes = {"float32": ["onnxruntime", "openvino"], "mixed_bfloat16": ["openvino"]}
    assert list(result["figures"]) == [
        f"{name}, {case}"
        for case in cases
        for name in ("trainer folded", "Keras predict", *runtimes[case.split(",")[0]])
    ]
    assert not result["left_out"]
    assert all(metrics["cpu_seconds_per_1000"][0] > 0 for metrics in result["figures"].values())
    assert [target["aim"].rpartition("predict, ")[2] for target in result["aims"]] == cases
