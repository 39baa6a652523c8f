"""Two jobs never write to one job_dir; a dead one is no hindrance."""

import subprocess
import sys

import pytest

from trainer.errors import UserError
from trainer.storage import lock

HOLD = """
import sys, time
from trainer import lease
with lease.hold(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_job_is_refused_until_the_first_is_dead(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(UserError, match=rf'Another job is at work .*"process": {holder.pid}'),
        lock.hold(str(tmp_path)),
    ):
        pass
    holder.kill()
    holder.wait()
    with lock.hold(str(tmp_path)):
        pass
    with lock.hold(str(tmp_path)):  # given back at the end of the block
        pass
