"""The sampler names a request may ask for, and what each stands for.

All but those with a `make` of their own are diffusers schedulers with exact settings. The base configuration (betas,
prediction type, timestep spacing) always comes from the model's own `scheduler_config.json`; the table overrides only
what the name says. Neither torch nor diffusers is imported here: the ingress needs just the names.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from config.choices import Choices
from pipelines.errors import InvalidValueError
from pipelines.plan import MAX_STEPS, MIN_STEPS
from pipelines.sampling.base import MakeSampler, Sampler
from pipelines.sampling.diffusers_sampler import DiffusersSampler

if TYPE_CHECKING:
    from pipelines.plan import ScheduleSlice


@dataclass(frozen=True)
class SamplerSpec:
    """What a sampler name stands for."""

    scheduler: str
    """Class name, which `GET /v1/samplers` shows; in diffusers, unless `make` is given."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the name changes in the model's scheduler configuration."""
    min_steps: int = MIN_STEPS
    max_steps: int = MAX_STEPS
    eta: bool = False
    """Takes an `eta` above 0."""
    edm: bool = False
    """Works in the EDM formulation (Karras et al. 2022), so on EDM models alone."""
    make: MakeSampler | None = None
    """Makes a job's sampler; None takes the diffusers scheduler. `tests/unit/test_samplers.py` has a small example."""


_LOOKED_UP = 999
"""Most steps of schedulers that look timesteps up among 1000 trained ones: from an offset of 1, 1000 are too many."""
_DISTINCT = 768
"""Most steps of solvers that divide by the difference of two noise levels: with more, whole timesteps repeat somewhere.

The first number of steps that gives values that are not finite is 769 with "trailing" spacing, 999 with "leading" and
1000 with "linspace" (diffusers 0.42); `tests/unit/test_schedules.py` tries every sampler at its limit.
"""


def _plain(scheduler: str, max_steps: int = _LOOKED_UP, eta: bool = False, **settings: Any) -> SamplerSpec:
    return SamplerSpec(scheduler, settings, max_steps=max_steps, eta=eta)


def _karras(scheduler: str, karras: bool, max_steps: int = MAX_STEPS) -> SamplerSpec:
    return SamplerSpec(scheduler, {"use_karras_sigmas": karras}, max_steps=max_steps)


def _solver(scheduler: str, karras: bool = False, max_steps: int = _DISTINCT, **settings: Any) -> SamplerSpec:
    return SamplerSpec(scheduler, {"solver_order": 2, "use_karras_sigmas": karras} | settings, max_steps=max_steps)


def _dpmpp(algorithm: str, solver_type: str, karras: bool) -> SamplerSpec:
    settings = {"algorithm_type": algorithm, "solver_type": solver_type, "final_sigmas_type": "zero"}
    most = MAX_STEPS if karras else _DISTINCT  # Karras' noise levels do not come from whole timesteps
    return _solver("DPMSolverMultistepScheduler", karras, most, **settings)


# The first DPM-Solver divides by the last sigma; diffusers refuses final_sigmas_type "zero" with it.
_DPM: dict[str, Any] = {"algorithm_type": "dpmsolver", "solver_type": "midpoint", "final_sigmas_type": "sigma_min"}

SAMPLERS: Mapping[str, SamplerSpec] = {
    "DDIM": _plain("DDIMScheduler", eta=True),
    "DDPM": _plain("DDPMScheduler"),
    "DEIS 2M": _solver("DEISMultistepScheduler", algorithm_type="deis", solver_type="logrho"),
    "DPM 2M": _solver("DPMSolverMultistepScheduler", **_DPM),
    "DPM 2S": _solver("DPMSolverSinglestepScheduler", max_steps=MAX_STEPS, **_DPM),
    "DPM SDE": _karras("DPMSolverSDEScheduler", False, _DISTINCT),
    "DPM SDE Karras": _karras("DPMSolverSDEScheduler", True),
    "DPM++ 2M": _dpmpp("dpmsolver++", "midpoint", False),
    "DPM++ 2M Karras": _dpmpp("dpmsolver++", "midpoint", True),
    "DPM++ 2M SDE": _dpmpp("sde-dpmsolver++", "midpoint", False),
    "DPM++ 2M SDE Heun": _dpmpp("sde-dpmsolver++", "heun", False),
    "DPM++ 2M SDE Heun Karras": _dpmpp("sde-dpmsolver++", "heun", True),
    "DPM++ 2M SDE Karras": _dpmpp("sde-dpmsolver++", "midpoint", True),
    "DPM++ 2S": _solver(
        "DPMSolverSinglestepScheduler",
        max_steps=MAX_STEPS,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        final_sigmas_type="zero",
    ),
    "DPM2": _karras("KDPM2DiscreteScheduler", False),
    "DPM2 Karras": _karras("KDPM2DiscreteScheduler", True),
    "DPM2 a": _karras("KDPM2AncestralDiscreteScheduler", False),
    "DPM2 a Karras": _karras("KDPM2AncestralDiscreteScheduler", True),
    "EDM_Euler": SamplerSpec("EDMEulerScheduler", edm=True),
    "Euler": _karras("EulerDiscreteScheduler", False),
    "Euler a": _plain("EulerAncestralDiscreteScheduler", MAX_STEPS),
    "Heun": _karras("HeunDiscreteScheduler", False),
    # The LCM schedule is a subset of its 50 distillation steps.
    "LCM": SamplerSpec("LCMScheduler", {"original_inference_steps": 50}, max_steps=50),
    "LMS": _karras("LMSDiscreteScheduler", False, _DISTINCT),
    "LMS Karras": _karras("LMSDiscreteScheduler", True),
    "PNDM": _plain("PNDMScheduler"),
    "UniPC 2M": _solver("UniPCMultistepScheduler", solver_type="bh2", predict_x0=True, final_sigmas_type="zero"),
}

SAMPLER_CHOICES = Choices(
    "sampler",
    SAMPLERS,
    {
        "K_EULER": "Euler",
        "K_EULER_ANCESTRAL": "Euler a",
        "K_HEUN": "Heun",
        "K_LMS": "LMS",
        "K_DPM_2": "DPM2",
        "K_DPM_2_ANCESTRAL": "DPM2 a",
        "K_DPMPP_2M": "DPM++ 2M",
        # diffusers has no ancestral 2S; the deterministic one is its nearest relative.
        "K_DPMPP_2S_ANCESTRAL": "DPM++ 2S",
    },
)


def check_sampler(name: str, steps: int, edm_model: bool, eta: float = 0.0) -> None:
    """Raise InvalidValueError when the sampler cannot serve the model, the number of steps or an `eta` above 0."""
    spec = SAMPLERS[name]
    if spec.edm != edm_model:
        allowed = [n for n, s in SAMPLERS.items() if s.edm == edm_model]
        raise InvalidValueError(f"sampler '{name}' cannot serve this model. Only {allowed} allowed now", "sampler")
    if eta and not spec.eta:
        takers = [n for n, s in SAMPLERS.items() if s.eta]
        raise InvalidValueError(f"eta {eta} cannot be used with sampler '{name}': only {takers} take one", "eta")
    if not spec.min_steps <= steps <= spec.max_steps:
        span = f"{spec.min_steps} to {spec.max_steps}"
        raise InvalidValueError(f"steps {steps} is out of range: sampler '{name}' takes {span} steps", "steps")


def make_sampler(name: str, config: Mapping[str, Any], part: ScheduleSlice, seed: int) -> Sampler:
    """A new sampler for one job.

    Args:
        name: canonical sampler name.
        config: the model's `scheduler_config.json`.
        part: number of steps and which part of them to run.
        seed: of the job, for samplers that keep a noise source of their own.
    """
    spec = SAMPLERS[name]
    make = spec.make or functools.partial(DiffusersSampler, spec.scheduler, spec.settings)
    return make(config, part, seed)
