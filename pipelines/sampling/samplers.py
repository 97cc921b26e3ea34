"""The 27 sampler names of the contract, as diffusers schedulers with exact settings.

A `Sampler` is one scheduler object walking one slice of its schedule for one job. The base configuration (betas,
prediction type, timestep spacing) always comes from the model's own `scheduler_config.json`; the table below overrides
only what the name says. diffusers is imported when a sampler is made, not before: the ingress needs just the names.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from config.choices import Choices
from pipelines.errors import InvalidValueError

if TYPE_CHECKING:
    import torch

    from pipelines.plan import ScheduleSlice


@dataclass(frozen=True)
class SamplerSpec:
    """What a sampler name stands for."""

    scheduler: str
    """Class name in diffusers."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    min_steps: int = 1
    max_steps: int = 1000
    edm: bool = False
    """Works in the EDM formulation (Karras et al. 2022), so on EDM models alone."""


def _plain(scheduler: str, **settings: Any) -> SamplerSpec:
    return SamplerSpec(scheduler, settings)


def _karras(scheduler: str, karras: bool) -> SamplerSpec:
    return SamplerSpec(scheduler, {"use_karras_sigmas": karras})


def _solver(scheduler: str, karras: bool = False, **settings: Any) -> SamplerSpec:
    return SamplerSpec(scheduler, {"solver_order": 2, "use_karras_sigmas": karras} | settings)


def _dpmpp(algorithm: str, solver_type: str, karras: bool) -> SamplerSpec:
    settings = {"algorithm_type": algorithm, "solver_type": solver_type, "final_sigmas_type": "zero"}
    return _solver("DPMSolverMultistepScheduler", karras, **settings)


# The first DPM-Solver divides by the last sigma; diffusers refuses final_sigmas_type "zero" with it.
_DPM: dict[str, Any] = {"algorithm_type": "dpmsolver", "solver_type": "midpoint", "final_sigmas_type": "sigma_min"}

SAMPLERS: Mapping[str, SamplerSpec] = {
    "DDIM": _plain("DDIMScheduler"),
    "DDPM": _plain("DDPMScheduler"),
    "DEIS 2M": _solver("DEISMultistepScheduler", algorithm_type="deis", solver_type="logrho"),
    "DPM 2M": _solver("DPMSolverMultistepScheduler", **_DPM),
    "DPM 2S": _solver("DPMSolverSinglestepScheduler", **_DPM),
    "DPM SDE": _karras("DPMSolverSDEScheduler", False),
    "DPM SDE Karras": _karras("DPMSolverSDEScheduler", True),
    "DPM++ 2M": _dpmpp("dpmsolver++", "midpoint", False),
    "DPM++ 2M Karras": _dpmpp("dpmsolver++", "midpoint", True),
    "DPM++ 2M SDE": _dpmpp("sde-dpmsolver++", "midpoint", False),
    "DPM++ 2M SDE Heun": _dpmpp("sde-dpmsolver++", "heun", False),
    "DPM++ 2M SDE Heun Karras": _dpmpp("sde-dpmsolver++", "heun", True),
    "DPM++ 2M SDE Karras": _dpmpp("sde-dpmsolver++", "midpoint", True),
    "DPM++ 2S": _solver(
        "DPMSolverSinglestepScheduler",
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
    "Euler a": _plain("EulerAncestralDiscreteScheduler"),
    "Heun": _karras("HeunDiscreteScheduler", False),
    # The LCM schedule is a subset of its 50 distillation steps.
    "LCM": SamplerSpec("LCMScheduler", {"original_inference_steps": 50}, max_steps=50),
    "LMS": _karras("LMSDiscreteScheduler", False),
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


def check_sampler(name: str, steps: int, edm_model: bool) -> None:
    """Raise InvalidValueError when the sampler cannot serve the model or the number of steps."""
    spec = SAMPLERS[name]
    if spec.edm != edm_model:
        allowed = [n for n, s in SAMPLERS.items() if s.edm == edm_model]
        raise InvalidValueError(f"sampler '{name}' cannot serve this model. Only {allowed} allowed now", "sampler")
    if not spec.min_steps <= steps <= spec.max_steps:
        span = f"{spec.min_steps} to {spec.max_steps}"
        raise InvalidValueError(f"steps {steps} is out of range: sampler '{name}' takes {span} steps", "steps")


class Sampler:
    """One diffusers scheduler on its way through one slice of its schedule. One job owns it; it holds solver history.

    Attributes:
        timesteps: what the UNet is asked at each tick, in order, `[ticks]`.
        order: ticks a step takes (2 for Heun and the DPM2 family).
    """

    def __init__(
        self, name: str, config: Mapping[str, Any], part: ScheduleSlice, seed: int, device: str | torch.device = "cpu"
    ) -> None:
        """Set up the scheduler as diffusers' pipelines do.

        Args:
            name: canonical sampler name.
            config: the model's `scheduler_config.json`.
            part: number of steps and which part of them to run.
            seed: for the Brownian tree of the DPM SDE samplers, the only ones that do not draw from the generator.
            device: where the latents live.
        """
        import diffusers

        spec = SAMPLERS[name]
        settings = dict(spec.settings)
        if spec.scheduler == "DPMSolverSDEScheduler":
            settings["noise_sampler_seed"] = seed
        self._scheduler = getattr(diffusers, spec.scheduler).from_config(dict(config), **settings)
        self._scheduler.set_timesteps(part.steps, device=device)
        self.order: int = self._scheduler.order
        self.timesteps: torch.Tensor = self._slice(part)
        accepted = inspect.signature(self._scheduler.step).parameters
        self._takes_generator = "generator" in accepted

    def _slice(self, part: ScheduleSlice) -> torch.Tensor:
        """Cut the schedule as the diffusers pipelines do, so that the same ticks remain.

        Source: `get_timesteps` and the `denoising_end` branch of StableDiffusionXLImg2ImgPipeline.
        """
        scheduler = self._scheduler
        timesteps = cast("torch.Tensor", scheduler.timesteps)
        trained = scheduler.config.num_train_timesteps
        begin = 0
        if part.start is not None:
            cutoff = round(trained - part.start * trained)
            kept = int((timesteps < cutoff).sum())
            if self.order == 2 and kept % 2 == 0:
                kept += 1  # an even count would begin between the two halves of a step
            begin = len(timesteps) - kept
        elif part.strength is not None:
            begin = (part.steps - min(int(part.steps * part.strength), part.steps)) * self.order
        if part.start is not None or part.strength is not None:
            timesteps = timesteps[begin:]
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(begin)
        if part.end is not None:
            cutoff = round(trained - part.end * trained)
            timesteps = timesteps[: int((timesteps >= cutoff).sum())]
        return timesteps

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise a picture from text begins with."""
        return float(self._scheduler.init_noise_sigma)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Noise `latents` up to the first timestep of the slice (img2img)."""
        return cast("torch.Tensor", self._scheduler.add_noise(latents, noise, self.timesteps[:1]))

    def scale_input(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """What the UNet sees of `latents` at `timestep`."""
        return cast("torch.Tensor", self._scheduler.scale_model_input(latents, timestep))

    def step(
        self, model_output: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Advance `latents` `[1, channels, height, width]` by one tick; noise comes from `generator` alone."""
        extra = {"generator": generator} if self._takes_generator else {}
        stepped = self._scheduler.step(model_output, timestep, latents, return_dict=False, **extra)
        return cast("torch.Tensor", stepped[0])
