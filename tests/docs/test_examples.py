"""The code of the documentation runs. Blocks of one page share names, as a reader would type them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import DOCS, NOT_RUN, PAGES, blocks

IN_ONE_PROCESS = ("library.md", "extending.md")
"""Pages whose Python needs no server; tests/serve runs that of the others."""


@pytest.mark.parametrize("page", IN_ONE_PROCESS)
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    code = blocks(DOCS / page, "python")
    assert code
    for block in code:
        exec(compile(block.padded, DOCS / page, "exec"), names)


def test_code_is_in_a_language_that_is_run_or_shows_data() -> None:
    """A fence without a language, or called `sh` or `console`, would escape the tests that run commands."""
    for page in PAGES:
        opened = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)[::2]
        languages = {language for language in opened if not language.startswith("{")}  # else a directive of Sphinx
        assert languages <= {"bash", "python", "json", "yaml", "mermaid"}, page


def test_what_does_not_run_says_why() -> None:
    for page in PAGES:
        for block in blocks(page, "bash"):
            if not block.runs:
                reason = block.code.splitlines()[0].removeprefix(NOT_RUN).lstrip(" :")
                assert len(reason) > 10, f"{page.name}, line {block.line}: say why it is not run"
