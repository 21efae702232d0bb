"""Pages in a real browser, for tests that look at what a person sees."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NEEDS_BROWSER = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; apt-get install chromium fonts-dejavu-core"),
]


@dataclass
class Visit:
    """A page, and what it complained about or asked the outside for."""

    page: Any
    errors: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)


@contextmanager
def open_browser() -> Iterator[Any]:
    """A headless Chromium; skips the test where Playwright is not installed."""
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield opened
        opened.close()


def visit(browser: Any, allowed: str, width: int, height: int, **options: Any) -> Visit:
    """Open an empty page that notes console errors and requests beyond `allowed`."""
    found = Visit(browser.new_page(viewport={"width": width, "height": height}, **options))
    found.page.on("console", lambda message: found.errors.append(message.text) if message.type == "error" else None)
    found.page.on("pageerror", lambda error: found.errors.append(str(error)))
    found.page.on(
        "request",
        lambda request: (
            None if request.url.startswith((allowed, "data:", f"blob:{allowed}")) else found.outside.append(request.url)
        ),
    )
    return found
