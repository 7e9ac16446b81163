"""Pages in headless Chromium, for the tests that look at one."""

import os
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from scripts.make_figures.browser import CHROMIUM

QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
SCREENSHOTS = Path(os.environ.get("MINIMIND_SCREENSHOTS", "out/screenshots"))
LAPTOP = {"viewport": {"width": 1366, "height": 768}, "locale": "en-US", "color_scheme": "light"}
PHONE = {"viewport": {"width": 390, "height": 844}, "locale": "zh-CN", "color_scheme": "dark"}
PHONE |= {"device_scale_factor": 2, "is_mobile": True, "has_touch": True}
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no chromium here: apt-get install chromium")


def wait_until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@contextmanager
def browser_at(address, **device):
    """A page in Chromium that has loaded the address, and has asked nobody else for anything. `page.console`: what it
    wrote there, errors too."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_context(**device).new_page()
        page.set_default_timeout(60_000)
        requests, page.console = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: page.console.append(message.text))
        page.on("pageerror", lambda error: page.console.append(str(error)))
        page.goto(address)
        page.wait_for_selector("textarea")
        yield page
        foreign = [url for url in requests if not url.startswith((address, "data:", "blob:"))]
        browser.close()
        assert not foreign


def screenshot(page, name, folder=SCREENSHOTS):
    folder.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(400)  # the page moves softly
    page.screenshot(path=folder / f"{name}.png")
