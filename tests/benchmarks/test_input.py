"""Suite `input`: the pipelines read every image, and the large images are made from the given ones."""

import pytest
from PIL import Image

from tests.support.images import write_images
from trainer.benchmarks import input as input_benchmark
from trainer.data import listing


def test_large_images_are_a_few_files_and_links_to_them(tmp_path, monkeypatch):
    monkeypatch.setattr(input_benchmark, "DISTINCT_LARGE_IMAGES", 1)
    source = write_images(tmp_path / "images", {"a": 1}) / "a" / "a_000.jpg"
    input_benchmark.write_large_images([str(source)], str(tmp_path / "large"), 3)
    paths = sorted((tmp_path / "large").rglob("*.jpg"))
    assert [str(path.relative_to(tmp_path / "large")) for path in paths] == ["a/0.jpg", "a/2.jpg", "b/1.jpg"]
    assert [path.is_symlink() for path in paths] == [False, True, True]
    for path in paths:
        with Image.open(path) as image:
            assert image.size == (4000, 3000)


@pytest.mark.slow
def test_every_pipeline_reads_every_image(tmp_path):
    images = write_images(tmp_path / "images", {"a": 20, "b": 20})
    paths = listing.list_files(str(images)).paths
    large_dir = write_images(tmp_path / "large", {"a": 1, "b": 1})  # exists: no large images are made
    original, large = input_benchmark.input_suites(
        str(images), paths, str(large_dir), image_size=32, num_large_images=2
    )
    for suite in (original, large):
        for baseline in suite.baselines:
            metrics = baseline.measure()  # raises if images are missing
            assert min(metrics[name] for name in ("images_per_second", "cpu_seconds_per_1000")) > 0, baseline.name
