"""The command draws the report of a job_dir."""

import pytest

from tests.support.processes import run_command
from tests.support.written_job import make_job_dir


@pytest.mark.slow
@pytest.mark.parametrize("report_dir", ["", "elsewhere"])
def test_the_report_is_drawn_into_the_folder(tmp_path, report_dir):
    job_dir = make_job_dir(tmp_path, history=(), with_predictions=False, finished=False)
    flags = [f"--report_dir={tmp_path / report_dir}"] if report_dir else []
    result = run_command("trainer.report", f"--job_dir={job_dir}", *flags)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / report_dir if report_dir else job_dir / "report") / "index.html"
    assert page.exists()
    assert str(page) in result.stderr


@pytest.mark.slow
def test_a_folder_without_a_run_is_one_line(tmp_path):
    result = run_command("trainer.report", f"--job_dir={tmp_path}")
    assert result.returncode == 2
    assert "no config.json" in result.stderr
    assert "Traceback" not in result.stderr
