"""The page in a real browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.support.browser import CHROMIUM, chromium, complaints

OpenPage = Callable[..., Page]
PATIENCE_MS = 120_000
"""Only the limit of a failed wait: every wait ends with its event."""
expect.set_options(timeout=PATIENCE_MS)


# Of a module: playwright's event loop runs in this thread until it is closed, and other modules have loops of theirs.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium")
    with chromium() as opened:
        yield opened


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Open an address in a browser without storage and wait for the form; errors in the page fail the test."""
    opened: list[tuple[Page, list[str]]] = []

    def open_(url: str, form: bool = True, **options: Any) -> Page:
        page = browser.new_context(viewport={"width": 1280, "height": 800}, **options).new_page()
        page.set_default_timeout(PATIENCE_MS)
        opened.append((page, complaints(page)))
        page.goto(url)
        if form:
            page.get_by_label("Prompt", exact=True).wait_for()
        return page

    yield open_
    for page, wrong in opened:
        page.context.close()
        assert wrong == []
