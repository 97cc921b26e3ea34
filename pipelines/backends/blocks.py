"""A UNet's repeated blocks under torch.compile, one by one: a block is compiled once for all of its kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pipelines.torch_compat import allow_compilations

REPEATED = ("BasicTransformerBlock", "ResnetBlock2D")
"""Classes whose blocks make up a UNet. Inside the second, normalisation and activation become one kernel."""


def compile_blocks(unet: torch.nn.Module, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compile the blocks of `unet`, each at its first call with a new shape; how many there are.

    What changes the modules must have happened before: torch.compile takes no notice of forward hooks that come later
    (`adapters/modules.py`). Adapters that are not in the slots break out of a compiled block, so the whole of a block
    is not asked for (`fullgraph`).
    """
    allow_compilations()
    blocks = [module for module in unet.modules() if type(module).__name__ in REPEATED]
    for block in blocks:
        block.compile(dynamic=False, backend=backend)
    return len(blocks)
