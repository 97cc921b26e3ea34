"""Late binding: a ControlNet's residuals join the UNet when its up blocks need them.

A UNet needs the residuals only on its way up. So the call starts first, the UNet's down and mid blocks run meanwhile,
and pre-hooks of the up blocks add what came back: bit-equal to passing them as arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from pipelines.control.types import ControlledRows
from pipelines.diffusers_compat import UP_BLOCK_INPUT, UP_BLOCK_SKIPS

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class LateBinding:
    """Pre-hooks on a UNet's up blocks, which add residuals when the UNet gets there."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self._unet = unet
        self._controlled: ControlledRows | None = None
        self._residuals: list[torch.Tensor] | None = None
        self._rows = torch.empty(0, dtype=torch.long)
        for block in unet.up_blocks:
            block.register_forward_pre_hook(self._before_up_block, with_kwargs=True)

    @contextmanager
    def bound(self, controlled: ControlledRows | None) -> Iterator[None]:
        """Within the block, the UNet's next pass adds these residuals."""
        self._controlled, self._residuals = controlled, None
        try:
            yield
        finally:
            self._controlled, self._residuals = None, None

    def _before_up_block(
        self, block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._controlled is None:
            return None
        if self._residuals is None:  # the first up block: wait here, and add the mid residual
            self._residuals = self._controlled.pending.result().unpack(self._unet.device, self._unet.dtype)
            self._rows = torch.tensor(self._controlled.rows, device=self._unet.device)
            kwargs[UP_BLOCK_INPUT] = self._add(kwargs[UP_BLOCK_INPUT], self._residuals.pop())
        skips = kwargs[UP_BLOCK_SKIPS]
        own = self._residuals[-len(skips) :]
        del self._residuals[-len(skips) :]
        kwargs[UP_BLOCK_SKIPS] = tuple(self._add(skip, r) for skip, r in zip(skips, own, strict=True))
        return args, kwargs

    def _add(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return hidden.index_add(0, self._rows, residual)
