"""The plan of a dry run describes the run that would start."""

import numpy as np

from trainer.config import Config
from trainer.data.dataset import Examples, Folder, Split
from trainer.data.listing import BadFile
from trainer.reporting import plan

RESOLVED = {
    "cluster": "TF_CONFIG",
    "split": "0.2 of each class",
    "replicas": 2,
    "workers": 1,
    "devices": ["GPU:0", "GPU:1"],
    "xla": False,
    "epochs_reason": "no GPU",
    "precision": "mixed_float16",
    "precision_reason": "GPU with float16 units",
}


def split_of(num_classes: int) -> tuple[Folder, Split]:
    labels = np.repeat(np.arange(num_classes, dtype=np.int32), 10)
    paths = np.array([f"{index}.jpg" for index in range(len(labels))], object)
    examples = Examples(paths=paths, labels=labels, hashes=paths)
    is_validation = np.arange(len(labels)) % 5 == 0
    folder = Folder(
        class_names=tuple(f"class {index}" for index in range(num_classes)),
        examples=examples,
        bad_files=(BadFile("0/empty.jpg", "empty"),),
    )
    split = Split(training=examples.take(~is_validation), validation=examples.take(is_validation))
    return folder, split


def describe(num_classes=2, **settings):
    return plan.describe(Config(data_dir="images", job_dir="job", **settings), *split_of(num_classes), RESOLVED)


def test_the_plan_has_images_steps_parameters_devices_and_flags():
    text = describe(batch_size=6, epochs=2, learning_rate=0.002)
    for part in (
        "16 to train on, 4 to validate, 1 bad files left out",
        "'class 0': 8 + 2",
        "auto: no GPU",
        "logistic regression (on a very large folder 15 epochs) over 2048 features per image",
        "network     2 epochs of 3 steps over images of 224 pixels",
        "6 images over 2 replicas on 1 worker\n",
        "23,591,810 parameters",  # 23,587,712 of ResNet50 and 2 x 2,049 of the head
        "GPU:0, GPU:1; XLA off",
        "mixed_float16: GPU with float16 units",
        "--learning_rate=0.002",
    ):
        assert part in text
    assert "--weights" not in text


def test_a_run_logs_the_plan_in_few_lines():
    settings, split = Config(data_dir="images", job_dir="job", epochs=2, batch_size=6), split_of(2)[1]
    assert plan.summary(settings, split, RESOLVED, worker=0) == [
        "Training: the head, logistic regression, then the whole network, 2 epochs of 3 steps (no GPU).",
        "Network: ResNet50, weights imagenet, 224 x 224 pixels, batches of 6 images.",
        "Machine: GPU:0, GPU:1, mixed_float16 (GPU with float16 units), XLA off.",
        "Output: job. After a stop, the same command resumes.",
    ]
    lines = plan.summary(settings, split, {**RESOLVED, "workers": 2}, worker=1)
    assert lines[2].startswith("Machine: worker 2 of 2 (TF_CONFIG), 2 replicas on 2 workers, GPU:0, GPU:1, mixed")


def test_a_flattened_head_has_features_of_every_cell():
    text = describe(head="flatten", image_size=64)
    assert "8192 features per image" in text
    assert f"{23_587_712 + 2 * 8193:,} parameters" in text


def test_the_plan_counts_the_parameters_of_the_backbone_and_names_the_input():
    text = describe(backbone="ConvNeXtTiny", head="flatten", image_size=95, resize="pad")
    assert "3072 features per image" in text  # 2 x 2 cells of 768: it ignores the last 31 pixels
    assert f"ConvNeXtTiny, flatten head, softmax over 2 classes: {27_820_128 + 2 * 3073:,} parameters" in text
    assert "95 x 95 pixels; resize: pad; preprocessing: imagenet" in text


def test_many_classes_are_shortened():
    assert "'class 29': 8 + 2\n    and 5 more classes" in describe(num_classes=35)
