"""What components take of a GPU: parameters as published, activations as counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from config.catalog import Catalog, Size
from pipelines.footprint import CONTEXT, Footprint, decoding_bytes, footprint, parameters, together
from pipelines.torch_compat import PeakBytes

PUBLISHED = {
    "unet-sd15": [859_520_964],
    "unet-sd2": [865_910_724],
    "unet-sdxl-base": [2_567_463_684],
    "unet-ssd": [1_331_334_404],
    "refiner-sdxl": [2_259_526_660],
    "text-encoder-sd15": [123_060_480],
    "text-encoder-sd2": [340_387_840],
    "text-encoder-sdxl": [123_060_480, 694_659_840],
    "vae-sdxl": [83_653_863],
    "controlnet-sd15-canny": [361_279_120],
    "controlnet-sdxl-union": [1_257_287_280],
}
"""Public knowledge; half of the bytes of the float16 files."""


@pytest.mark.parametrize("component", PUBLISHED)
def test_shipped_configurations_have_the_published_number_of_parameters(component: str) -> None:
    assert parameters(Catalog.load("hub").component(component)) == PUBLISHED[component]


def test_a_unet_for_inpainting_has_a_wider_first_layer() -> None:
    spec = Catalog.load("hub").component("unet-sd15").model_copy(update={"inpainting": True})
    assert parameters(spec) == [PUBLISHED["unet-sd15"][0] + 5 * 320 * 9], "859.54 million, as published"


def test_a_folder_is_counted_from_its_own_configuration(catalog: Catalog, tiny_models: Path) -> None:
    spec = catalog.component("vae-sd15")
    vae = AutoencoderKL.from_pretrained(tiny_models / "sd15", subfolder="vae").eval()
    assert parameters(spec) == [sum(p.numel() for p in vae.parameters())]
    with torch.inference_mode(), PeakBytes() as real:
        vae.decode(torch.zeros(1, 4, 16, 16))
    assert decoding_bytes(spec, Size(width=128, height=128)) == pytest.approx(real.peak, rel=0.1)


def test_rows_are_counted_at_the_largest_size_that_a_model_lists_or_defaults_to() -> None:
    catalog = Catalog.load("hub")
    part = footprint(catalog, catalog.component("unet-sd15"))
    assert str(part.largest) == "1024x1024", "768x768 is the largest it lists, 1024x1024 its default"
    assert part.weights == 2 * PUBLISHED["unet-sd15"][0]
    assert 0.1e9 < part.row < 1e9


def test_a_process_holds_all_weights_and_computes_with_one_component_at_a_time() -> None:
    parts = [Footprint(weights=10, kept=1, row=2), Footprint(weights=20, kept=3, work=5)]
    assert together(parts, rows=4) == CONTEXT + 30 + 3 + 8
    assert together(parts, rows=1) == CONTEXT + 30 + 3 + 5


def test_a_hub_component_without_architecture_is_refused_by_name() -> None:
    catalog = Catalog.load("hub")
    spec = catalog.component("unet-ssd").model_copy(update={"architecture": None})
    with pytest.raises(ValueError, match="component unet-ssd is on the hub: say its architecture"):
        footprint(catalog, spec)
