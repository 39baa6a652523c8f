"""Shared memory for several GPUs, and the diagnosis of a GPU that TensorFlow does not see."""

import pytest

from trainer.errors import UserError
from trainer.runtime import gpu


def test_too_little_shared_memory_is_an_error(tmp_path):
    gpu.check_shared_memory(num_gpus=1, path=str(tmp_path), minimum_bytes=2**60)
    gpu.check_shared_memory(num_gpus=2, path=str(tmp_path), minimum_bytes=1)
    with pytest.raises(UserError, match=r"holds \d+ MiB, but NCCL needs \d+ MiB for 2 GPUs: .*Memory.*--shm-size"):
        gpu.check_shared_memory(num_gpus=2, path=str(tmp_path), minimum_bytes=2**60)
    with pytest.raises(UserError, match="missing holds 0 MiB, but NCCL needs 256 MiB for 8 GPUs"):
        gpu.check_shared_memory(num_gpus=8, path=str(tmp_path / "missing"))


def write_files(root, **files):
    """Writes files below root; a double underscore in a name is a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, False, id="empty-machine"),
        pytest.param({"proc__driver__nvidia__version": ""}, True, id="driver"),
        pytest.param({"dev__nvidia0": ""}, True, id="device-file"),
        pytest.param({"pci__vendor": "0x10de\n", "pci__class": "0x030200\n"}, True, id="card-without-driver"),
        pytest.param({"pci__vendor": "0x10de\n", "pci__class": "0x040300\n"}, False, id="audio-function-of-a-card"),
        pytest.param({"pci__vendor": "0x8086\n", "pci__class": "0x030000\n"}, False, id="card-of-another-vendor"),
    ],
)
def test_nvidia_hardware_is_found_by_driver_device_or_pci(tmp_path, files, expected):
    write_files(
        tmp_path,
        **{name.replace("pci", "sys__bus__pci__devices__0000:17:00.0"): files[name] for name in files},
    )
    assert gpu.has_nvidia_hardware(tmp_path) is expected


OPEN_DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (builder@host)\nGCC\n"
CLOSED_DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.135  Fri Jan 10 20:00:00 UTC 2025\nGCC\n"
CUDA_BUILD = {"is_cuda_build": True, "cuda_version": "12.5.1", "cudnn_version": "9"}
CUDNN_ONLY = {"site__nvidia__cudnn__version": ""}
LIBRARIES = ("cublas", "cuda_runtime", "cudnn", "cufft", "cusolver", "cusparse", "nccl")
ALL_LIBRARIES = {f"site__nvidia__{name}__version": "" for name in LIBRARIES}


@pytest.mark.parametrize(
    ("files", "libcuda", "build", "texts"),
    [
        pytest.param(
            {},
            "missing.so",
            CUDA_BUILD,
            ["hardware: none", "driver: not loaded", "machine with an NVIDIA GPU"],
            id="no-gpu",
        ),
        pytest.param(
            {"dev__nvidia0": ""}, "missing.so", CUDA_BUILD, ["hardware: yes", "install NVIDIA's driver"], id="no-driver"
        ),
        pytest.param(  # a sandbox may hide /proc/driver although the driver works
            {"dev__nvidia0": ""}, "libc.so.6", CUDA_BUILD, ["driver: not loaded", "pip install"], id="driver-unseen"
        ),
        pytest.param(
            {"proc__driver__nvidia__version": CLOSED_DRIVER},
            "libc.so.6",
            {"is_cuda_build": False},
            ["driver: 550.135;", "libcuda.so.1: loads", "built without CUDA", "'tensorflow[and-cuda]'"],
            id="tensorflow-cpu",
        ),
        pytest.param(
            {"proc__driver__nvidia__version": OPEN_DRIVER, **ALL_LIBRARIES},
            "missing.so",
            CUDA_BUILD,
            [
                "driver: 580.95.05;",
                "libcuda.so.1: does not load",
                "missing from pip: none",
                "nvidia.com/gpu",
                "--gpus=all",
            ],
            id="container-without-gpu",
        ),
        pytest.param(
            {"proc__driver__nvidia__version": OPEN_DRIVER, **CUDNN_ONLY},
            "libc.so.6",
            CUDA_BUILD,
            ["built with CUDA 12.5.1 and cuDNN 9", "cublas, cuda_runtime, cufft", "pip install 'tensorflow[and-cuda]'"],
            id="no-pip-libraries",
        ),
        pytest.param(
            {"proc__driver__nvidia__version": OPEN_DRIVER, **ALL_LIBRARIES},
            "libc.so.6",
            CUDA_BUILD,
            ["missing from pip: none", "CUDA_VISIBLE_DEVICES"],
            id="all-there",
        ),
    ],
)
def test_the_diagnosis_names_the_first_problem(tmp_path, files, libcuda, build, texts):
    write_files(tmp_path, **files)
    line = gpu.diagnose(root=tmp_path, libcuda=libcuda, python_path=[str(tmp_path / "site")], build=build)
    assert "\n" not in line
    assert [text for text in texts if text not in line] == [], line


def test_the_diagnosis_of_this_machine_agrees_with_tensorflow():
    tf = pytest.importorskip("tensorflow")
    line = gpu.diagnose()
    assert ("built with CUDA" in line) == tf.test.is_built_with_cuda()
    assert ("hardware: yes" in line) == gpu.has_nvidia_hardware()
