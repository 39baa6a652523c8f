"""In Chromium, every page loads, fits its window and is readable, whatever the names in it."""

import shutil

import pytest
from playwright import sync_api

from tests.support import browser
from tests.support.images import write_images
from tests.support.processes import run_command
from tests.support.written_job import CLASSES, make_job_dir, write_many_classes
from trainer.reporting import html, report

pytestmark = pytest.mark.slow

LOOKS = [(1100, "light", "screen"), (390, "light", "screen"), (390, "dark", "screen"), (794, "light", "print")]


@pytest.fixture(scope="module")
def report_page(tmp_path_factory):
    job_dir = make_job_dir(tmp_path_factory.mktemp("report"), explained=True, timed=True)
    report.write(str(job_dir))
    return job_dir / "report" / "index.html"


@pytest.fixture(scope="module")
def inspection_page(tmp_path_factory):
    root = tmp_path_factory.mktemp("inspection")
    data = write_images(root / "data & <i>more", {CLASSES[3]: 12, "<b>bird": 2}, size=100)
    (data / "<b>bird" / '<img src="x">.jpg').write_text("not an image")
    shutil.copy(data / CLASSES[3] / f"{CLASSES[3]}_000.jpg", data / "<b>bird" / "copy.jpg")
    result = run_command("trainer.inspect_data", f"--data_dir={data}", f"--output_dir={root / 'output'}")
    assert result.returncode == 0, result.stderr
    return root / "output" / "inspect.html"


@pytest.mark.parametrize(("width", "color_scheme", "media"), LOOKS)
def test_the_report_is_readable_on_every_medium(chromium, report_page, width, color_scheme, media):
    with browser.opened(chromium, report_page, width=width, color_scheme=color_scheme, media=media) as page:
        browser.assert_nothing_overflows(page)
        browser.assert_images_are_loaded(page, at_least=20)
        for selector in ("h1", ".verdict p", ".eyebrow", "#flags th", ".wrong", ".matrix td.true", "nav a", "pre"):
            assert browser.contrast(page, selector) > 4.5, selector
        is_dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(246, 247, 249)"
        assert is_dark == (color_scheme == "dark" or media == "print")


@pytest.mark.parametrize(("width", "color_scheme", "media"), LOOKS)
def test_the_inspection_is_readable_on_every_medium(chromium, inspection_page, width, color_scheme, media):
    with browser.opened(chromium, inspection_page, width=width, color_scheme=color_scheme, media=media) as page:
        browser.assert_nothing_overflows(page)
        browser.assert_images_are_loaded(page, at_least=2)
        for selector in ("h1", ".problem li", "th", "figcaption"):
            assert browser.contrast(page, selector) > 4.5, selector


def test_markup_in_names_is_shown_as_text(chromium, report_page, inspection_page):
    with browser.opened(chromium, report_page) as page:
        text = page.locator("body").inner_text()
        for name in (*CLASSES[:3], "shapes & <b>sizes", "not a <picture>", "CPU without <bf16>", '"name".jpg'):
            assert name in text
        assert page.locator("body b b, bf16, picture").count() == 0
        assert page.locator("script").count() == 1
    with browser.opened(chromium, inspection_page) as page:
        text = page.locator("body").inner_text()
        for name in ("data & <i>more", "<b>bird", '<img src="x">.jpg'):
            assert name in text
        assert page.locator("i").count() == 0


def test_heat_maps_cover_their_images_and_can_be_hidden(chromium, report_page):
    with browser.opened(chromium, report_page, width=390) as page:
        boxes = page.evaluate(
            """[...document.querySelectorAll('.shot')].map(shot => [...shot.querySelectorAll('img')].map(image => {
                const box = image.getBoundingClientRect();
                return [box.left, box.top, box.width, box.height, image.naturalWidth / image.naturalHeight];
            }))"""
        )
        assert len(boxes) == 10
        for image, heat in boxes:
            assert heat == pytest.approx(image, abs=0.02 * image[2])
        assert page.locator(".heat").first.is_visible()
        colors = page.locator(".heat-legend i").evaluate("element => getComputedStyle(element).backgroundImage")
        assert all(f"rgb{color}" in colors for color in html.HEAT_COLORS)
        page.get_by_label("Show the Grad-CAM heat maps").uncheck()
        assert not page.locator(".heat").first.is_visible()


def test_a_code_block_can_be_copied_and_says_that_it_scrolls(chromium, report_page):
    with browser.opened(chromium, report_page, width=390) as page:
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.locator(".code button").first.click()
        sync_api.expect(page.locator(".code button").first).to_have_text("Copied")
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied == f"python -m trainer.predict --model_dir={report_page.parents[1]}/saved_model IMAGE"
        boxes = "[...document.querySelectorAll('.fit, .scroll, pre')].filter(box => box.clientWidth)"
        scrolling, hints = page.evaluate(
            f"""() => [{boxes}.map(box => box.scrollWidth > box.clientWidth + 1),
                       {boxes}.map(box => !(box.closest(".code") ?? box).previousElementSibling.hidden)]"""
        )
        assert scrolling == hints
        assert {True, False} == {*scrolling}


def test_the_names_of_four_classes_are_not_cut_on_a_phone(chromium, tmp_path):
    job_dir, names = make_job_dir(tmp_path), ["golden retriever", "siamese cat", "african elephant", "zebra"]
    text = (job_dir / "predictions.csv").read_text("utf-8")
    for name, shown in zip(CLASSES, names, strict=True):
        text = text.replace(f",{name},", f",{shown},").replace(f",{name},", f",{shown},")
    (job_dir / "predictions.csv").write_text(text, "utf-8")
    (job_dir / "labels.txt").write_text("".join(f"{name}\n" for name in names))
    report.write(str(job_dir), only_page=True)
    with browser.opened(chromium, job_dir / "report" / "index.html", width=390) as page:
        assert page.locator(".matrix thead bdi").all_inner_texts() == names
        cut = page.evaluate(
            """() => {
              const box = document.querySelector(".fit").getBoundingClientRect();
              const names = [...document.querySelectorAll(".matrix bdi")];
              return names.filter(name => name.getBoundingClientRect().right > box.right).map(name => name.textContent);
            }"""
        )
        assert cut == []
        browser.assert_nothing_overflows(page)


def test_a_report_of_1000_classes_opens_and_fits(chromium, tmp_path):
    job_dir = make_job_dir(tmp_path)
    write_many_classes(job_dir, 1000)
    report.write(str(job_dir), only_page=True)
    with browser.opened(chromium, job_dir / "report" / "index.html", width=390, color_scheme="dark") as page:
        browser.assert_nothing_overflows(page)
        assert page.locator("#confusion svg image").first.bounding_box()["width"] > 150
        assert page.locator("#classes tbody tr").count() == 100


def test_the_page_of_a_running_job_reloads_itself(chromium, tmp_path):
    job_dir = make_job_dir(tmp_path, with_predictions=False, finished=False)
    report.write(str(job_dir), only_page=True)
    with browser.opened(chromium, job_dir / "report" / "index.html") as page:
        assert page.locator("meta[http-equiv=refresh]").get_attribute("content") == "30"
        assert "Training run in progress: 4 of 5 epochs done" in page.locator("body").inner_text()
