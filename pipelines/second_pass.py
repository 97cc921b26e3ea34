"""The second pass of a request: its size, its part of the schedule and what enlarges the picture for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from config.catalog import Catalog
from config.choices import UnknownChoiceError
from pipelines.backend_choice import BackendChoice
from pipelines.enlargement import Enlargement, HiresParams
from pipelines.errors import InvalidValueError
from pipelines.plan import MAX_SIDE, REFINER_SHARE, GenerationParams, ScheduleSlice
from pipelines.sampling.samplers import SAMPLERS


@dataclass(frozen=True)
class SecondPass:
    """A second pass, decided."""

    backend: BackendChoice
    """Of its size."""
    schedule: ScheduleSlice
    enlargement: Enlargement

    @classmethod
    def create(
        cls, params: GenerationParams, steps: int, sampler: str, first: BackendChoice, catalog: Catalog
    ) -> SecondPass | None:
        """Of a request whose first pass has so many steps; None if it asks for none.

        Raises:
            InvalidValueError: it cannot be had; the message names what can.
        """
        hires = params.hires
        if hires is None:
            return None
        if params.mask_image is not None:
            raise InvalidValueError("hires cannot be used with mask_image: leave one of them out", "hires")
        refined = round(1 - REFINER_SHARE, 6)
        if params.enable_refiner and hires.strength <= refined:
            raise InvalidValueError(
                f"hires.strength {hires.strength:g} leaves all steps to the refiner, which draws from noise that the "
                f"model has begun to remove: use more than {refined:g}, or leave enable_refiner out",
                "hires",
            )
        try:
            upscaler = catalog.upscaler_choices("hires.upscaler").resolve(hires.upscaler)
        except UnknownChoiceError as error:
            raise InvalidValueError(str(error), "hires") from None
        schedule = ScheduleSlice(
            steps=_schedule_steps(hires.steps or steps, hires.strength, sampler),
            strength=hires.strength,
            eta=params.eta,
        )
        # An explicit `tvm` applies to the first pass; the second one uses tvm where its size is compiled.
        wanted = "auto" if first.wanted == "tvm" else first.wanted
        width, height = _larger(hires, first)
        backend = replace(first, wanted=wanted, width=width, height=height)
        component = catalog.upscaler_component(upscaler)
        return cls(backend, schedule, Enlargement(upscaler=upscaler, component=component, scale=hires.scale))

    @property
    def pixel_steps(self) -> int:
        """Steps that are run x width x height."""
        return self.schedule.steps_run * self.backend.width * self.backend.height


def _larger(hires: HiresParams, first: BackendChoice) -> tuple[int, int]:
    """The second pass's size, in multiples of what the model takes, rounded down as A1111 does."""
    multiple = first.model.size_multiple
    width, height = (int(side * hires.scale) // multiple * multiple for side in (first.width, first.height))
    if max(width, height) > MAX_SIDE:
        most = math.floor(100 * MAX_SIDE / max(first.width, first.height)) / 100
        raise InvalidValueError(
            f"hires.scale {hires.scale:g} makes {width}x{height} of {first.width}x{first.height}, and a side has at "
            f"most {MAX_SIDE} pixels: use at most {most:g}, or a smaller width and height",
            "hires",
        )
    return width, height


def _schedule_steps(steps: int, strength: float, sampler: str) -> int:
    """Steps of a whole schedule of which `strength` leaves exactly `steps`, by diffusers' rule `int(all * strength)`.

    A1111 too runs as many steps as were asked for, whatever the denoising strength.
    """
    spec = SAMPLERS[sampler]
    share = steps / strength  # infinity for a strength near 0
    whole = max(1, math.floor(min(share, spec.max_steps + 1)))
    while int(whole * strength) < steps and whole <= spec.max_steps:
        whole += 1
    if not spec.min_steps <= whole <= spec.max_steps:
        raise InvalidValueError(
            f"hires.steps {steps} with hires.strength {strength:g} needs a schedule of {max(whole, share):g} steps, "
            f"and sampler '{sampler}' takes {spec.min_steps} to {spec.max_steps}: change hires.steps or hires.strength",
            "hires",
        )
    return whole
