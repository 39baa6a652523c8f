"""Creates the screenshots of README.md from a real run: docs/images/report.png and docs/images/served.png.

    python docs/screenshots.py

Trains the demo (three minutes on two cores), then opens its report and the page of trainer.serve in headless Chromium.
"""

import pathlib
import subprocess
import sys
import tempfile

from playwright.sync_api import Browser

ROOT = pathlib.Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
WIDTH = 1000  # pixels
sys.path.insert(0, str(ROOT))

from tests.support import browser  # noqa: E402
from tests.support.server import Server  # noqa: E402
from trainer.artifacts.job_dir import JobDir  # noqa: E402


def capture_report(chromium: Browser, job_dir: JobDir, path: pathlib.Path) -> None:
    """Writes a screenshot of the report, from its top to the end of the curves."""
    with browser.opened(chromium, job_dir.report_page, width=WIDTH) as page:
        browser.assert_images_are_loaded(page, at_least=2)
        curves = page.locator("#curves").bounding_box()
        assert curves  # None if the element is hidden
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": curves["y"] + curves["height"]}
        page.screenshot(path=path, full_page=True, clip=clip)


def capture_server(chromium: Browser, job_dir: JobDir, path: pathlib.Path) -> None:
    """Writes a screenshot of the page of trainer.serve with the predictions for one image of each class."""
    server = Server(f"--model_dir={job_dir.saved_model}", "--port={port}")
    try:
        server.wait_until_ready()
        images = [next(folder.glob("*.jpg")) for folder in sorted(pathlib.Path(job_dir.demo_images).glob("*/"))]
        with browser.opened(chromium, f"http://127.0.0.1:{server.port}", width=WIDTH) as page:
            page.set_input_files("#files", images)
            for number in range(len(images)):
                page.locator("#cards .answer ol").nth(number).wait_for()
            page.locator("main").screenshot(path=path)
    finally:
        server.stop()


def main() -> None:
    """Trains the demo in a temporary folder and captures both pages."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as job_dir, browser.launched() as chromium:
        flags = ["--flagfile=deploy/flags/demo.flags", f"--job_dir={job_dir}"]
        subprocess.run([sys.executable, "-m", "trainer.task", *flags], cwd=ROOT, check=True)
        capture_report(chromium, JobDir(job_dir), IMAGES / "report.png")
        capture_server(chromium, JobDir(job_dir), IMAGES / "served.png")


if __name__ == "__main__":
    main()
