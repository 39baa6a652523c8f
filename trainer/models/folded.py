"""The network at inference, with batch normalization folded into the convolutions: the same function in fewer operations.

At inference a batch normalization multiplies each channel by gamma / sqrt(variance + epsilon) and adds a constant. Keras
computes this as separate operations, in float32 in every precision (keras/src/layers/normalization/batch_normalization.py).
Here the kernel and the bias of the convolution before it contain both (Jacob et al., 2018, arXiv:1712.05877, section 3.2).

In bfloat16, the bias is rounded too, which adds 3 to 5 % to the error against float32 of ResNet50 if every operation rounds
its result. Processors with bfloat16 compute convolution, bias, sum and ReLU as one operation that rounds once; the error is
then 10 % smaller than that of the Keras network (64 pixels, 30 images of cats and dogs).

A folded network is a Keras model with its own variables. It is not saved: best.weights.h5 and checkpoints hold the network
that it comes from. Where the statistics stay as they are, training folds too, in each step: `training_forward` computes the
kernels of the folded network from the variables of the network, and gradients reach these.

Shapes: k x k a kernel, I channels of an input, O channels of an output.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from trainer.models.networks import Network


def fold(backbone: keras.Model, compute_dtype: str = "") -> keras.Model:
    """A new model with the inputs and outputs of `backbone`, and its weights of this moment; see `refresh`.

    Its layers compute in `compute_dtype` (float32, bfloat16 or float16); only the last layer, whose output are the features,
    keeps its own. Without `compute_dtype`, each layer computes in the dtype of the layer that it comes from.
    (`backbone.compute_dtype` says float32 in every precision.)

    Returns `backbone` itself if no normalization follows a convolution, as in ConvNeXtTiny, and no `compute_dtype` is given.
    Call it in the strategy scope of `backbone`.
    """
    norms = _norms_by_convolution(backbone)
    if not norms and not compute_dtype:
        return backbone
    folded_norms = {id(norm) for norm in norms.values()}

    def clone(operation: keras.Operation) -> keras.Operation:
        if id(operation) in folded_norms:
            return operation  # `call` leaves it out
        config = operation.get_config()
        if isinstance(operation, keras.Layer):
            is_last = operation.output is backbone.output
            dtype = operation.compute_dtype if is_last else compute_dtype or operation.compute_dtype
            # Variables in float32: a new variable is sent to the other workers, which TensorFlow cannot do in bfloat16.
            is_mixed = operation.weights and dtype in ("bfloat16", "float16")
            config["dtype"] = f"mixed_{dtype}" if is_mixed else dtype
        if operation.name in norms:
            config["use_bias"] = True
        if "kernel_initializer" in config:
            config["kernel_initializer"] = "zeros"  # random numbers cost time; refresh replaces them
        return operation.__class__.from_config(config)

    def call(operation: keras.Operation, *args: Any, **kwargs: Any) -> Any:
        return args[0] if id(operation) in folded_norms else operation(*args, **kwargs)

    folded = keras.models.clone_model(backbone, clone_function=clone, call_function=call)
    folded.trainable = False
    refresh(folded, backbone)
    return folded


def refresh(folded: keras.Model, backbone: keras.Model) -> None:
    """Sets the weights of `folded`, which `fold` made of `backbone`, to the present ones; outside of replicas."""
    if folded is backbone:
        return
    values = _folded_values(folded, backbone, tf.float64)
    for variable in folded.weights:
        variable.assign(tf.cast(values[id(variable)], variable.dtype))


def training_forward(folded: keras.Model, backbone: keras.Model) -> Callable[[tf.Tensor], tf.Tensor] | None:
    """A function of preprocessed images -> features as `backbone` computes them in training, by the layers of `folded`.

    Differentiable with respect to the variables of `backbone`, whose present values it reads at each call. None if training
    computes what inference does not: batch statistics, or dropout within the backbone. `folded` is a result of `fold`.
    """
    draws_numbers = len(backbone.variables) > len(backbone.weights)  # the states of random generators are no weights
    norms = [layer for layer in backbone.layers if isinstance(layer, keras.layers.BatchNormalization)]
    if folded is backbone or draws_numbers or any(norm.trainable for norm in norms):
        return None

    def forward(images: tf.Tensor) -> tf.Tensor:
        values = _folded_values(folded, backbone, tf.float32)
        ordered = [values[id(variable)] for variable in folded.non_trainable_variables]
        features, _ = folded.stateless_call([], ordered, images, training=True)
        return features

    return forward


def fold_network(network: Network, compute_dtype: str = "") -> Network:
    """`network` with its backbone folded (see `fold`) and with its own head; its model returns probabilities float32.

    Returns `network` itself if the backbone is not folded.
    """
    backbone = fold(network.backbone, compute_dtype)
    if backbone is network.backbone:
        return network
    softmax = keras.layers.Activation("softmax", dtype="float32", name="probabilities")
    model = keras.Model(backbone.input, softmax(network.head(backbone.output)), name="classifier")
    return Network(model, backbone, network.head)


def _folded_values(folded: keras.Model, backbone: keras.Model, dtype: tf.DType) -> dict[int, tf.Tensor]:
    """The value of each weight of `folded` by its id, computed in `dtype` from the present weights of `backbone`."""
    norms = _norms_by_convolution(backbone)
    values: dict[int, tf.Tensor] = {}
    for layer in folded.layers:
        if not layer.weights:
            continue
        source = backbone.get_layer(layer.name)
        weights = [tf.convert_to_tensor(variable) for variable in source.weights]
        if layer.name in norms:
            weights = [*_folded_weights(source, norms[layer.name], dtype)]
        values |= zip(map(id, layer.weights), weights, strict=True)
    return values


def _norms_by_convolution(backbone: keras.Model) -> dict[str, keras.layers.BatchNormalization]:
    """The normalizations whose input is the output of a convolution and of no other use, by the convolution's name."""
    # The caller of the model is a consumer, too.
    consumers: dict[int, list[keras.Operation | None]] = {id(output): [None] for output in backbone.outputs}
    for operation in backbone.operations:
        for tensor in keras.tree.flatten(operation.input):
            consumers.setdefault(id(tensor), []).append(operation)
    found = {}
    for layer in backbone.layers:
        if type(layer) in (keras.layers.Conv2D, keras.layers.DepthwiseConv2D):  # a subclass may compute something else
            norm, *others = consumers[id(layer.output)]
            is_linear = layer.activation is keras.activations.linear and layer.data_format == "channels_last"
            if is_linear and not others and isinstance(norm, keras.layers.BatchNormalization) and norm.axis in (-1, 3):
                found[layer.name] = norm
    return found


def _folded_weights(
    convolution: keras.layers.Conv2D | keras.layers.DepthwiseConv2D,
    norm: keras.layers.BatchNormalization,
    dtype: tf.DType,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Kernel [k, k, I, O], or [k, k, I, O / I] of a depthwise convolution, and bias [O], both of `dtype`."""
    kernel, *bias = (tf.cast(variable, dtype) for variable in convolution.weights)
    scale = tf.math.rsqrt(tf.cast(norm.moving_variance, dtype) + norm.epsilon)  # [O]
    if norm.gamma is not None:
        scale *= tf.cast(norm.gamma, dtype)
    shift = (sum(bias) - tf.cast(norm.moving_mean, dtype)) * scale
    if norm.beta is not None:
        shift += tf.cast(norm.beta, dtype)
    if isinstance(convolution, keras.layers.DepthwiseConv2D):
        return kernel * tf.reshape(scale, kernel.shape[2:]), shift
    return kernel * scale, shift
