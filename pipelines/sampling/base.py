"""The interface of a sampler, and how a schedule is cut into the part that a stage runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from pipelines.plan import ScheduleSlice


class Sampler(Protocol):
    """A solver on one job's part of the schedule. One job owns it, so it may keep the solver's history.

    `DiffusersSampler` is one around any diffusers scheduler; a sampler of one's own needs just these members. All noise
    must come from the generator that `step` is given: the same seed then gives the same picture on every machine.

    One that is linear, remembers tensors in attributes (also inside lists, mappings and objects), draws at most once a
    tick with `torch.randn` and can be deep-copied is run as a table (`tables.py`); any other by its own `step`.
    """

    timesteps: torch.Tensor
    """What the UNet is asked at each tick, in order, `[ticks]`, in training timesteps (they may lie between two)."""
    order: int
    """UNet evaluations that one step takes: 2 for Heun and the DPM2 family."""

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise a picture from text begins with."""
        ...

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Noise `latents` up to where the part begins (img2img).

        That is the first of `timesteps`, unless `end` leaves none of them: diffusers' img2img pipeline noises the
        picture to the timestep its strength begins at, and the refiner goes on from there.
        """
        ...

    def add_noise_at(self, latents: torch.Tensor, noise: torch.Tensor, tick: int) -> torch.Tensor:
        """Noise `latents` up to `timesteps[tick]`, between two steps: what stays of a picture while a part is drawn.

        Only asked for masks; a sampler without it cannot serve them.
        """
        ...

    def scale_input(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """What the UNet sees of `latents` at `timestep`, in the scale it was trained on."""
        ...

    def step(
        self, model_output: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Advance `latents` `[1, channels, height, width]` by one tick.

        Args:
            model_output: the guided prediction at `timestep`, in the model's `prediction_type`.
            timestep: one of `timesteps`; they come in order, each once.
            latents: what the last step returned.
            generator: the job's own, on the CPU; the only source of noise.
        """
        ...


MakeSampler = Callable[[Mapping[str, Any], "ScheduleSlice", int], Sampler]
"""`(scheduler_config, part, seed) -> Sampler`: a new one for a job, or for `pipelines.sampling.probing` to read.

`scheduler_config` is the model's `scheduler_config.json` (betas, prediction type, timestep spacing). `part` says how
many steps the whole schedule has and which of them to run (see `part_of_schedule`). Its own tensors stay on the CPU;
the latents may be elsewhere.
"""


def part_of_schedule(timesteps: torch.Tensor, part: ScheduleSlice, order: int, trained: int) -> slice:
    """Which ticks of a schedule a stage runs, as the diffusers pipelines cut it, so that the same ticks remain.

    Source: `get_timesteps` and the `denoising_end` branch of StableDiffusionXLImg2ImgPipeline.

    Args:
        timesteps: of the whole schedule, descending, `[ticks]`.
        part: strength, start and end.
        order: UNet evaluations of one step.
        trained: number of training timesteps, usually 1000.
    """
    begin, end = 0, len(timesteps)
    if part.start is not None:
        cutoff = round(trained - part.start * trained)
        kept = int((timesteps < cutoff).sum())
        if order == 2 and kept % 2 == 0:
            kept += 1  # an even count would begin between the two halves of a step
        begin = len(timesteps) - kept
    elif part.strength is not None:
        begin = (part.steps - min(int(part.steps * part.strength), part.steps)) * order
    if part.end is not None:
        cutoff = round(trained - part.end * trained)
        end = begin + int((timesteps[begin:] >= cutoff).sum())
    return slice(begin, end)
