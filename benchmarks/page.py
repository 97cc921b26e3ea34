"""Bytes and requests that a browser needs to show the page at `/`, on the first and on a later visit.

    python -m benchmarks.page

The server is the whole application over the embedded catalog, without models; the browser is Debian's chromium. Bytes
are those of the browser's own count of what came over the network, headers included (CDP's `encodedDataLength`).
"""

from __future__ import annotations

import json

from playwright.sync_api import BrowserContext

from config.catalog import Catalog
from tests.support.browser import chromium, serving
from tests.support.graph import FakeGraph
from tests.support.ingress import make_app


def load(context: BrowserContext, url: str) -> dict[str, int]:
    """Open the page and wait until its form is there."""
    page = context.new_page()
    devtools = context.new_cdp_session(page)
    devtools.send("Network.enable")
    received: list[float] = []
    devtools.on("Network.loadingFinished", lambda event: received.append(event["encodedDataLength"]))
    page.goto(url)
    page.get_by_label("Prompt", exact=True).wait_for()
    page.wait_for_load_state("networkidle")
    page.close()
    fetched = [size for size in received if size]
    return {"requests": len(fetched), "bytes": round(sum(fetched))}


def main() -> dict[str, dict[str, int]]:
    """Both visits."""
    catalog = Catalog.load("embedded")
    with serving(make_app(graph=FakeGraph(), catalog=catalog)) as url, chromium() as browser:
        context = browser.new_context()
        return {"first visit": load(context, url), "second visit": load(context, url)}


if __name__ == "__main__":
    print(json.dumps(main(), indent=2))
