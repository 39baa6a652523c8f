"""Which devices, which tf.distribute strategy, which precision, and whether XLA compiles: chosen once, with reasons."""

from pathlib import Path
from typing import NamedTuple

import tensorflow as tf
from absl import logging

from trainer.errors import UserError
from trainer.runtime import gpu
from trainer.runtime.cluster import Cluster


class Devices(NamedTuple):
    """What this worker computes on. Replicas are numbered over all workers, in the order of their indices."""

    strategy: tf.distribute.Strategy
    kind: str  # GPU, TPU or CPU
    names: tuple[str, ...]  # of this worker's devices
    replicas: int
    local_replicas: int
    first_replica: int


def start(cluster: Cluster, *, require_gpu: bool) -> Devices:
    """Creates the strategy: none for one device, Mirrored for several, MultiWorkerMirrored for several hosts.

    It must come before anything else touches TensorFlow: collective operations are configured at program start
    (tensorflow#55178). For several hosts TF_CONFIG must be set. Raises UserError if a GPU was asked for and none is seen.
    """
    gpus = tf.config.list_physical_devices("GPU")
    _check_gpus(gpus, require_gpu)
    for device in gpus:  # leave memory to other processes of the same machine until it is needed
        tf.config.experimental.set_memory_growth(device, True)
    kind = "GPU" if gpus else "CPU"
    if cluster.workers > 1:
        implementation = tf.distribute.experimental.CommunicationImplementation
        options = tf.distribute.experimental.CommunicationOptions(
            implementation=implementation.NCCL if gpus else implementation.RING
        )
        strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    elif len(tf.config.list_logical_devices(kind)) > 1:
        strategy = tf.distribute.MirroredStrategy([device.name for device in tf.config.list_logical_devices(kind)])
    else:
        # MirroredStrategy over one device would only switch XLA off.
        strategy = tf.distribute.get_strategy()
    replicas = strategy.num_replicas_in_sync
    local_replicas = replicas // cluster.workers
    names = tuple(device.name for device in tf.config.list_logical_devices(kind))
    return Devices(strategy, kind, names, replicas, local_replicas, cluster.index * local_replicas)


def _check_gpus(gpus: list, require_gpu: bool) -> None:
    if gpus:
        gpu.check_shared_memory(num_gpus=len(gpus))
        return
    if require_gpu:
        raise UserError(f"--require_gpu is set, but TensorFlow sees no GPU: {gpu.diagnose()}")
    if gpu.has_nvidia_hardware():
        logging.warning(
            "NVIDIA hardware is present, but TensorFlow does not use it and trains on the CPU, many times slower: %s",
            gpu.diagnose(),
        )


def choose_precision(flag: str, kind: str, *, cpuinfo: str = "/proc/cpuinfo") -> tuple[str, str]:
    """The Keras dtype policy for --precision, and the reason for it. `cpuinfo` is where Linux tells of the processor."""
    if flag != "auto":
        return flag, "asked for by --precision"
    if kind == "GPU":
        details = [
            tf.config.experimental.get_device_details(device) for device in tf.config.list_physical_devices("GPU")
        ]
        capability = min(detail.get("compute_capability", (0, 0)) for detail in details)
        version = ".".join(map(str, capability))
        if capability >= (7, 0):
            return "mixed_float16", f"the GPU has tensor cores (compute capability {version}, 7.0 or above)"
        return "float32", f"the GPU's compute capability is {version}: half precision pays from 7.0 on"
    if kind == "TPU":
        return "mixed_bfloat16", "a TPU computes in bfloat16"
    features = set(_processor_flags(cpuinfo)) & {"avx512_bf16", "amx_bf16"}
    if features:
        return "mixed_bfloat16", f"the processor computes in bfloat16 ({', '.join(sorted(features))})"
    return "float32", "the processor has neither avx512_bf16 nor amx_bf16"


def _processor_flags(cpuinfo: str) -> list[str]:
    try:
        lines = Path(cpuinfo).read_text().splitlines()
    except OSError:  # not Linux: nothing is known, so nothing is assumed
        return []
    return next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])


def use_xla(flag: str, devices: Devices, *, trains_statistics: bool) -> bool:
    """Whether each replica's forward and backward pass is compiled by XLA: `auto` is on for one GPU only.

    On the CPU XLA was measured slower; over several GPUs nothing was measured, so there it waits for `on`. The sums over
    the replicas stay outside of what is compiled, but for batch statistics that are trained, which replicas exchange
    within the forward pass and XLA cannot: `--xla=on` raises UserError there.
    """
    if flag == "on" and devices.replicas > 1 and trains_statistics:
        raise UserError(
            f"--xla=on with {devices.replicas} replicas that exchange the statistics of batch normalisation, which XLA "
            "cannot compile: pass --batch_norm=frozen, or --xla=auto."
        )
    return flag == "on" or (flag == "auto" and devices.kind == "GPU" and devices.replicas == 1)
