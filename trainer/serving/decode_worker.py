"""What a process that decodes images runs. Its parent is multiprocessing's fork server, which imports this module once.

The import of TensorFlow takes seconds; a process that is forked after it starts without. Nothing of TensorFlow runs
before the fork: its threads would not survive it.
"""

import os
import signal
from multiprocessing.connection import Connection

from trainer import cli

cli.import_tensorflow()

import tensorflow as tf  # noqa: E402

from trainer.data import formats  # noqa: E402
from trainer.data.preprocessing import NetworkInput, decode_image  # noqa: E402
from trainer.serving.classifier import decoding_error  # noqa: E402

NICENESS = 10  # the event loop goes first, which answers health checks while all processors decode


def build_graph(image_size: int, resize: str) -> bytes:
    """The graph that decodes the contents of a file to a PNG of the square that the network receives, serialized.

    Built once by the server: it takes 2 s, and 0.1 s to read it in each process.
    """
    network_input = NetworkInput(image_size, resize, preprocessing="rescale")  # decoding does not use the last

    @tf.function(input_signature=[tf.TensorSpec([], tf.string, name="contents")], autograph=False)
    def as_network_input(contents: tf.Tensor) -> tf.Tensor:
        return tf.identity(tf.io.encode_png(decode_image(contents, network_input), compression=1), name="image")

    return as_network_input.get_concrete_function().graph.as_graph_def().SerializeToString()


def run(connection: Connection, graph: bytes) -> None:
    """Answers the contents of each file with (image, reason) until the connection is closed.

    The image is a PNG of the square that the network receives; it is empty if there is a reason against the file.
    """
    os.nice(NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is sent to the whole group; the server ends its decoders
    tf.config.set_visible_devices([], "GPU")
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    definition = tf.compat.v1.GraphDef.FromString(graph)

    def import_graph(contents: tf.Tensor) -> tf.Tensor:
        inputs = {"contents:0": contents}
        return tf.graph_util.import_graph_def(definition, input_map=inputs, return_elements=["image:0"], name="")[0]

    as_network_input = tf.compat.v1.wrap_function(import_graph, [tf.TensorSpec([], tf.string)])
    while True:
        try:
            contents = connection.recv_bytes()
        except EOFError:  # the server has ended
            return
        image, reason = b"", formats.rejection_reason(contents)
        if not reason:
            try:
                image = as_network_input(tf.constant(contents)).numpy()
            except tf.errors.InvalidArgumentError as error:
                reason = decoding_error(error.message)
        connection.send((image, reason))
