"""Pages in real headless Chromium: opened, looked over, and what went wrong told. Not a test itself.

The fixture `chromium` of conftest.py is the browser. For looking at pages oneself:

    with browser.opened(chromium, "page.html", width=390, color_scheme="dark") as page:
        page.screenshot(path="page.png", full_page=True)
"""

import contextlib
import pathlib
import shutil
from collections.abc import Iterator

import pytest
from playwright import sync_api

# As root, and in a container without user namespaces, Chromium's own sandbox cannot start; the pages are our own.
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run"),
]


@contextlib.contextmanager
def launched() -> Iterator[sync_api.Browser]:
    """The Chromium that is installed, with a new empty profile; skips the test, with the reason, where there is none."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield started
        started.close()


@contextlib.contextmanager
def opened(
    chromium: sync_api.Browser,
    address: str | pathlib.Path,
    *,
    width: int = 1100,
    color_scheme: str = "light",
    media: str = "screen",
) -> Iterator[sync_api.Page]:
    """A page in a tab of its own, loaded; `address` is a file or an http:// address.

    When the block ends, fails if the page logged an error or a warning, raised one, or asked for anything elsewhere.
    """
    url = address if "://" in str(address) else pathlib.Path(address).absolute().as_uri()
    home, wrong = "/".join(url.split("/")[:3]), []
    page = chromium.new_page(viewport={"width": width, "height": 844}, color_scheme=color_scheme)
    try:
        page.emulate_media(media=media, color_scheme=color_scheme)
        page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(f"not loaded: {request.url[:200]}"))
        page.on(
            "request", lambda request: request.url.startswith(("data:", "blob:", home)) or wrong.append(request.url)
        )
        page.goto(url)
        yield page
        assert not wrong
    finally:
        page.close()


def assert_nothing_sticks_out(page: sync_api.Page) -> None:
    """Fails if the page is wider than its window, naming the elements that stick out; what scrolls by itself may."""
    sticking_out = page.evaluate(
        """() => {
          const width = document.documentElement.clientWidth;
          if (document.documentElement.scrollWidth <= width) return [];
          const wide = [...document.body.querySelectorAll("*")].filter(e => e.getBoundingClientRect().right > width + 1);
          return wide.map(e => `${e.tagName} ${e.className} ${e.getBoundingClientRect().right}: ${e.textContent.slice(0, 40)}`);
        }"""
    )
    assert not sticking_out
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def assert_pictures_are_loaded(page: sync_api.Page, *, at_least: int) -> None:
    """Fails if one of the page's pictures has no pixels, or there are fewer than `at_least`."""
    page.evaluate("Promise.allSettled([...document.images].map(image => image.decode()))")
    images = page.evaluate("[...document.images].map(i => [i.alt, i.complete && i.naturalWidth > 0])")
    assert [name for name, is_loaded in images if not is_loaded] == []
    assert len(images) >= at_least


def contrast(page: sync_api.Page, selector: str) -> float:
    """The contrast of an element's text to what lies behind it, 1 to 21, as WCAG 2 defines it; 4.5 can be read."""
    return page.evaluate(
        """selector => {
          const element = document.querySelector(selector);
          const rgb = text => {  // "rgb(1, 2, 3)", or "color(srgb .1 .2 .3 / 1)" where colours are mixed
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
