"""Shared by every suite: the tiny models, written once."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from config.catalog import ROOT, Catalog
from models.make_tiny import make_tiny
from tests.support.inpainting import with_inpainting, write_models


@pytest.fixture(scope="session")
def tiny_models() -> Path:
    """The folder of tiny seeded models, made by the first test process that needs them."""
    folder = ROOT / "models" / "tiny"
    with FileLock(folder.with_suffix(".lock")):
        make_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def catalog(tiny_models: Path) -> Catalog:
    return Catalog.load("tiny")


@pytest.fixture(scope="session")
def inpainting_models(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny models for inpainting, by name."""
    folder = tmp_path_factory.mktemp("inpainting")
    write_models(tiny_models, folder)
    return folder


@pytest.fixture(scope="session")
def inpainting_catalog(catalog: Catalog, inpainting_models: Path) -> Catalog:
    """The tiny catalog and the models for inpainting."""
    return with_inpainting(catalog, inpainting_models)


@pytest.fixture
def recovered(capsys: pytest.CaptureFixture[str]) -> Callable[[str, float], None]:
    """Print how long something took to be whole again, past pytest's capture: benchmarks/RESULTS.md records them."""

    def tell(what: str, since: float) -> None:
        with capsys.disabled():
            print(f"\nrecovered: {what}: {time.monotonic() - since:.1f} s")

    return tell


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """The models are tiny, and processes with as many threads as a busy machine has cores starve each other."""
    torch.set_num_threads(1)
