"""Pages as pictures, taken in headless Chromium."""

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def shooting() -> Iterator[Callable]:
    """Gives `shoot`; Chromium starts with the first picture and ends with the block."""
    with ExitStack() as stack:
        started = []

        def shoot(address="", html="", width=700, height=None, scale=1.6, act=None, **options):
            """A picture of a page, `width` CSS pixels wide and `height` high, or as high as the page is.

            address: a URL; html: a whole page instead; act: called with the page before the picture is taken;
            options: of a context of Playwright, such as locale and color_scheme.
            """
            from PIL import Image

            if not started:
                from playwright.sync_api import sync_playwright  # of requirements-dev.txt

                browser = stack.enter_context(sync_playwright()).chromium.launch(executable_path=CHROMIUM)
                stack.callback(browser.close)
                started.append(browser)
            size = {"width": width, "height": height or 100}
            context = started[0].new_context(viewport=size, device_scale_factor=scale, offline=True, **options)
            page = context.new_page()
            page.set_default_timeout(120_000)
            if html:
                page.set_content(html)
            else:
                page.goto(address)
            if act:
                act(page)
            shot = page.screenshot(full_page=height is None)
            context.close()
            return Image.open(io.BytesIO(shot)).convert("RGB")

        yield shoot
