"""The pack command writes shards that a job reads as its data directory."""

import pytest

from tests.support.images import write_images
from tests.support.processes import run_command
from trainer.data.dataset import read_folder


@pytest.mark.slow
def test_the_command_packs_the_images_of_a_label_file_as_those_of_a_folder(tmp_path):
    data = write_images(tmp_path / "data", {"cat": 3, "dog": 2})
    output_dir = tmp_path / "packed"
    rows = [f"{path.parent.name}/{path.name},{path.parent.name}\n" for path in data.rglob("*.jpg")]
    (data / "labels.csv").write_text("path,label\n" + "".join(rows))
    process = run_command("trainer.pack", f"--labels={data / 'labels.csv'}", f"--output_dir={output_dir}")
    assert process.returncode == 0, process.stderr
    assert f"--data_dir={output_dir}" in process.stdout
    assert list(read_folder(str(output_dir)).examples.paths) == list(read_folder(str(data)).examples.paths)


def test_too_many_bad_files_are_the_users_error(tmp_path):
    data = write_images(tmp_path / "data", {"cat": 3, "dog": 2})
    (data / "cat" / "empty.jpg").touch()
    process = run_command("trainer.pack", f"--data_dir={data}", f"--output_dir={tmp_path / 'packed'}")
    assert process.returncode == 2
    assert "1 of 6 files are not readable images, more than --max_bad_fraction=0.01" in process.stderr
    assert not (tmp_path / "packed").exists()
