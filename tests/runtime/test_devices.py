"""What --precision=auto and --xla=auto resolve to, and what a machine refuses."""

import dataclasses

import pytest
import tensorflow as tf

from tests.support.images import write_images
from tests.support.processes import run_command
from trainer.errors import UserError
from trainer.runtime import devices
from trainer.runtime.devices import Devices

ONE = Devices(tf.distribute.get_strategy(), "CPU", ("CPU:0",), 1, 1, 0)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu sse avx512f", "float32"),
        ("fpu avx512_bf16 sse", "mixed_bfloat16"),
        ("fpu amx_bf16 amx_tile", "mixed_bfloat16"),
    ],
)
def test_precision_depends_on_the_processor(tmp_path, flags, expected):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t: none\n")
    chosen, reason = devices.choose_precision("auto", "CPU", cpuinfo=str(tmp_path / "cpuinfo"))
    assert chosen == expected
    assert "processor" in reason


def test_an_explicit_precision_is_used_and_the_fallback_is_float32(tmp_path):
    assert devices.choose_precision("mixed_float16", "CPU")[0] == "mixed_float16"
    assert devices.choose_precision("auto", "CPU", cpuinfo=str(tmp_path / "none"))[0] == "float32"
    assert devices.choose_precision("auto", "TPU")[0] == "mixed_bfloat16"


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ([(6, 1)], "float32"),
        ([(7, 5)], "mixed_float16"),
        ([(8, 0)], "mixed_bfloat16"),
        ([(8, 9)], "mixed_bfloat16"),
        ([(9, 0)], "mixed_bfloat16"),
        ([(9, 0), (7, 0)], "mixed_float16"),
    ],
)
def test_precision_depends_on_the_oldest_gpu(monkeypatch, capabilities, expected):
    config = devices.tf.config
    monkeypatch.setattr(config, "list_physical_devices", lambda kind: capabilities)
    monkeypatch.setattr(config.experimental, "get_device_details", lambda gpu: {"compute_capability": gpu})
    assert devices.choose_precision("auto", "GPU")[0] == expected


def test_xla_is_refused_where_replicas_exchange_statistics():
    gpu = dataclasses.replace(ONE, kind="GPU")
    several = dataclasses.replace(gpu, replicas=2, local_replicas=2)
    assert devices.use_xla("auto", gpu, trains_statistics=True)
    assert devices.use_xla("on", ONE, trains_statistics=True)
    assert devices.use_xla("on", several, trains_statistics=False)
    assert not devices.use_xla("auto", ONE, trains_statistics=False)
    assert not devices.use_xla("off", gpu, trains_statistics=False)
    assert not devices.use_xla("auto", several, trains_statistics=False)
    with pytest.raises(UserError, match="--xla=on with 2 replicas"):
        devices.use_xla("on", several, trains_statistics=True)


@pytest.mark.slow
@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="this machine has a GPU")
def test_a_required_gpu_that_is_missing_is_diagnosed(tmp_path):
    images = write_images(tmp_path / "images", {"a": 20, "b": 20})
    result = run_command(
        "trainer.task", f"--data_dir={images}", f"--job_dir={tmp_path / 'job'}", "--batch_size=8", "--require_gpu"
    )
    assert result.returncode == 2, result.stderr
    assert "--require_gpu is set, but TensorFlow sees no GPU" in result.stderr
    assert "To do:" in result.stderr
    assert "Traceback" not in result.stderr
