"""Drawing on the page, with tiny models behind it."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import playwright
import pytest
from PIL import Image, PngImagePlugin
from playwright.sync_api import Page, expect

from config.catalog import Catalog
from deployments.app import AppArgs, bind_components
from deployments.graph import Graph
from deployments.replicas.base import Runtime
from tests.page.conftest import OpenPage
from tests.support.bound import run_locally
from tests.support.browser import PausedGraph, serving
from tests.support.http import PATH, photo, pixels
from tests.support.ingress import make_app

MODELS = ("SD1.5", "SD1.5-ControlNet")
LIMITS: dict[str, Any] = {"max_body_bytes": 2**23, "max_image_pixels": 10**6}


@pytest.fixture(scope="module")
def few(catalog: Catalog) -> Catalog:
    return catalog.only(MODELS)


@pytest.fixture(scope="module")
def graph(few: Catalog) -> Graph:
    bound = bind_components(AppArgs(grouping="role"), few, Runtime(device="cpu", torch_threads=1))
    return Graph(run_locally(bound, "page"))


@pytest.fixture(scope="module")
def url(graph: Graph, few: Catalog) -> Iterator[str]:
    with serving(make_app(graph=graph, catalog=few, **LIMITS)) as address:
        yield address


@pytest.fixture
def paused(graph: Graph, few: Catalog) -> Iterator[tuple[str, PausedGraph]]:
    """An address where pictures wait after their first step."""
    slow = PausedGraph(graph)
    with serving(make_app(graph=slow, catalog=few, **LIMITS)) as address:
        yield address, slow
        slow.go_on.set()  # a server that stops waits for its threads


def small(page: Page, prompt: str = "a cat", model: str = "SD1.5", **numbers: int) -> None:
    """Fill the form with a small request."""
    page.get_by_label("Model").select_option(model)
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Size").select_option("own")
    for label, value in ({"Width": 128, "Height": 128, "Steps": 3, "Seed": 7} | numbers).items():
        page.locator("#usual").get_by_label(label, exact=True).fill(str(value))


def draw(page: Page, press: str = "#draw") -> tuple[dict[str, Any], bytes]:
    """Draw; the body that was sent, and the file of the picture on the stage."""
    with page.expect_request(f"**{PATH}") as sent:
        page.click(press)
    return sent.value.post_data_json, shown(page)


def shown(page: Page) -> bytes:
    """The file of the picture on the stage, as the page would save it."""
    with page.expect_download() as saved:
        page.get_by_role("button", name="Download").click()
    return Path(saved.value.path()).read_bytes()


def alike(one: bytes, other: bytes) -> bool:
    """Whether two files show the same picture; those that shared their ticks differ by rounding."""
    left, right = (pixels(Image.open(io.BytesIO(data))) for data in (one, other))
    return left.shape == right.shape and bool(np.abs(left - right).max() <= 1)


def group(page: Page, title: str) -> None:
    page.locator("summary", has_text=title).click()


def drop(page: Page, data: bytes) -> None:
    """Drop a picture on the page."""
    page.evaluate(
        """text => {
          const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File([bytes], "dropped", {type: "image/png"}));
          document.body.dispatchEvent(new DragEvent("drop", {dataTransfer, bubbles: true, cancelable: true}));
        }""",
        base64.b64encode(data).decode(),
    )
    page.locator("#dropped-dialog").wait_for()


def test_a_preview_comes_and_then_the_picture(open_page: OpenPage, paused: tuple[str, PausedGraph]) -> None:
    url, graph = paused
    page = open_page(url)
    small(page)
    page.get_by_label("Prompt", exact=True).press("Control+Enter")
    page.locator(".tile.making img[src]").wait_for()
    expect(page.locator(".state")).to_have_text("Step 1 of 3")
    assert page.get_by_label("Progress").get_attribute("value") != "0"
    assert page.title().startswith("33 %")
    graph.go_on.set()
    expect(page.locator(".facts")).to_contain_text("128 × 128 · SD1.5 · seed 7")
    expect(page.locator("#announced")).to_have_text("The picture is done")
    assert Image.open(io.BytesIO(shown(page))).size == (128, 128)


def test_cancelling_ends_the_work(open_page: OpenPage, paused: tuple[str, PausedGraph]) -> None:
    url, graph = paused
    page = open_page(url)
    small(page)
    for cancel in (lambda: page.keyboard.press("Escape"), lambda: page.click("#cancel")):
        page.click("#draw")
        page.locator(".tile.making img[src]").wait_for()
        cancel()
        assert graph.ended.wait(60), "the server still draws"
        expect(page.locator(".tile")).to_have_count(0)
        expect(page.locator("#announced")).to_have_text("Nothing was drawn")
        expect(page.locator("#problem")).to_be_hidden()
    graph.go_on.set()
    assert len(draw(page)[1]) > 1000, "and it can be drawn afterwards"


def test_the_code_draws_the_same_picture(open_page: OpenPage, url: str, tmp_path: Path) -> None:
    """In three languages, each of them run; the shell's body is compared with what the page sent."""
    page = open_page(url)
    small(page, prompt='a "cat\'s" `tail`, $5 \\o/')
    group(page, "Sampling")
    page.get_by_label("Sampler").select_option("Euler a")
    group(page, "Start from a picture")
    page.get_by_label("Start picture").set_input_files(
        {"name": "x.png", "mimeType": "image/png", "buffer": photo(128, 128)}
    )
    page.get_by_role("button", name="Code").first.click()
    for link in page.locator("#code-note a").all():
        with page.expect_download() as saved:
            link.click()
        (tmp_path / str(link.text_content())).write_bytes(Path(saved.value.path()).read_bytes())
    texts = {}
    for language in ("curl", "Python", "JavaScript"):
        page.get_by_role("tab", name=language).click()
        texts[language] = str(page.locator("#code").text_content())
    page.get_by_role("button", name="Close").click()
    sent, drawn = draw(page)

    def run(*command: str, text: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    body = json.loads(run("bash", text=f"curl() {{ cat; }}\n{texts['curl']}"))
    assert body | {"stream": True, "preview": True} == sent
    (tmp_path / "program.mjs").write_text(texts["JavaScript"])
    node = Path(playwright.__file__).parent / "driver" / "node"
    programs = {"curl": ("bash",), "Python": (sys.executable, "-"), "JavaScript": (str(node), "program.mjs")}
    for language, command in programs.items():
        run(*command, text=texts[language])
        file = tmp_path / "picture.jpg"
        assert alike(file.read_bytes(), drawn), language
        file.unlink()


def test_a_mask_is_painted_and_the_rest_stays(open_page: OpenPage, url: str) -> None:
    page = open_page(url)
    small(page)
    group(page, "File and server")
    page.get_by_label("File format").select_option("png")
    group(page, "Start from a picture")
    expect(page.get_by_label("Mask blur")).to_be_hidden()
    start = photo(128, 128)
    page.get_by_label("Start picture").set_input_files({"name": "x.png", "mimeType": "image/png", "buffer": start})
    page.get_by_role("button", name="Paint a mask").click()
    canvas = page.locator("#canvas canvas")
    box = canvas.bounding_box()
    assert box is not None
    across, down = (lambda share: box["x"] + box["width"] * share), (lambda share: box["y"] + box["height"] * share)
    page.mouse.move(across(0.2), down(0.25))
    page.mouse.down()
    page.mouse.move(across(0.8), down(0.25), steps=4)
    page.mouse.up()
    canvas.press("ArrowDown")
    canvas.press(" ")
    page.get_by_role("button", name="Use mask").click()
    expect(page.get_by_label("Mask blur")).to_be_visible()
    sent, drawn = draw(page)
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(sent["mask_image"]))).convert("L"))
    assert mask.shape == (128, 128)
    assert (mask[32, 30:100] == 255).all(), "the stroke"
    assert (mask[60:] == 0).all()
    assert (mask[:, :10] == 0).all()
    changed = np.abs(pixels(Image.open(io.BytesIO(drawn))) - pixels(Image.open(io.BytesIO(start)))).max(axis=2)
    assert (changed[mask == 0] == 0).all()
    assert (changed[mask == 255] > 0).mean() > 0.9

    page.get_by_role("button", name="Change mask").click()
    page.locator("#mask-tools").get_by_role("button", name="Clear").click()
    page.get_by_role("button", name="Use mask").click()
    expect(page.get_by_role("button", name="Paint a mask")).to_be_visible()
    assert "mask_image" not in draw(page)[0]


def test_a_picture_brought_here_is_redrawn(open_page: OpenPage, url: str) -> None:
    page = open_page(url)
    small(page, prompt="a fox", Steps=2)
    group(page, "LoRAs")
    page.get_by_label("Add a LoRA").select_option("Pixel_Art")
    page.get_by_label("Weight of Pixel_Art", exact=True).fill("0.6")
    sent, drawn = draw(page)
    assert sent["loras"] == {"Pixel_Art": 0.6}

    other = open_page(url)
    drop(other, drawn)
    expect(other.locator("#dropped-says")).to_have_text("Its file says how it was made: SD1.5, seed 7.")
    again, redrawn = draw(other, "#dropped-redraw")
    assert {name: again[name] for name in sent} == sent
    assert alike(redrawn, drawn)


def test_a_picture_of_a1111_is_redrawn_as_far_as_it_says(open_page: OpenPage, url: str) -> None:
    told = PngImagePlugin.PngInfo()
    told.add_text("parameters", "a tree\nSteps: 2, Sampler: Euler a, CFG scale: 4, Seed: 9, Size: 128x128, Model: ours")
    file = io.BytesIO()
    Image.new("RGB", (128, 128)).save(file, "PNG", pnginfo=told)
    page = open_page(url)
    drop(page, file.getvalue())
    sent, _ = draw(page, "#dropped-redraw")
    wanted = {"model_name": "SD1.5", "prompt": "a tree", "steps": 2, "cfg_scale": 4, "seed": 9, "sampler": "Euler a"}
    wanted |= {"width": 128, "height": 128, "prompt_syntax": "weighted"}
    assert sent == wanted | {"stream": True, "preview": True}


def test_a_photo_brought_here_is_started_from_or_steers(open_page: OpenPage, url: str) -> None:
    page = open_page(url)
    small(page, model="SD1.5-ControlNet")
    for count, button in enumerate(("Start from it", "Steer by it", "Steer by it"), 1):
        drop(page, photo(128, 128))
        expect(page.locator("#dropped-redraw")).to_be_hidden()
        page.get_by_role("button", name=button).click()
        expect(page.locator(".well.full")).to_have_count(count)
    page.get_by_label("Control", exact=True).last.select_option("lineart")
    page.get_by_label("Weight", exact=True).last.fill("0.5")
    sent, drawn = draw(page)
    assert [control["name"] for control in sent["controlnets"]] == ["canny", "lineart"]
    assert sent["controlnets"][1] == sent["controlnets"][1] | {"weight": 0.5}
    assert {"image", "prompt"} <= set(sent)

    drop(page, drawn)
    expect(page.locator("#dropped-says")).to_contain_text("the picture it started from and a control's photo")
    page.get_by_role("button", name="Redraw it").click()
    expect(page.get_by_label("Weight", exact=True).last).to_have_value("0.5")
    expect(page.locator(".well.full")).to_have_count(0)


def test_several_pictures_and_the_history(open_page: OpenPage, url: str) -> None:
    page = open_page(url)
    small(page)
    bodies = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.url.endswith(PATH) else None)
    group(page, "File and server")
    page.get_by_label("File format").select_option("png")  # JPEG would make more of what rounding does
    page.locator("#count").select_option("2")
    page.click("#draw")
    expect(page.locator("#pictures li")).to_have_count(2)
    assert sorted(body["seed"] for body in bodies) == [7, 8]

    page.reload()
    expect(page.locator("#pictures li")).to_have_count(2)
    expect(page.locator("#usual").get_by_label("Steps", exact=True)).to_have_value("3")
    page.locator("#pictures button").last.click()
    first = shown(page)
    group(page, "The plan in its file")
    expect(page.get_by_label("Plan")).to_contain_text('"steps": 3')
    expect(page.get_by_label("Plan")).to_contain_text("trainedAlgorithmicMedia")
    page.get_by_label("Seed", exact=True).fill("")
    sent, again = draw(page, "text=Draw again")
    assert (sent["prompt"], sent["seed"]) == ("a cat", int(page.get_by_label("Seed", exact=True).input_value()))
    assert alike(again, first)

    expect(page.locator("#pictures li")).to_have_count(3)
    page.get_by_role("button", name="Delete").click()
    expect(page.locator("#pictures li")).to_have_count(2)
    page.once("dialog", lambda asked: asked.accept())
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#history")).to_be_hidden()
    page.reload()
    expect(page.locator("#history")).to_be_hidden()


def test_a_second_pass_is_drawn_and_told(open_page: OpenPage, paused: tuple[str, PausedGraph]) -> None:
    url, graph = paused
    page = open_page(url)
    small(page)
    group(page, "Second pass")
    larger = page.get_by_role("checkbox", name="Draw larger in a second pass")
    larger.check()
    page.get_by_role("group", name="Draw larger").get_by_label("Scale", exact=True).fill("1.5")
    page.click("#draw")
    expect(page.locator(".state")).to_have_text("Pass 1 of 2, step 1 of 3")
    graph.go_on.set()
    expect(page.locator(".facts")).to_contain_text("192 × 192")
    larger.uncheck()
    page.get_by_role("button", name="Enlarge").click()
    page.locator("#upscaler").select_option("nearest")
    page.get_by_label("How many times").fill("3")
    page.locator("#enlarge-dialog").get_by_role("button", name="Enlarge").click()
    expect(page.locator(".facts")).to_contain_text("576 × 576")
    page.get_by_role("button", name="Use settings").click()
    expect(page.get_by_role("group", name="Draw larger").get_by_label("Scale", exact=True)).to_have_value("1.5")
