"""docs/notebook.ipynb runs from its first cell to its last, in a kernel, as a reader runs it."""

import os

import pytest

from tests.support.paths import ROOT, WEIGHTS

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install '.[dev]'")
pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install '.[dev]'")
import nbformat  # noqa: E402


@pytest.mark.slow
def test_the_notebook_runs(shared, tmp_path, monkeypatch):
    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    # The weights of Keras cannot be downloaded everywhere; small images take less time.
    parameters.source = f"flags = {{'weights': {str(WEIGHTS)!r}, 'image_size': 64}}"
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    directory = tmp_path / "notebook"
    directory.mkdir()
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(directory)}}
    ).execute()
    outputs = {cell.source.splitlines()[0]: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    streams = outputs['result = trainer.train(data_dir="pictures", job_dir="job", **flags)']
    assert {output.name for output in streams} == {"stderr"}
    progress = "".join(output.text for output in streams)
    assert "val_accuracy" in progress  # from the thread that trains, in the cell that started it
    (report,) = outputs["result.report"]
    assert report.data["text/html"].startswith("<iframe srcdoc=")
    (mistake,) = outputs["try:"]
    assert mistake.text == "Unknown command line flag 'epoch'. Did you mean: epochs ?\n"
    (prediction,) = outputs["result.classifier.predict(image)"]
    assert "label='star'" in prediction.data["text/plain"]
    assert {path.name for path in directory.iterdir()} == {"pictures", "unseen", "job", "evaluation"}
