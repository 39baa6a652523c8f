"""Makes the pictures of README.md anew from a real run: docs/images/report.png and served.png.

python docs/screenshots.py

Trains the demo (three minutes on two cores), opens its report and the page of its server in headless Chromium.
"""

import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
sys.path.insert(0, str(ROOT / "tests"))

import browser  # noqa: E402
from playwright.sync_api import Browser  # noqa: E402
from test_serve import Server  # noqa: E402

WIDTH = 1000  # pixels


def photograph_report(chromium: Browser, job_dir: pathlib.Path, directory: pathlib.Path) -> None:
    """Leaves report.png: the head of the page, down to the curves."""
    with browser.opened(chromium, job_dir / "report" / "index.html", width=WIDTH) as page:
        browser.assert_pictures_are_loaded(page, at_least=2)
        end_of_curves = page.locator("#curves").bounding_box()
        height = end_of_curves["y"] + end_of_curves["height"]
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": height}
        page.screenshot(path=directory / "report.png", full_page=True, clip=clip)


def photograph_server(chromium: Browser, job_dir: pathlib.Path, directory: pathlib.Path) -> None:
    """Leaves served.png: the page of trainer.serve with a picture of each class dropped on it."""
    server = Server(f"--model_dir={job_dir}/saved_model", "--port={port}")
    try:
        server.wait_until_ready()
        pictures = [next(folder.glob("*.jpg")) for folder in sorted((job_dir / "demo_pictures").glob("*/"))]
        with browser.opened(chromium, f"http://127.0.0.1:{server.port}", width=WIDTH) as page:
            page.set_input_files("#files", [str(path) for path in pictures])
            for number in range(len(pictures)):
                page.locator("#cards .answer ol").nth(number).wait_for()
            page.locator("main").screenshot(path=directory / "served.png")
    finally:
        server.end()


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, browser.launched() as started:
        demo_job = pathlib.Path(temporary, "job")
        flags = ["--flagfile=deploy/flags/demo.flags", f"--job_dir={demo_job}"]
        subprocess.run([sys.executable, "-m", "trainer.task", *flags], cwd=ROOT, check=True)
        photograph_report(started, demo_job, IMAGES)
        photograph_server(started, demo_job, IMAGES)
