"""Names that A1111's clients send, and the errors for unknown ones."""

from __future__ import annotations

from collections.abc import Iterable

from config.choices import Choices, UnknownChoiceError
from pipelines.errors import InvalidValueError
from pipelines.sampling.a1111 import SCHEDULES, our_sampler, their_sampler, their_samplers

_SAME_SCHEDULE = {"discrete": "automatic", "default": "automatic", "normal": "uniform"}
"""Schedules by the names of sd.cpp's and ComfyUI's clients."""


def sampler_of(sampler: str | None, scheduler: str | None, default: str) -> str:
    """Our sampler for A1111's sampler and schedule type; `default` where neither is named.

    Raises:
        InvalidValueError: one is not known, or the two do not go together here.
    """
    schedule = (scheduler or "automatic").strip().casefold()
    schedule = _SAME_SCHEDULE.get(schedule, schedule)
    if schedule not in SCHEDULES:
        raise unknown("scheduler", str(scheduler), SCHEDULES)
    if sampler is None and schedule == "automatic":
        return default
    name = sampler or their_sampler(default)[0]
    if (ours := our_sampler(name, schedule)) is not None:
        return ours
    if our_sampler(name, "uniform") is None:
        try:
            Choices("sampler_name", their_samplers()).resolve(name)
        except UnknownChoiceError as error:
            raise InvalidValueError(str(error), "sampler_name") from None
    takers = [theirs for theirs in their_samplers() if our_sampler(theirs, schedule)]
    raise InvalidValueError(
        f"scheduler '{schedule}' is not available for sampler '{name}', only for {takers}", "scheduler"
    )


def unknown(
    field: str, value: str, allowed: Iterable[str], suggestion: str | None = None, param: str | None = None
) -> InvalidValueError:
    """The error of a name that is not among the allowed ones; `param` is the field that `field` is a part of."""
    return InvalidValueError(str(UnknownChoiceError(field, value, allowed, suggestion)), param or field)
