"""What the page shows and says: keys, errors, waiting, keyboard, screens, colours. Nothing is drawn here."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Page, expect

from config.catalog import Catalog
from deployments.graph import Progress, Sealed
from deployments.telemetry.stages import Timed
from pipelines.errors import OverloadedError
from pipelines.pictures.images import EncodedImage, write_image
from tests.page.conftest import OpenPage
from tests.support.browser import serving
from tests.support.graph import FakeGraph
from tests.support.http import PATH
from tests.support.ingress import make_app

FILE = write_image(Image.new("RGB", (64, 64), "teal"), "jpeg")


async def decode(**_: Any) -> Timed[EncodedImage]:
    return Timed(FILE, ())


class Waiting(FakeGraph):
    """Draws at once; after `go_on.clear()` it waits behind two others. May then be overloaded."""

    def __init__(self) -> None:
        super().__init__(denoise_watched=self._stage, decode=decode)
        self.go_on = threading.Event()
        self.go_on.set()
        self.overloaded = False

    async def _stage(self, **_: Any) -> AsyncGenerator[Any, None]:
        yield Progress("unet-sd15", 0, 0, position=2)
        await asyncio.to_thread(self.go_on.wait)
        if self.overloaded:
            raise OverloadedError(7)
        yield Progress("unet-sd15", 1, 1)
        yield Sealed(b"")


@pytest.fixture(scope="module")
def graph() -> Waiting:
    return Waiting()


@pytest.fixture(scope="module")
def url(graph: Waiting, catalog: Catalog) -> Iterator[str]:
    with serving(make_app(graph=graph, catalog=catalog)) as address:
        yield address


def group(page: Page, title: str) -> None:
    page.locator("summary", has_text=title).click()


def open_everything(page: Page) -> None:
    page.get_by_label("Model").select_option("SD1.5-ControlNet")
    for details in page.locator("#settings, #groups details").all():
        details.evaluate("element => element.open = true")


def test_a_key_is_asked_for_and_a_wrong_one_said_to_be_wrong(
    open_page: OpenPage, graph: Waiting, catalog: Catalog, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"me {hashlib.sha256(b'secret').hexdigest()}\n")
    keys.chmod(0o600)
    with serving(make_app(graph=graph, catalog=catalog, keys_file=keys)) as address:
        page = open_page(address, form=False)
        asked, key = page.locator("#key-dialog"), page.locator("#key")
        expect(asked).to_contain_text("This server asks for a key")
        key.fill("guess")
        key.press("Enter")
        expect(asked).to_contain_text("The server did not accept this key")
        key.fill("secret")
        key.press("Enter")
        expect(asked).to_be_hidden()
        page.get_by_label("Prompt", exact=True).fill("a cat")
        with page.expect_request(f"**{PATH}") as sent:
            page.click("#draw")
        assert sent.value.headers["authorization"] == "Bearer secret"
        expect(page.locator("#announced")).to_have_text("The picture is done")
        page.get_by_role("button", name="Code").first.click()
        assert "secret" not in str(page.locator("#code").text_content())
        assert "$SDGRAPH_KEY" in str(page.locator("#code").text_content())
        page.keyboard.press("Escape")
        assert page.evaluate("[sessionStorage.length, Object.values(localStorage).includes('secret')]") == [1, False]

        page.get_by_role("button", name="Key").click()
        page.get_by_label("Remember it").check()
        key.press("Enter")
        assert page.evaluate("[sessionStorage.length, Object.values(localStorage).includes('secret')]") == [0, True]
        keys.write_text(f"me {hashlib.sha256(b'other').hexdigest()}\n")
        page.reload()  # the server looks at its file once a second
        while httpx.get(f"{address}/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200:
            page.wait_for_timeout(50)
        page.reload()
        expect(asked).to_contain_text("The server did not accept this key")


def test_an_error_is_said_in_words_and_marks_its_field(open_page: OpenPage, url: str) -> None:
    page = open_page(url)
    problem, prompt = page.locator("#problem"), page.get_by_label("Prompt", exact=True)
    page.click("#draw")
    expect(problem).to_have_text("Say what the picture should show.")
    expect(prompt).to_be_focused()
    assert prompt.get_attribute("aria-invalid") == "true"
    prompt.fill("a cat")
    group(page, "Reading the prompt")
    page.get_by_label("Clip skip").fill("99")
    group(page, "Reading the prompt")
    page.click("#draw")
    skip = page.get_by_label("Clip skip")
    expect(skip).to_be_focused()
    assert problem.text_content() == skip.evaluate("element => element.validationMessage")
    skip.fill("")
    page.get_by_label("Size").select_option("own")
    width = page.get_by_label("Width")
    width.fill("130")
    page.click("#draw")
    expect(width).to_be_focused()
    expect(problem).to_contain_text("width")
    assert skip.get_attribute("aria-invalid") is None
    said = page.locator(f"#{width.get_attribute('aria-errormessage')}")
    expect(said).to_have_text(str(problem.text_content()))
    page.get_by_label("Size").select_option("")
    page.click("#draw")
    expect(page.locator("#announced")).to_have_text("The picture is done")
    expect(problem).to_be_hidden()


def test_waiting_and_an_overloaded_server_are_told(open_page: OpenPage, url: str, graph: Waiting) -> None:
    page = open_page(url)
    page.get_by_label("Prompt", exact=True).fill("a cat")
    graph.go_on.clear()
    graph.overloaded = True
    page.click("#draw")
    expect(page.locator("#told")).to_have_text("Waiting, 2 before yours")
    graph.go_on.set()
    expect(page.locator("#problem")).to_contain_text("the queue is too long")
    graph.overloaded = False
    page.click("#draw")
    expect(page.locator("#problem")).to_be_hidden()
    expect(page.locator("#announced")).to_have_text("The picture is done")


def test_an_example_is_drawn_with_the_settings_as_they_are(open_page: OpenPage, url: str) -> None:
    page = open_page(url)
    page.get_by_label("Model").select_option("SD1.5")
    page.get_by_label("Steps", exact=True).first.fill("4")
    with page.expect_request(f"**{PATH}") as sent:
        page.get_by_role("button", name="a penguin in the snow").click()
    body = sent.value.post_data_json
    assert (body["model_name"], body["prompt"], body["steps"]) == ("SD1.5", "a penguin in the snow", 4)
    expect(page.locator("#announced")).to_have_text("The picture is done")


def test_a_server_that_is_gone_is_told(open_page: OpenPage, graph: Waiting, catalog: Catalog) -> None:
    with serving(make_app(graph=graph, catalog=catalog)) as address:
        page = open_page(address)
        expect(page.locator("#server")).to_have_text("Ready")
    page.get_by_label("Prompt", exact=True).fill("a cat")
    page.route(f"**{PATH}", lambda route: route.abort("connectionrefused"))
    page.click("#draw")
    expect(page.locator("#problem")).to_contain_text("cannot be reached")


def test_every_field_of_the_request_has_a_control(open_page: OpenPage, url: str) -> None:
    schemas = httpx.get(f"{url}/openapi.json").json()["components"]["schemas"]
    fields = set(schemas["GenerationRequest"]["properties"])
    page = open_page(url)
    page.get_by_label("Model").select_option("SDXL-ControlNet")
    made = page.evaluate("[...document.querySelectorAll('#form [id]')].map(({id}) => id.replace(/-\\d+$/, ''))")
    elsewhere = {"stream", "mask_image", "loras", "width", "height"}
    elsewhere |= {"controlnet_name", "controlnet_image", "controlnet_preprocess"}  # one of `controlnets`
    assert fields - elsewhere - set(made) == set()
    for label in ("Add a LoRA", "Width", "Height"):
        expect(page.get_by_label(label, exact=True)).to_have_count(1)
    assert page.locator("summary", has_text="More").count() == 0 or page.locator("summary", has_text="More").is_hidden()


def test_everything_is_reached_by_keyboard(open_page: OpenPage, url: str) -> None:
    page = open_page(url)
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    order = []
    for _ in range(40):
        page.keyboard.press("Tab")
        label = "document.activeElement.labels?.[0]?.textContent ?? document.activeElement.textContent"
        order.append(str(page.evaluate(label)).strip())
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", f"the focus on {order[-1]!r} cannot be seen"
        if order[-1] == "Code":
            break
    wanted = ["Negative prompt", "Model", "Style", "Size", "Steps", "Guidance", "Seed", "LoRAs", "Sampling", "Draw"]
    assert [name for name in order if name in wanted] == wanted


def test_colours_follow_the_system_and_axe_finds_nothing(open_page: OpenPage, url: str) -> None:
    page = open_page(url)
    page.get_by_label("Prompt", exact=True).fill("a cat")
    page.click("#draw")
    expect(page.locator(".facts")).to_contain_text("64 × 64")
    open_everything(page)
    backgrounds = {}
    for colours in ("light", "dark"):
        page.emulate_media(color_scheme=colours)
        backgrounds[colours] = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
    assert int(backgrounds["dark"]) < 40
    assert int(backgrounds["light"]) > 240


def test_a_phone_shows_all_without_scrolling_sideways(open_page: OpenPage, url: str) -> None:
    page = open_page(url, form=False)
    page.set_viewport_size({"width": 360, "height": 740})
    page.reload()
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.fill("a cat")
    expect(page.get_by_label("Guidance", exact=True)).to_be_hidden()
    wide = "document.documentElement.scrollWidth"
    assert page.evaluate(wide) == 360
    prompt.press("Control+Enter")
    expect(page.locator(".facts")).to_contain_text("64 × 64")
    expect(page.locator(".tile")).to_be_in_viewport()
    open_everything(page)
    page.locator("input[type=file]").first.set_input_files({"name": "x", "mimeType": "image/jpeg", "buffer": FILE.data})
    assert page.evaluate(wide) == 360
    page.get_by_role("button", name="Paint a mask").click()
    page.locator("#mask-dialog").wait_for()
    box = page.locator("#canvas canvas").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
