"""Shared by every suite: the tiny models, written once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from config.catalog import ROOT, Catalog


@pytest.fixture(scope="session")
def tiny_models() -> Path:
    """The folder of tiny seeded models; a second run of the command finds them up to date."""
    subprocess.run([sys.executable, "models/make_tiny.py"], cwd=ROOT, check=True, capture_output=True)
    return ROOT / "models" / "tiny"


@pytest.fixture(scope="session")
def catalog(tiny_models: Path) -> Catalog:
    return Catalog.load("tiny")


@pytest.fixture(scope="session", autouse=True)
def torch_threads() -> None:
    """Two; one in each of several test processes, which would starve each other otherwise."""
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
