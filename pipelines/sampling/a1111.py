"""AUTOMATIC1111's names of samplers and schedule types, and ours.

A1111 names solver and noise schedule apart, ours name both: "DPM++ 2M" with "Karras" is "DPM++ 2M Karras".
"""

from __future__ import annotations

from config.choices import UnknownChoiceError
from pipelines.sampling.samplers import SAMPLER_CHOICES, SAMPLERS

KARRAS = " Karras"
_THEIRS = {"PNDM": "PLMS", "UniPC 2M": "UniPC", "DPM SDE": "DPM++ SDE", "DEIS 2M": "DEIS"}
"""Ours -> A1111's or Forge's, where the same solver has another name there."""
_OURS = {theirs.casefold(): ours for ours, theirs in _THEIRS.items()}
_ALWAYS_KARRAS = frozenset({"dpm++ 2m", "dpm++ sde", "dpm++ 2s a", "dpm2", "dpm2 a"})
"""Samplers for which A1111's schedule type "Automatic" means Karras'."""
SCHEDULES = {"automatic": "Automatic", "uniform": "Uniform", "karras": "Karras"}
"""Schedule types that are served, by name, and their labels. "Uniform" is what the model's own configuration says."""


def their_sampler(name: str) -> tuple[str, str]:
    """A1111's sampler and schedule type of a sampler of ours."""
    base = name.removesuffix(KARRAS)
    return _THEIRS.get(base, base), "Karras" if name.endswith(KARRAS) else "Uniform"


def their_samplers() -> dict[str, str]:
    """A1111's name of each solver -> ours, without schedule types; those of EDM models are left out."""
    return {their_sampler(n)[0]: n for n, spec in SAMPLERS.items() if not n.endswith(KARRAS) and not spec.edm}


def our_sampler(sampler: str, schedule: str = "Automatic") -> str | None:
    """Our name of A1111's sampler and schedule type, None where there is no equal.

    "Automatic" is A1111's own choice where that is Karras' schedule or the plain one; its exponential schedules, for
    "DPM++ 2M SDE", are not here, so that this is the plain one too.
    """
    name, wanted = sampler.strip().casefold(), schedule.strip().casefold()
    base = name.removesuffix(KARRAS.casefold())
    karras = wanted == "karras" or (wanted == "automatic" and (name != base or base in _ALWAYS_KARRAS))
    ours = _OURS.get(base, base)
    try:
        return SAMPLER_CHOICES.resolve(ours + KARRAS if karras else ours)
    except UnknownChoiceError:
        return None
