"""The commands of README and of the documentation run, against the running graph, as a reader would type them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from config.catalog import ROOT
from tests.docs.pages import DOCS, PAGES, Block, blocks
from tests.support.http import photo

pytestmark = pytest.mark.slow  # pictures at the sizes and steps that the pages show
ADDRESS = "http://127.0.0.1:8000"
COMMANDS = [block for page in PAGES for block in blocks(page, "bash") if block.runs]
PYTHON = [
    block
    for page in (ROOT / "README.md", DOCS / "quickstart.md", DOCS / "other-dialects.md")
    for block in blocks(page, "python")
    if block.runs
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository's root, where what the commands write does no harm."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in (".venv", "models", "config", "deployments", "pipelines"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "photo.jpg").write_bytes(photo(512, 512, "JPEG"))
    return folder


def name_of(block: Block) -> str:
    return f"{block.page.name}:{block.line}"


@pytest.mark.skipif(shutil.which("jq") is None, reason="the README's commands read replies with jq, which is not here")
@pytest.mark.parametrize("block", COMMANDS, ids=name_of)
def test_a_command_runs(block: Block, checkout: Path, url: str) -> None:
    """Blocks of a page follow each other: one may read the picture that another has written."""
    script = "set -euo pipefail\n" + block.code.replace(ADDRESS, url)
    environment = os.environ | {"KEY": "secret", "PYTHONPATH": str(checkout)}
    done = subprocess.run(["bash", "-c", script], cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for picture in re.findall(r"> ([\w-]+\.(?:jpg|png|webp))$", block.code, re.MULTILINE):
        with Image.open(checkout / picture) as image:
            image.load()
    if "-sN" in block.code:
        assert "event: result" in done.stdout


@pytest.mark.parametrize("block", PYTHON, ids=name_of)
def test_python_runs(block: Block, checkout: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(block.padded.replace(ADDRESS, url), block.page, "exec"), names)
