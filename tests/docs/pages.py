"""The documentation as tests read it: pages, and the code in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from config.catalog import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
NOT_RUN = "# not run by the tests"
"""How the first line of a block begins that no test runs; the reason follows on that line."""
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Attributes:
        page: where it stands.
        line: of its fence.
        language: what stands behind the fence.
        code: its text.
    """

    page: Path
    line: int
    language: str
    code: str

    @property
    def runs(self) -> bool:
        """Whether a test runs it."""
        return not self.code.startswith(NOT_RUN)

    @property
    def padded(self) -> str:
        """The code on the lines it has in its page, so that a traceback points there."""
        return "\n" * self.line + self.code


def blocks(page: Path, language: str) -> list[Block]:
    """The blocks of a page in one language, in order."""
    text = page.read_text()
    found = (Block(page, text.count("\n", 0, m.start()) + 1, m[1], m[2]) for m in _FENCE.finditer(text))
    return [block for block in found if block.language == language]
