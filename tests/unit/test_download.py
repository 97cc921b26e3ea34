"""Fetching a whole catalog ahead of time."""

from __future__ import annotations

from pathlib import Path

import pytest

from config.catalog import Catalog
from config.sources import FolderSource
from pipelines.errors import WeightsError
from pipelines.weights.download import download


def test_everything_that_is_served_is_fetched(catalog: Catalog) -> None:
    found = dict(download(catalog))
    assert all(folder.is_dir() for folder in found.values())
    wanted = {f"component {c.id}" for c in catalog.served_components()}
    wanted |= {"lora Add_Detail", "lora Pixel_Art", "annotator depth", "annotator openpose", "annotator softedge"}
    assert set(found) == wanted


def test_only_what_the_chosen_models_need(catalog: Catalog) -> None:
    found = [what for what, _ in download(catalog.only(("SD2",)))]
    assert {w for w in found if w.startswith("component")} == {
        "component text-encoder-sd2",
        "component unet-sd2",
        "component vae-sd2",
    }
    assert not any(w.startswith("lora") for w in found), "they fit other UNets"


def test_a_missing_source_is_named(catalog: Catalog) -> None:
    first, *rest = catalog.components
    gone = first.model_copy(update={"source": FolderSource(folder=Path("models/nowhere"))})
    with pytest.raises(WeightsError, match=f"component {first.id}: folder models/nowhere does not exist"):
        list(download(catalog.model_copy(update={"components": (gone, *rest)})))
