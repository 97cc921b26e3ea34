"""The control maps of a job and their weights at each tick."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pipelines.control.types import ControlHint, HintUse
from pipelines.control_plan import ControlUse


@dataclass(frozen=True)
class Steering:
    """The control maps of one job."""

    hints: tuple[ControlHint, ...] = ()
    controls: tuple[ControlUse, ...] = ()
    """How each is used, in the same order."""
    ticks: int = 0
    """Of the picture, which windows are shares of: those of the whole schedule from where the picture begins."""

    def uses(self, tick: int, rows: int) -> tuple[tuple[HintUse, ...], ...]:
        """The maps of each row of a tick, the uncond row first; none for a row that nothing steers.

        A map outside its window is left out, as its residuals would be multiplied by 0. But where a union ControlNet
        reads several maps at once, all of them are read at every tick: there a weight scales what goes in, and one of 0
        leaves an empty map, as in diffusers' `StableDiffusionXLControlNetUnionPipeline`.
        """
        if not self.hints:
            return ((),) * rows
        weighed = [
            HintUse(h.ref, self._weight(c, tick), c.guess) for h, c in zip(self.hints, self.controls, strict=True)
        ]
        together = Counter(use.joint for use in weighed if use.joint)
        read = [use for use in weighed if use.weight or (use.joint and together[use.joint] > 1)]
        cond, uncond = tuple(read), tuple(use for use in read if not use.guess)
        return (uncond,) * (rows - 1) + (cond,)

    def _weight(self, control: ControlUse, tick: int) -> float:
        """Of a control at a tick: diffusers' `controlnet_keep` times its scale."""
        inside = tick / self.ticks >= control.start and (tick + 1) / self.ticks <= control.end
        return control.weight if inside else 0.0
