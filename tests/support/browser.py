"""The system's Chromium, and an application that it can reach."""

from __future__ import annotations

import asyncio
import shutil
import socket
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import uvicorn
from playwright.sync_api import Browser, Page, sync_playwright
from starlette.types import ASGIApp

from deployments.graph import Graph
from tests.support.graph import FakeGraph

CHROMIUM = shutil.which("chromium")


@contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """The application on a free port of this machine, in a thread; its address."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser, without a window."""
    with sync_playwright() as playwright:
        # Its sandbox needs privileges that containers do not give, and it meets no page but ours.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def complaints(page: Page) -> list[str]:
    """Grows by what a page does wrong: exceptions, and what its Content-Security-Policy forbids."""
    found: list[str] = []
    page.on("pageerror", lambda error: found.append(str(error)))
    # Requests that were refused or did not arrive are logged as errors too; those are the tests' own doing.
    page.on(
        "console",
        lambda told: (
            found.append(told.text) if told.type == "error" and "Failed to load resource" not in told.text else None
        ),
    )
    return found


class PausedGraph(FakeGraph):
    """Draws as `inner` does, but a watched stage waits after its first step until `go_on` is set."""

    def __init__(self, inner: Graph) -> None:
        super().__init__(inner, denoise_watched=self._paused)
        self._watched = inner
        self.go_on = threading.Event()
        self.ended = threading.Event()
        """A watched stage has ended, in whatever way."""

    async def _paused(self, **arguments: Any) -> AsyncGenerator[Any, None]:
        self.ended.clear()
        try:
            async with aclosing(self._watched.denoise_watched(**arguments)) as items:
                async for item in items:
                    yield item
                    if getattr(item, "step", 0) == 1:
                        await asyncio.to_thread(self.go_on.wait)
        finally:
            self.ended.set()
