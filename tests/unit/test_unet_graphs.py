"""Recorded passes of UNets and ControlNets draw what passes as they come draw.

On a CPU, by a capturer that spoils everything a graph must not rely on (`tests/support/fake_capturer.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from config.catalog import Catalog
from pipelines.assembly import record_common_passes
from pipelines.backends.torch_backend import TorchDenoiser
from pipelines.control_plan import ControlParams
from pipelines.plan import GenerationParams
from pipelines.text2image import Text2Image
from tests.support.fake_capturer import FakeCapturer
from tests.support.http import photo

SIDE = {"SD1.5": 128, "SD1.5-ControlNet": 128, "SD2": 128}
LORAS = {"loras": {"Pixel_Art": 0.7}}
OTHER_LORAS = {"loras": {"Pixel_Art": -0.5, "Add_Detail": 1.0}}
CANNY = {"controlnet_name": "canny", "controlnet_image": photo()}
STEERED = {"controlnet_name": "depth", "controlnet_image": photo(50, 60), "controlnet_preprocess": False}


def listed(*controls: tuple[str, float, float]) -> dict[str, Any]:
    """Name, weight and end of each."""
    maps = [
        ControlParams(name=name, image=photo(50 + i, 60), preprocess=False, weight=weight, end=end)
        for i, (name, weight, end) in enumerate(controls)
    ]
    return {"controlnets": tuple(maps)}


def request(model_name: str, **fields: Any) -> GenerationParams:
    side = SIDE.get(model_name, 256)
    common = {"prompt": "a fox", "width": side, "height": side, "steps": 8, "seed": 1, "sampler": "Euler a"}
    return GenerationParams(model_name=model_name, **common | fields)


BATCHES: dict[str, Sequence[GenerationParams]] = {
    "one picture": [request("SD1.5")],
    "three rows in a pass of four": [request("SD1.5"), request("SD1.5", seed=2, cfg_scale=1.0)],
    "samplers, and jobs that end before others": [
        request("SD1.5", seed=2, steps=5, sampler="UniPC 2M"),
        request("SD1.5", seed=3, steps=12, sampler="Heun"),
        request("SD1.5", seed=4, steps=9, sampler="PNDM", prompt="a ship"),
    ],
    "SD2": [request("SD2", negative_prompt="fog")],
    "SDXL and its refiner": [request("SDXL1.0-base", enable_refiner=True, steps=30)],
    "SSD": [request("SSD")],
    "LoRAs of some rows": [
        request("SD1.5", **LORAS),
        request("SD1.5", seed=2, steps=12),
        request("SD1.5", seed=3, steps=10, **OTHER_LORAS),
    ],
    "a ControlNet of some rows": [
        request("SD1.5-ControlNet", steps=10, **CANNY),
        request("SD1.5", seed=2, steps=14, cfg_scale=1.0),
    ],
    "a union ControlNet in two modes, and a LoRA": [
        request("SDXL-ControlNet", **CANNY),
        request("SDXL-ControlNet", seed=2, cfg_scale=1.0, **STEERED),
        request("SDXL1.0-base", seed=3, **LORAS),
    ],
    "several maps, whose weights change on the way": [
        request("SDXL1.0-base", **listed(("canny", 0.4, 0.6), ("depth", 1.5, 1.0))),
        request("SDXL1.0-base", seed=2, steps=12, **listed(("canny", 1.0, 1.0), ("depth", 0.3, 0.3))),
    ],
}


@pytest.fixture
def capturer() -> FakeCapturer:
    return FakeCapturer()


@pytest.fixture
def recorded(catalog: Catalog, capturer: FakeCapturer) -> Text2Image:
    return Text2Image(catalog, capturer=capturer)


@pytest.fixture(scope="module")
def plain(catalog: Catalog) -> Text2Image:
    return Text2Image(catalog)


def worst_difference(ours: Text2Image, theirs: Text2Image, requests: Sequence[GenerationParams]) -> int:
    pairs = zip(ours.generate_many(list(requests)), theirs.generate_many(list(requests)), strict=True)
    arrays = [(np.asarray(a.image).astype(int), np.asarray(b.image).astype(int)) for a, b in pairs]
    assert all(theirs.std() > 1 for _, theirs in arrays), "a flat picture proves nothing"
    return max(int(np.abs(a - b).max()) for a, b in arrays)


@pytest.mark.parametrize("batch", BATCHES)
def test_recorded_passes_draw_the_same(
    recorded: Text2Image, plain: Text2Image, capturer: FakeCapturer, batch: str
) -> None:
    assert worst_difference(recorded, plain, BATCHES[batch]) <= 1
    assert capturer.captures
    assert capturer.replays > capturer.captures, "what was recorded is used"


def test_a_recording_serves_other_requests(recorded: Text2Image, plain: Text2Image, capturer: FakeCapturer) -> None:
    """Other prompts, sizes of guidance, seeds, samplers and weights of a LoRA need no recording of their own."""
    assert worst_difference(recorded, plain, [request("SD1.5", **LORAS)]) <= 1
    captures = capturer.captures
    others = [
        request("SD1.5", seed=5, prompt="a ship at sea", cfg_scale=9.0, sampler="DPM++ 2M", loras={"Pixel_Art": 0.2}),
        request("SD1.5", seed=6, sampler="DDIM", loras={"Pixel_Art": -1.0}),
    ]
    for other in others:
        assert worst_difference(recorded, plain, [other]) <= 1
    assert capturer.captures == captures


def test_strict_pictures_do_not_depend_on_their_neighbours(catalog: Catalog, capturer: FakeCapturer) -> None:
    strict = Text2Image(catalog, strict=True, capturer=capturer)
    requests = [request("SD1.5", seed=seed, cfg_scale=1.0 + seed) for seed in range(3)]
    together = strict.generate_many(requests)
    assert capturer.replays
    for picture, one in zip(together, requests, strict=True):
        assert np.array_equal(np.asarray(picture.image), np.asarray(strict.generate(one).image))


def denoiser_of(text2image: Text2Image) -> TorchDenoiser:
    denoiser = text2image.torch_engine("unet-sd15").denoiser
    assert isinstance(denoiser, TorchDenoiser)
    return denoiser


def test_what_cannot_be_recorded_is_drawn_as_before(
    recorded: Text2Image, plain: Text2Image, capturer: FakeCapturer
) -> None:
    capturer.fail = torch.OutOfMemoryError("CUDA out of memory.")
    assert worst_difference(recorded, plain, [request("SD1.5")]) == 0
    assert (denoiser_of(recorded).captured, denoiser_of(recorded).failed_captures) == (0, 1)
    capturer.fail = None
    assert worst_difference(recorded, plain, [request("SD1.5", seed=2)]) == 0
    assert denoiser_of(recorded).captured == 0, "not tried again"
    assert worst_difference(recorded, plain, [request("SD1.5", cfg_scale=1.0)]) <= 1
    assert denoiser_of(recorded).captured == 1, "another kind of pass"


def test_recordings_make_room_when_memory_runs_out(
    recorded: Text2Image, plain: Text2Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded.generate(request("SD1.5"))
    denoiser = denoiser_of(recorded)
    assert denoiser.captured == 1
    lower, calls = denoiser._halves.lower, []

    def fail_once(*arguments: Any) -> Any:
        calls.append(denoiser.captured)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return lower(*arguments)

    monkeypatch.setattr(denoiser._halves, "lower", fail_once)
    assert worst_difference(recorded, plain, [request("SD1.5", cfg_scale=1.0)]) <= 1
    assert calls[:2] == [1, 0], "the second try finds the memory of the recordings"


def test_rows_that_only_fill_a_pass_are_reported(recorded: Text2Image) -> None:
    engine = recorded.torch_engine("unet-sd15")
    paddings = []
    tick = engine.tick

    def watched() -> Any:
        report = tick()
        paddings.append((report.rows, report.padding))
        return report

    engine.tick = watched  # type: ignore[method-assign]
    recorded.generate_many([request("SD1.5"), request("SD1.5", seed=2, cfg_scale=1.0)])
    assert paddings[0] == (3, 0), "as it came"
    assert paddings[-1] == (3, 1), "recorded"


@pytest.mark.parametrize("component", ["unet-sd15", "unet-sd1.5-inpainting", "refiner-sdxl", "unet-sdxl-turbo"])
def test_the_default_sizes_are_recorded_ahead(
    inpainting_catalog: Catalog, capturer: FakeCapturer, component: str
) -> None:
    small = (256, 256) if "sdxl" in component else (128, 128)
    data = inpainting_catalog.model_dump()
    for model in data["models"]:
        model["defaults"] |= {"width": small[0], "height": small[1]}
    part = Catalog.model_validate(data)
    text2image = Text2Image(part, capturer=capturer)
    denoiser = text2image.torch_engine(component).denoiser
    assert isinstance(denoiser, TorchDenoiser)
    record_common_passes(denoiser, part, component)
    captures, replays = capturer.captures, capturer.replays
    assert captures == (3 if component == "refiner-sdxl" else 2), "one picture and two, guided or not"
    name, fields = {
        "unet-sd15": ("SD1.5", {"steps": 2}),
        "unet-sd1.5-inpainting": ("SD1.5-inpainting", {"steps": 2}),
        "refiner-sdxl": ("SDXL1.0-base", {"steps": 4, "enable_refiner": True}),
        "unet-sdxl-turbo": ("SDXL-turbo", {"steps": 2, "cfg_scale": 0.0}),
    }[component]
    text2image.generate_many([request(name, **fields | {"width": small[0], "height": small[1]})])
    assert capturer.captures == captures
    assert capturer.replays > replays, "the first request finds it recorded"


def test_a_controlnet_is_recorded_too(recorded: Text2Image) -> None:
    recorded.generate(request("SD1.5-ControlNet", **CANNY))
    nets = recorded.controlnets(("controlnet-sd15-canny", "controlnet-sd15-soft"))
    assert (nets.captured, nets.failed_captures) == (1, 0)
