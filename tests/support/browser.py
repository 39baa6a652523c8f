"""Pages in headless Chromium, with checks of loading, layout and contrast.

The fixture `chromium` of conftest.py is the browser. To take a screenshot:

    with browser.opened(chromium, "page.html", width=390, color_scheme="dark") as page:
        page.screenshot(path="page.png", full_page=True)
"""

import contextlib
import pathlib
import shutil
from collections.abc import Iterator

import pytest
from playwright import sync_api

ARGUMENTS = [
    "--no-sandbox",  # the sandbox does not start as root or in a container without user namespaces
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@contextlib.contextmanager
def launched() -> Iterator[sync_api.Browser]:
    """The installed Chromium with an empty profile; skips the test if there is none."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield chromium
        chromium.close()


@contextlib.contextmanager
def opened(
    chromium: sync_api.Browser,
    address: str | pathlib.Path,
    *,
    width: int = 1100,
    color_scheme: str = "light",
    media: str = "screen",
) -> Iterator[sync_api.Page]:
    """A page in a new tab, loaded; `address` is a file or an http:// URL.

    When the block ends, fails if the page logged an error or a warning, raised an error, or requested another host.
    """
    url = address if "://" in str(address) else pathlib.Path(address).absolute().as_uri()
    origin, problems = "/".join(url.split("/")[:3]), []

    def on_console(message: sync_api.ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            problems.append(message.text)

    def on_request(request: sync_api.Request) -> None:
        if not request.url.startswith(("data:", "blob:", origin)):
            problems.append(request.url)

    page = chromium.new_page(viewport={"width": width, "height": 844}, color_scheme=color_scheme)
    try:
        page.emulate_media(media=media, color_scheme=color_scheme)
        page.on("console", on_console)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("requestfailed", lambda request: problems.append(f"not loaded: {request.url[:200]}"))
        page.on("request", on_request)
        page.goto(url)
        yield page
        assert not problems
    finally:
        page.close()


def assert_nothing_overflows(page: sync_api.Page) -> None:
    """Fails if the page is wider than its window, and names the elements; an element with its own scroll bar may be."""
    overflowing = page.evaluate(
        """() => {
          const width = document.documentElement.clientWidth;
          if (document.documentElement.scrollWidth <= width) return [];
          const elements = [...document.body.querySelectorAll("*")];
          const wide = elements.filter(e => e.getBoundingClientRect().right > width + 1);
          return wide.map(e => [e.tagName, e.className, e.getBoundingClientRect().right, e.textContent.slice(0, 40)]);
        }"""
    )
    assert not overflowing
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def assert_images_are_loaded(page: sync_api.Page, *, at_least: int) -> None:
    """Fails if an image of the page has no pixels, or the page has fewer than `at_least` images."""
    page.evaluate("Promise.allSettled([...document.images].map(image => image.decode()))")
    images = page.evaluate("[...document.images].map(i => [i.alt, i.complete && i.naturalWidth > 0])")
    assert [name for name, is_loaded in images if not is_loaded] == []
    assert len(images) >= at_least


def contrast(page: sync_api.Page, selector: str) -> float:
    """The contrast ratio of an element's text to its background, 1 to 21; WCAG 2 requires 4.5."""
    return page.evaluate(
        """selector => {
          const element = document.querySelector(selector);
          const rgb = text => {  // "rgb(1, 2, 3)", or "color(srgb .1 .2 .3 / 1)" where colors are mixed
            const numbers = text.match(/[\\d.]+/g).map(Number);
            return text.startsWith("color") ? numbers.map((v, i) => i < 3 ? 255 * v : v) : numbers;
          };
          const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
            .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
          let behind = element;
          while (rgb(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
          const [low, high] = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor]
            .map(text => luminance(rgb(text))).sort((a, b) => a - b);
          return (high + .05) / (low + .05);
        }""",
        selector,
    )
