"""Which backend runs a stage."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass

from config.catalog import ModelSpec
from config.choices import Choices
from config.precision import Precision
from pipelines.errors import InvalidValueError
from pipelines.plan import BackendName, CompiledSize

logger = logging.getLogger(__name__)

BACKENDS = Choices("backend", ["auto", "tvm", "torch"])
WORTHWHILE = 1.1
"""Times that tvm must have been faster than torch for `auto` to take it."""


@dataclass(frozen=True)
class BackendChoice:
    """Decides for each stage of a request which backend runs it."""

    wanted: str
    model: ModelSpec
    width: int
    height: int
    compiled: Collection[CompiledSize]

    @classmethod
    def create(
        cls, name: str, model: ModelSpec, width: int, height: int, compiled: Collection[CompiledSize]
    ) -> BackendChoice:
        """Of one of `BACKENDS`; an explicit `tvm` must be on the model's size table, or compiled all the same."""
        sizes = list(dict.fromkeys([*map(str, model.tvm_sizes), *_compiled_for(model, compiled)]))
        if name == "tvm" and f"{width}x{height}" not in sizes:
            raise InvalidValueError(
                f"backend 'tvm' does not serve {model.name} at {width}x{height}. Only {sizes} allowed", "backend"
            )
        return cls(name, model, width, height, compiled)

    def for_stage(self, component: str, steered: bool, loras: bool) -> BackendName:
        """The backend of one stage; the refiner of an explicit `tvm` runs there too where it is compiled."""
        here = self._compiled(component, steered)
        cannot = self._why_not(here, loras)
        if self.wanted == "tvm":
            if cannot and component == self.model.unet:
                raise InvalidValueError(f"backend 'tvm': {cannot}", "backend")
            return "torch" if cannot else "tvm"
        if self.wanted == "auto" and here is not None and not cannot and here.speedup < WORTHWHILE:
            cannot = f"tvm was only {here.speedup:.2f} times as fast when it started"
        if self.wanted == "auto" and self.compiled:
            on = f"torch: {cannot}" if cannot else "tvm"
            logger.info("%s at %dx%d runs on %s", component, self.width, self.height, on)
        return "torch" if cannot or self.wanted == "torch" else "tvm"

    def precision(self, component: str, steered: bool) -> Precision | None:
        """What the compiled UNet of a stage multiplies, None if there is none."""
        here = self._compiled(component, steered)
        return None if here is None else here.precision

    def _compiled(self, component: str, steered: bool) -> CompiledSize | None:
        wanted = (component, self.width, self.height, steered)
        return next((c for c in self.compiled if (c.component, c.width, c.height, c.control) == wanted), None)

    def _why_not(self, here: CompiledSize | None, loras: bool) -> str | None:
        """Why tvm cannot run a stage, None if it can."""
        if here is not None and loras and not here.loras:
            return "compiled for this size without LoRAs on this server. Only ['auto', 'torch'] allowed with them"
        if here is not None:
            return None
        sizes = _compiled_for(self.model, self.compiled)
        if not sizes:
            return "not compiled on this server. Only ['auto', 'torch'] allowed now"
        return f"not compiled for this size and ControlNet on this server. Only {sizes} are compiled"


def _compiled_for(model: ModelSpec, compiled: Collection[CompiledSize]) -> list[str]:
    """Sizes that a model's UNet is compiled for."""
    return list(dict.fromkeys(str(size) for size in compiled if size.component == model.unet))
