"""Upscalers of a library: served by their stems, or listed with a reason."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from config.catalog import Catalog
from pipelines.library.library import Library
from tests.support.library import extended, put, reasons, settled, write
from tests.support.upscalers import FILE


def test_each_is_a_component_of_its_own(catalog: Catalog, tiny_models: Path, tmp_path: Path) -> None:
    library = tmp_path / "library"
    put(tiny_models / "upscaler-x4" / FILE, library / "ESRGAN" / "4x Photo.safetensors")
    put(tiny_models / "upscaler-x2" / FILE, library / "2x.safetensors")
    write(library / "2x.yaml", "name: Drawings\naliases: [anime]")
    put(tiny_models / "upscaler-x2" / FILE, library / "Lanczos.safetensors")
    state = load_file(tiny_models / "upscaler-x4" / FILE)
    save_file(state | {"model.0.weight": torch.zeros(8, 1, 3, 3)}, library / "grey.safetensors")
    settled(library / "grey.safetensors")
    found = extended(catalog, [library], tmp_path / "digests.json")
    assert [(entry.name, entry.aliases, entry.component) for entry in found.upscalers] == [
        ("Drawings", ("anime",), "upscaler-drawings"),
        ("4x Photo", (), "upscaler-4x-photo"),
    ]
    assert found.upscaler_choices().resolve("ANIME") == "Drawings"
    served = {component.id for component in found.only(("SD1.5",)).served_components()}
    assert {"upscaler-drawings", "upscaler-4x-photo"} <= served
    assert found.component("upscaler-4x-photo").kind == "upscaler"
    told = reasons(found)
    assert "the name 'Lanczos' is the catalog's" in told["Lanczos.safetensors"]
    assert told["grey.safetensors"] == "it reads 1 channels, and pictures here have 3"
    assert len(told) == 2


def test_one_that_comes_later_waits_for_a_deployment(catalog: Catalog, tiny_models: Path, tmp_path: Path) -> None:
    library = tmp_path / "library"
    put(tiny_models / "upscaler-x4" / FILE, library / "first.safetensors")
    running = Library(extended(catalog, [library], tmp_path / "digests.json"))
    put(tiny_models / "upscaler-x2" / FILE, library / "second.safetensors")
    now = running.read()
    assert [entry.name for entry in now.upscalers] == ["first"]
    assert reasons(now) == {
        "second.safetensors": "it came, or was changed, after the graph was deployed; deploy it again to serve it"
    }
