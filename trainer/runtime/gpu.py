"""Checks of NVIDIA GPUs: shared memory for NCCL, and why TensorFlow sees no GPU.

Imports TensorFlow only to diagnose a missing GPU.
"""

import ctypes
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import UserError

# Folders of site-packages/nvidia that tensorflow[and-cuda] installs and whose libraries TensorFlow loads at start.
_CUDA_LIBRARIES = ("cublas", "cuda_runtime", "cudnn", "cufft", "cusolver", "cusparse", "nccl")


def check_shared_memory(*, num_gpus: int, path: str = "/dev/shm", minimum_bytes: int = 256 * 2**20) -> None:
    """Raises UserError if there are several GPUs and too little shared memory for NCCL.

    Containers have 64 MiB by default. NVIDIA's example of the failure extends a segment to 4 MiB; 8 GPUs have 56
    ordered pairs, so they need 224 MiB, rounded up here to 256 MiB. NVIDIA recommends 1 GiB:
    https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting/runtime_and_mpi_issues.html
    """
    if num_gpus < 2:
        return
    try:
        status = os.statvfs(path)
        num_bytes = status.f_frsize * status.f_blocks
    except FileNotFoundError:
        num_bytes = 0
    if num_bytes < minimum_bytes:
        raise UserError(
            f"{path} holds {num_bytes / 2**20:.0f} MiB, but NCCL needs {minimum_bytes / 2**20:.0f} MiB for {num_gpus} "
            f"GPUs: mount an emptyDir with `medium: Memory` at {path} (Kubernetes) or pass --shm-size=1g (docker)."
        )


def has_nvidia_hardware(root: str | Path = "/") -> bool:
    """Whether this machine has an NVIDIA GPU, even if the driver or TensorFlow does not find it."""
    root = Path(root)
    if (root / "proc/driver/nvidia").exists() or any(root.glob("dev/nvidia*")):
        return True
    # Vendor 0x10de is NVIDIA, class 0x03.. a display controller: the cards also have audio and USB functions.
    return any(
        _text(device / "vendor") == "0x10de" and _text(device / "class").startswith("0x03")
        for device in root.glob("sys/bus/pci/devices/*")
    )


def diagnose(
    *,
    root: str | Path = "/",
    libcuda: str = "libcuda.so.1",
    python_path: Sequence[str] | None = None,
    build: Mapping[str, Any] | None = None,
) -> str:
    """Returns one line on why TensorFlow sees no GPU: the state of each part, then how to fix the first problem.

    The arguments are for tests; by default `python_path` is sys.path and `build` is tf.sysconfig.get_build_info().
    """
    if build is None:
        import tensorflow as tf  # takes seconds, so only where needed

        build = tf.sysconfig.get_build_info()
    hardware = has_nvidia_hardware(root)
    driver = re.search(r"\s(\d+(\.\d+)+)\s", _text(Path(root, "proc/driver/nvidia/version")) + "\n")
    try:
        ctypes.CDLL(libcuda)
        is_loadable = True
    except OSError:
        is_loadable = False
    has_cuda = bool(build.get("is_cuda_build"))
    folders = [Path(folder, "nvidia") for folder in (sys.path if python_path is None else python_path)]
    missing = [name for name in _CUDA_LIBRARIES if not any((folder / name).is_dir() for folder in folders)]
    if not hardware:
        advice = "run it on a machine with an NVIDIA GPU"
    elif not driver and not is_loadable:
        advice = "install NVIDIA's driver on the host and restart it"
    elif not has_cuda:
        advice = "pip uninstall tensorflow-cpu, then pip install 'tensorflow[and-cuda]'"
    elif not is_loadable:
        advice = "give the container a GPU: limit nvidia.com/gpu (Kubernetes), --gpus=all (docker)"
    elif missing:
        advice = "pip install 'tensorflow[and-cuda]'"
    else:
        advice = "check whether CUDA_VISIBLE_DEVICES hides the GPU or the driver is too old for this CUDA version"
    cuda = (
        f"with CUDA {build.get('cuda_version')} and cuDNN {build.get('cudnn_version')}" if has_cuda else "without CUDA"
    )
    return (
        f"NVIDIA hardware: {'yes' if hardware else 'none'}; driver: {driver[1] if driver else 'not loaded'}; "
        f"libcuda.so.1: {'loads' if is_loadable else 'does not load'}; TensorFlow: built {cuda}; "
        f"CUDA libraries missing from pip: {', '.join(missing) or 'none'}. To do: {advice}."
    )


def _text(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""
