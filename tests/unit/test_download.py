"""Fetching a whole catalog ahead of time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects
from PIL import Image

from config.catalog import ROOT, Catalog
from config.sources import FolderSource
from pipelines.assembly import load_lora, load_vae
from pipelines.control.annotators import Annotators
from pipelines.errors import WeightsError
from pipelines.plan import LoraUse
from pipelines.weights import files
from pipelines.weights.download import download, needed_files


def test_everything_that_is_served_is_fetched(catalog: Catalog) -> None:
    found = dict(download(catalog))
    assert all(folder.is_dir() for folder in found.values())
    wanted = {f"component {c.id}" for c in catalog.served_components()}
    wanted |= {"lora Add_Detail", "lora Pixel_Art", "annotator depth", "annotator openpose", "annotator softedge"}
    wanted.add("annotator openpose, detector")
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


def test_the_loaders_ask_for_what_was_fetched(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """With HF_HUB_OFFLINE=1 a loader that asks for a file the download left out would find nothing."""
    asked = []
    fetch = files.fetch

    def recorded(what: str, source: Any, patterns: Sequence[str]) -> Path:
        asked.append((source, tuple(patterns)))
        return fetch(what, source, patterns)

    monkeypatch.setattr(files, "fetch", recorded)
    load_vae(catalog, "vae-sd15", "cpu")
    load_lora(catalog, LoraUse(name="Add_Detail", weight=1), "unet-sd15", "unet")
    annotators = Annotators(catalog, "cpu")
    for spec in catalog.annotators:
        annotators.annotate(spec.name, Image.new("RGB", (64, 64)))
    assert len(set(asked)) == 1 + 1 + len(catalog.annotators) + 1
    assert set(asked) <= {(wanted.source, wanted.patterns) for wanted in needed_files(catalog)}


def test_an_onnx_file_is_fetched_from_whatever_folder_it_lies_in() -> None:
    (softedge,) = (spec for spec in Catalog.load("hub").annotators if spec.name == "softedge")
    (wanted,) = files.annotator_files(softedge)
    lying = [softedge.file, f"onnx/{softedge.file}"]
    assert list(filter_repo_objects(lying, allow_patterns=list(wanted.patterns))) == lying


def test_a_repository_that_cannot_be_had_is_one_line_and_exit_1(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines.weights.download", "--catalog", "hub", "--model", "SD2"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "stabilityai/stable-diffusion-2" in done.stderr.splitlines()[-1]
