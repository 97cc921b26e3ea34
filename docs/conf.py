"""How Sphinx builds the documentation: `make docs` writes build/docs/index.html."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from deployments import __version__

project = "sdgraph"
author = "the sdgraph contributors"
copyright = "the sdgraph contributors, Apache-2.0"
release = version = __version__

extensions = ["myst_parser", "sphinxcontrib.mermaid", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_fence_as_directive = ["mermaid"]  # GitHub draws these fences too
myst_heading_anchors = 4
source_suffix = {".md": "markdown"}
exclude_patterns: list[str] = []

html_theme = "furo"
html_title = f"sdgraph {version}"
html_static_path: list[str] = []
copybutton_prompt_text = r"\$ |>>> "
copybutton_prompt_is_regexp = True

# Every link must lead somewhere: `make docs` turns warnings into errors.
nitpicky = True
