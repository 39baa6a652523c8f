"""The first SIGTERM or SIGINT requests a stop, the second one ends the process at once."""

import signal
import subprocess
import sys

import pytest

PROCESS = """
import time
from trainer.runtime.signals import StopSignal
stop = StopSignal(exit_code=143)
print("ready", flush=True)
while not stop.is_set():
    time.sleep(0.01)
print("stopping", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_exits_at_once(first, second):
    with subprocess.Popen(
        [sys.executable, "-c", PROCESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(first)
            assert process.stdout.readline() == "stopping\n"
            assert process.poll() is None
            process.send_signal(second)
            assert process.wait(10) == 143
            assert f"{first.name}: saving, then exiting." in process.stderr.read()
        finally:
            process.kill()
