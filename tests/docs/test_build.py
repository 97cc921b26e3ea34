"""The documentation builds without a warning: every link and every reference leads somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from config.catalog import ROOT
from tests.docs.pages import DOCS, PAGES

ON_GITHUB = "https://github.com/sdgraph/sdgraph/blob/main/"


def build(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", str(source), str(target)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_documentation_builds(tmp_path: Path) -> None:
    done = build(DOCS, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Ray Serve deployment graph" in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_into_the_repository_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    linked = re.findall(rf"\]\({re.escape(ON_GITHUB)}([^)#]+)", text)
    linked += re.findall(r"\]\((?!https?:|#|<)([^)#\s]+)(?:#[^)]*)?\)", text) if page.parent == ROOT else []
    for target in linked:
        assert (ROOT / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = (DOCS / "index.md").read_text().splitlines()
    assert {page.stem for page in DOCS.glob("*.md")} - {"index"} <= set(listed)
