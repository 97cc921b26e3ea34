"""A sampler around any of diffusers' schedulers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from pipelines.diffusers_compat import begin_schedule_at, brownian_levels, brownian_tree, takes_generator
from pipelines.sampling.base import part_of_schedule

if TYPE_CHECKING:
    import torch

    from pipelines.plan import ScheduleSlice


RUNGE_KUTTA_STEPS = 4
"""PNDM begins with so many Runge-Kutta steps; with fewer in all, diffusers draws by its linear multistep alone."""


class DiffusersSampler:
    """One diffusers scheduler on its way through one part of its schedule; the scheduler holds the solver's history.

    Members are those of `pipelines.sampling.base.Sampler`.
    """

    def __init__(
        self,
        scheduler: str,
        settings: Mapping[str, Any],
        config: Mapping[str, Any],
        part: ScheduleSlice,
        seed: int,
    ) -> None:
        """Set up the scheduler as diffusers' pipelines do.

        Args:
            scheduler: class name in diffusers.
            settings: what differs from the model's own configuration.
            config: the model's `scheduler_config.json`.
            part: number of steps and which part of them to run; an `eta` needs a scheduler that takes one.
            seed: for the Brownian tree of the DPM SDE samplers, the only ones that do not draw from the generator.
        """
        import diffusers  # when a sampler is made, not before: the ingress needs just the names

        own = dict(settings)
        if scheduler == "PNDMScheduler" and part.steps < RUNGE_KUTTA_STEPS:
            own["skip_prk_steps"] = True
        self._scheduler = getattr(diffusers, scheduler).from_config(dict(config), **own)
        self._scheduler.set_timesteps(part.steps)
        self.order: int = self._scheduler.order
        every = cast("torch.Tensor", self._scheduler.timesteps)
        if not hasattr(self._scheduler, "sigmas"):
            # For 62 numbers of steps (61, 103, ...) the rounding of "trailing" spacing adds a timestep -1, which these
            # schedulers take for the noisiest of all: the picture would be grey. Those with sigmas do not look it up.
            every = every[every >= 0]
        ticks = part_of_schedule(every, part, self.order, self._scheduler.config.num_train_timesteps)
        # Always: two timesteps can be equal, and a scheduler that looks its first one up finds the second.
        begin_schedule_at(self._scheduler, ticks.start)
        self.timesteps = every[ticks]
        self._first = every[ticks.start : ticks.start + 1]
        self._takes_generator = takes_generator(self._scheduler)
        self._seed = seed
        self._eta = {"eta": part.eta} if part.eta else {}
        self.tree_levels = brownian_levels(self._scheduler)
        """Lowest and highest noise level of the Brownian tree, for the samplers that ask one."""

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise a picture from text begins with."""
        return float(self._scheduler.init_noise_sigma)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Noise `latents` up to where the part begins (img2img), also where its end leaves it no timestep."""
        return cast("torch.Tensor", self._scheduler.add_noise(latents, noise, self._first))

    def add_noise_at(self, latents: torch.Tensor, noise: torch.Tensor, tick: int) -> torch.Tensor:
        """Noise `latents` up to `timesteps[tick]`, after the step before it."""
        at = self.timesteps[tick : tick + 1]
        return cast("torch.Tensor", self._scheduler.add_noise(latents, noise, at))

    def scale_input(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """What the UNet sees of `latents` at `timestep`."""
        return cast("torch.Tensor", self._scheduler.scale_model_input(latents, timestep))

    def step(
        self, model_output: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Advance `latents` `[1, channels, height, width]` by one tick; noise comes from the CPU."""
        if self.tree_levels and self._scheduler.noise_sampler is None:
            tree = brownian_tree(latents.shape, latents.dtype, self.tree_levels, self._seed)
            self.ask_instead_of_the_tree(lambda sigma, sigma_next: tree(sigma, sigma_next).to(latents.device))
        extra = ({"generator": generator} if self._takes_generator else {}) | self._eta
        stepped = self._scheduler.step(model_output, timestep, latents, return_dict=False, **extra)
        return cast("torch.Tensor", stepped[0])

    def ask_instead_of_the_tree(self, noise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        """Where the noise between two noise levels comes from, for samplers that ask a Brownian tree."""
        if self.tree_levels:
            self._scheduler.noise_sampler = noise
