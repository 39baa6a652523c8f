"""The order of gradients and collective operations in the graph of a training step on two devices."""

import json
import subprocess
import sys
from collections.abc import Iterator

import keras
import pytest
import tensorflow as tf

from tests.support.paths import ROOT
from trainer.models import networks
from trainer.runtime.devices import Devices
from trainer.training import loop as training_loop
from trainer.training.optimizer import Recipe, make_optimizer

NUM_CONVOLUTIONS = 3


@pytest.mark.slow
def test_the_gradients_of_the_last_layers_are_summed_before_those_of_the_first_are_computed():
    def gradients_before_each_sum(bytes_per_pack: int) -> list[int]:
        code = f"from tests.training.test_gradient_packs import print_order; print_order({bytes_per_pack})"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    assert gradients_before_each_sum(2**20) == [NUM_CONVOLUTIONS] * 2  # all gradients in one sum, on each device
    assert gradients_before_each_sum(1000) == [1, 2, NUM_CONVOLUTIONS] * 2


def print_order(bytes_per_pack: int) -> None:
    """Prints the number of convolutions whose gradients each collective sum waits for, in a process of its own."""
    from tensorflow.python.distribute.collective_all_reduce_strategy import CollectiveAllReduceStrategy

    training_loop.BYTES_PER_PACK = bytes_per_pack
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    # As several workers or GPUs have it; MirroredStrategy on processors adds without a collective operation.
    names = ("/device:CPU:0", "/device:CPU:1")
    strategy = CollectiveAllReduceStrategy._from_local_devices(names)
    devices = Devices(strategy, "CPU", names, replicas=2, local_replicas=2, first_replica=0)
    graph = _step_graph(devices)
    nodes = {node.name: node for node in graph.node_def}
    sums = [name for name, node in nodes.items() if node.op == "CollectiveReduceV2"]
    ancestors = [set(_ancestors(name, nodes)) for name in sums]
    print(json.dumps([sum(nodes[name].op == "Conv2DBackpropFilter" for name in names) for names in ancestors]))


def _step_graph(devices: Devices) -> tf.compat.v1.GraphDef:
    """The function of the graph that contains the collective sums: the body of the loop over steps."""
    with devices.strategy.scope():
        outputs = inputs = keras.Input([8, 8, 3])
        for _ in range(NUM_CONVOLUTIONS):
            outputs = keras.layers.Conv2D(16, 3)(outputs)
        network = networks.with_head(keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(outputs)), 3)
        recipe = Recipe(optimizer="sgd", learning_rate=0.1)
        optimizer = make_optimizer(recipe, epochs=1, steps_per_epoch=1, loss_scaling=False)
    loop = training_loop.TrainingLoop(network.backbone, network.head, optimizer, devices=devices, batch_size=8, seed=0)
    batch = {
        "x": tf.zeros([4, 8, 8, 3]),
        "label": tf.zeros([4], tf.int32),
        "weight": tf.ones([4]),
        "loss_weight": tf.ones([4]) / 8,
        "row": tf.range(4),
        "step": tf.zeros([4], tf.int64),
    }
    dataset = tf.data.Dataset.from_tensors(batch).repeat()
    iterator = iter(devices.strategy.distribute_datasets_from_function(lambda context: dataset))
    steps = loop._train_steps.get_concrete_function(iterator, tf.constant(1), tf.constant(0), tf.constant(0))
    functions = steps.graph.as_graph_def().library.function
    return next(f for f in functions if any(node.op == "CollectiveReduceV2" for node in f.node_def))


def _ancestors(name: str, nodes: dict) -> Iterator[str]:
    waiting, seen = [name], set()
    while waiting:
        for edge in nodes[waiting.pop()].input:
            source = edge.lstrip("^").split(":")[0]
            if source in nodes and source not in seen:
                seen.add(source)
                waiting.append(source)
    yield from seen
