"""The pictures of the page in `models/pictures`, with the embedded SDXL behind it, in this process.

python -m tests.page.screenshots [folder]
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect

from config.catalog import ROOT, Catalog
from deployments.app import AppArgs, bind_components
from deployments.graph import Graph
from deployments.replicas.base import Runtime
from tests.support.bound import run_locally
from tests.support.browser import chromium, serving
from tests.support.ingress import make_app

PROMPTS = {"a penguin in the snow": 4, "a sailboat on a blue background": 6, "a cactus on a yellow background": 5}


def fill(page: Page, prompt: str, seed: int) -> None:
    """A request in the form."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Seed", exact=True).fill(str(seed))


def take(page: Page, name: str, folder: Path) -> None:
    """A JPEG of the window."""
    page.mouse.move(0, 0)
    page.evaluate("scrollTo(0, 0)")
    file = folder / f"{name}.png"
    page.screenshot(path=file)
    Image.open(file).convert("RGB").save(folder / f"{name}.jpg", quality=82, optimize=True)
    file.unlink()


def main(folder: Path) -> None:
    """All of them."""
    catalog = Catalog.load("embedded").only(("SDXL1.0-base", "SD1.5"))
    bound = bind_components(AppArgs(grouping="role"), catalog, Runtime(device="cpu", torch_threads=2))
    app = make_app(graph=Graph(run_locally(bound, "shots")), catalog=catalog, max_pixel_steps=10**9, deadline_s=600)
    with serving(app) as url, chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(600_000)
        page.goto(url)
        page.locator("summary", has_text="File and server").click()
        page.get_by_label("Show the picture in the making").uncheck()
        page.locator("summary", has_text="File and server").click()
        for count, (prompt, seed) in enumerate(PROMPTS.items(), 1):
            fill(page, prompt, seed)
            page.click("#draw")
            expect(page.locator("#pictures li")).to_have_count(count, timeout=600_000)
        take(page, "page", folder)
        page.emulate_media(color_scheme="dark")
        page.set_viewport_size({"width": 360, "height": 740})
        take(page, "page-phone", folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "models" / "pictures")
