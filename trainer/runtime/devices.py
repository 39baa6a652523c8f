"""Chooses the devices, the tf.distribute strategy, the precision and XLA compilation, once per process."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import tensorflow as tf
from absl import logging

from trainer.errors import UserError
from trainer.runtime import gpu
from trainer.runtime.cluster import Cluster

CLUSTER_START_SECS = 120.0  # after the rendezvous, for what all workers then do at the same time


def _unwatched(activity: str) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of this worker. Replicas are numbered over all workers, in the order of the workers' indices."""

    strategy: tf.distribute.Strategy
    kind: str  # GPU, TPU or CPU
    names: tuple[str, ...]  # of this worker's devices
    replicas: int
    local_replicas: int
    first_replica: int
    # Encloses each call that ends only when all workers have made it; its argument names the call.
    waiting: Callable[[str], contextlib.AbstractContextManager] = _unwatched


def start(
    cluster: Cluster,
    *,
    require_gpu: bool,
    waiting: Callable[[str], contextlib.AbstractContextManager] = _unwatched,
    worker_timeout_secs: float = CLUSTER_START_SECS,
) -> Devices:
    """Creates the strategy: none for one device, Mirrored for several, MultiWorkerMirrored for several hosts.

    Call it before any other TensorFlow operation, and for several hosts after rendezvous.wait_for_workers: while it waits
    for them, no signal ends the process. Collective operations are configured at program start
    (tensorflow#55178). Several hosts need TF_CONFIG; `waiting` is that of a WorkerWatch. Raises UserError if
    `require_gpu` and TensorFlow sees no GPU, and DeadlineExceededError if a worker does not come within
    `worker_timeout_secs` or CLUSTER_START_SECS.
    """
    gpus = tf.config.list_physical_devices("GPU")
    _check_gpus(gpus, require_gpu)
    for device in gpus:
        # Leaves unused memory to other processes. TensorFlow refuses it for a card that is split into logical devices, and
        # for one that the program has started which calls trainer.train.
        with contextlib.suppress(RuntimeError, ValueError):
            tf.config.experimental.set_memory_growth(device, True)
    kind = "GPU" if gpus else "CPU"
    if cluster.workers > 1:
        implementation = tf.distribute.experimental.CommunicationImplementation
        options = tf.distribute.experimental.CommunicationOptions(
            implementation=implementation.NCCL if gpus else implementation.RING
        )
        _limit_cluster_start(cluster.workers, min(worker_timeout_secs, CLUSTER_START_SECS))
        strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    elif len(tf.config.list_logical_devices(kind)) > 1:
        strategy = tf.distribute.MirroredStrategy([device.name for device in tf.config.list_logical_devices(kind)])
    else:
        # MirroredStrategy over one device would only disable XLA.
        strategy = tf.distribute.get_strategy()
    replicas = strategy.num_replicas_in_sync
    local_replicas = replicas // cluster.workers
    names = tuple(device.name for device in tf.config.list_logical_devices(kind))
    return Devices(
        strategy=strategy,
        kind=kind,
        names=names,
        replicas=replicas,
        local_replicas=local_replicas,
        first_replica=cluster.index * local_replicas,
        waiting=waiting,
    )


def _limit_cluster_start(num_workers: int, timeout_secs: float) -> None:
    """Makes TensorFlow wait for the other workers for so long, in place of an hour (the chief: without end).

    One may be killed after the rendezvous. There is no public function for it; MultiWorkerMirroredStrategy keeps what is set.
    """
    from tensorflow.compiler.xla.tsl.protobuf import coordination_config_pb2
    from tensorflow.python.eager import context

    context.context().configure_coordination_service(
        service_type="standalone",
        service_leader="/job:worker/task:0",
        coordinated_jobs=[coordination_config_pb2.CoordinatedJob(name="worker", num_tasks=num_workers)],
        cluster_register_timeout_in_ms=int(1000 * timeout_secs),
    )
    context.context().coordination_service.cluster_register_with_barrier = True


def count_gpus() -> int:
    """Number of GPUs of this machine; unlike `start`, it does not initialize them."""
    return len(tf.config.list_physical_devices("GPU"))


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
    """The Keras dtype policy for --precision, and the reason for it. `cpuinfo` describes the processor on Linux.

    GPUs of compute capability 8.0 and above compute bfloat16 as fast as float16; older ones emulate it. bfloat16 has the
    range of float32. In float16 the gradients of pretrained weights overflow: they are in the thousands, and Keras scales the
    loss by 32,768 at first, where float16 ends at 65,504; each overflow skips a step. TensorFlow has bfloat16 kernels
    for convolutions and batch normalization on GPUs since 2.12 (tensorflow#58512); before, they were slow (tensorflow#59050).
    """
    if flag != "auto":
        return flag, "set by --precision"
    if kind == "GPU":
        details = [
            tf.config.experimental.get_device_details(device) for device in tf.config.list_physical_devices("GPU")
        ]
        capability = min(detail.get("compute_capability", (0, 0)) for detail in details)
        version = ".".join(map(str, capability))
        if capability >= (8, 0):
            return "mixed_bfloat16", f"the GPU computes in bfloat16 (compute capability {version}, 8.0 or above)"
        if capability >= (7, 0):
            return "mixed_float16", f"the GPU has tensor cores (compute capability {version}, 7.0 or above)"
        return "float32", f"the GPU's compute capability is {version}: half precision is faster from 7.0 on"
    if kind == "TPU":
        return "mixed_bfloat16", "a TPU computes in bfloat16"
    features = set(_processor_flags(cpuinfo)) & {"avx512_bf16", "amx_bf16"}
    if features:
        return "mixed_bfloat16", f"the processor computes in bfloat16 ({', '.join(sorted(features))})"
    return "float32", "the processor has neither avx512_bf16 nor amx_bf16"


def _processor_flags(cpuinfo: str) -> list[str]:
    try:
        lines = Path(cpuinfo).read_text().splitlines()
    except OSError:  # not Linux
        return []
    return next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])


def use_xla(flag: str, devices: Devices, *, trains_statistics: bool) -> bool:
    """Whether XLA compiles the forward and backward pass of each replica: `auto` is on for one GPU only.

    XLA was measured slower on the CPU and was not measured on several GPUs. The all-reduce of gradients is outside of
    the compiled function. Trained batch statistics are exchanged between replicas within the forward pass, which XLA
    cannot compile: `--xla=on` raises UserError for them.
    """
    if flag == "on" and devices.replicas > 1 and trains_statistics:
        raise UserError(
            f"--xla=on with {devices.replicas} replicas that exchange the statistics of batch normalization, which XLA "
            "cannot compile: pass --batch_norm=frozen, or --xla=auto."
        )
    return flag == "on" or (flag == "auto" and devices.kind == "GPU" and devices.replicas == 1)
