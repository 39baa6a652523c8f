"""trainer.task with a small network, so that tests can run many jobs. Not a test itself.

python tiny_job.py --data_dir=D --job_dir=J [any flag of trainer.task]

With the environment variable CLOCK_RATE, the clock that measures its steps runs so many times faster.
"""

import os
import time
import types

from trainer import cli, config, recipes, task
from trainer.config import Config


def build(
    *, num_classes, image_size, backbone, weights, head, precision, seed, batch_norm="auto", batch_norm_momentum=0.9
):
    """Builds a small network with the arguments of models.networks.build; ignores `backbone`, `weights` and `head`."""
    import keras

    from trainer.models import networks
    from trainer.training import loop

    if rate := float(os.environ.get("CLOCK_RATE", "0")):
        loop.time = types.SimpleNamespace(monotonic=lambda: rate * time.monotonic())
    with networks.seeded(seed, precision):
        inputs = keras.Input([image_size, image_size, 3])
        x = keras.layers.Conv2D(8, 5, strides=4, use_bias=False, name="convolution")(inputs)
        norm = keras.layers.BatchNormalization(momentum=batch_norm_momentum, synchronized=True, name="norm")
        norm.trainable = batch_norm != "frozen"
        x = keras.layers.GlobalAveragePooling2D(dtype="float32", name="features")(keras.layers.ReLU()(norm(x)))
        return networks.with_head(keras.Model(inputs, x), num_classes)


def main(arguments: list[str]) -> int:
    """Like trainer.task.main, with the small network."""
    values = recipes.with_recipe(cli.flag_values(config.DEFAULTS), cli.given_flags(config.DEFAULTS))
    return task.run(task.with_environment(Config(**values), os.environ), build_network=build)


if __name__ == "__main__":
    cli.run(main, define_flags=task.define_flags)
