"""How a job advances through its schedule: by its sampler's table, or by the sampler's own steps if it has none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from pipelines.engine.guidance import Guidance
from pipelines.sampling.base import Sampler
from pipelines.sampling.table import KEPT_SLOTS, Table
from pipelines.transfers import pinned, send


class KeptPicture(NamedTuple):
    """The picture that stays while a part of it is drawn, as in `StableDiffusionInpaintPipeline`."""

    picture: torch.Tensor
    """`[1, channels, height, width]`: its latents."""
    noise: torch.Tensor
    """The same shape: what it is noised with, at every tick the same."""
    mask: torch.Tensor
    """`[1, 1, height, width]`: 1 is drawn, 0 stays."""


class TableCourse:
    """A job that advances by a table: everything was decided, and all noise drawn, before the first tick."""

    timesteps: Sequence[float]
    """What the UNet is asked at each tick."""
    order: int
    """Ticks of one step."""
    tick: int
    """Ticks done."""
    shape: tuple[int, ...]
    """`[1, channels, height, width]` of the latents."""
    generator_state: torch.Tensor
    """Of the job's noise generator after its last tick, `[bytes]` uint8."""

    def __init__(
        self,
        table: Table,
        latents: torch.Tensor,
        noise: Sequence[torch.Tensor],
        generator_state: torch.Tensor,
        guidance: Guidance,
        device: torch.device,
        kept: KeptPicture | None = None,
    ) -> None:
        """Begin with `latents` `[1, channels, height, width]`.

        Args:
            table: of the sampler.
            latents: on the CPU.
            noise: what `table.draw` gave.
            generator_state: after the last draw.
            guidance: how its outputs become one.
            device: where it will run; its tensors wait in memory that the device can copy from.
            kept: of a picture of which a part stays; the table is one for masks then.
        """
        self.timesteps, self.order, self.tick = table.timesteps, table.order, 0
        self.generator_state = generator_state
        self.shape = tuple(latents.shape)
        self._guidance = guidance
        self._weights = table.guided(guidance.shares)
        self._slots = table.slots
        start = torch.zeros(1 + table.slots + len(noise) + (kept is not None), latents.numel())
        start[1] = latents.flatten()
        start[0] = start[1] * table.first_input
        for row, drawn in zip(start[1 + table.slots :], noise, strict=False):
            row.copy_(drawn.flatten())
        self._masked = kept is not None
        if kept is not None:
            first = 1 + table.slots - KEPT_SLOTS
            start[first], start[first + 1] = kept.picture.flatten(), kept.noise.flatten()
            start[-1] = kept.mask.expand(latents.shape).flatten()
        draws = iter(range(len(noise)))
        self._draws = [None if draw is None else next(draws) for draw in table.draws]
        self._take(pinned(start, device))

    def _take(self, start: torch.Tensor) -> None:
        """The state `[1 + slots, elements]`, next model input first, and the noise of the ticks that draw."""
        self._start: torch.Tensor | None = start
        self._state = start[: 1 + self._slots]
        self._noise = start[1 + self._slots :].split(1)
        self.repainted = start[-1] > 0.5 if self._masked else None
        """`[elements]`: where latents are drawn, None where all of them are."""

    def send(self, device: torch.device) -> None:
        """Move the state and the noise to `device`, in one copy."""
        assert self._start is not None, "sent before the first tick"
        self._take(send(self._start, device))
        self._start = None

    @property
    def latents(self) -> torch.Tensor:
        """`[1, channels, height, width]`, as they stand."""
        return self._state[1].view(self.shape)

    @property
    def guided(self) -> bool:
        """Whether the next tick is guided, and so takes two rows."""
        return self.guided_at(self.tick)

    def guided_at(self, tick: int) -> bool:
        """The same of any tick."""
        return self._guidance.at(tick)

    @property
    def slots(self) -> int:
        """Tensors remembered between ticks."""
        return self._slots

    @property
    def weights(self) -> np.ndarray:
        """Of the next tick, `[1 + slots, 3 + slots]`."""
        own: np.ndarray = self._weights[self.tick]
        return own

    def model_input(self) -> torch.Tensor:
        """What the UNet sees next, `[1, elements]` float32."""
        return self._state[:1]

    def columns(self, output: torch.Tensor, slots: int) -> Iterator[torch.Tensor]:
        """What the next tick's weights multiply, `3 + slots` rows in all: outputs, noise, slots.

        A missing column (no second output, no noise, fewer slots than another job) has the weight zero; a finite
        tensor of the job itself takes its place.
        """
        output = self._guidance.rescaled(output)
        yield from (output,) * (3 - len(output))
        draw = self._draws[self.tick]
        yield self._noise[draw] if draw is not None else self._state[1:2]
        yield self._state[1:]
        yield from (self._state[1:2],) * (slots - self._slots)

    def move_on(self, state: torch.Tensor) -> None:
        """Take the rows `[1 + slots or more, elements]` of the product for the next tick."""
        self._state = state[: 1 + self._slots]
        self.tick += 1


class SamplerCourse:
    """A job that advances by its sampler's own steps; its members are those of `TableCourse`."""

    def __init__(
        self,
        sampler: Sampler,
        latents: torch.Tensor,
        generator: torch.Generator,
        guidance: Guidance,
        kept: KeptPicture | None = None,
    ) -> None:
        """Begin with `latents` `[1, channels, height, width]`, in the model's dtype, on the CPU."""
        self.sampler = sampler
        self.timesteps: Sequence[float] = sampler.timesteps.tolist()
        self.order, self.tick, self.latents = sampler.order, 0, latents
        self.shape = tuple(latents.shape)
        self._generator, self._guidance, self._kept = generator, guidance, kept

    @property
    def generator_state(self) -> torch.Tensor:
        """As it stands."""
        return self._generator.get_state()

    @property
    def guided(self) -> bool:
        """Whether the next tick is guided, and so takes two rows."""
        return self.guided_at(self.tick)

    def guided_at(self, tick: int) -> bool:
        """The same of any tick."""
        return self._guidance.at(tick)

    def send(self, device: torch.device) -> None:
        """Move the latents to `device`."""
        self.latents = send(pinned(self.latents, device), device)
        if self._kept is not None:
            self._kept = KeptPicture(*(send(pinned(tensor, device), device) for tensor in self._kept))

    def model_input(self) -> torch.Tensor:
        """What the UNet sees next, `[1, elements]` float32."""
        scaled = self.sampler.scale_input(self.latents, self.sampler.timesteps[self.tick])
        return scaled.reshape(1, -1).float()

    def advance(self, output: torch.Tensor) -> None:
        """Guide the job's rows `[rows, channels, height, width]` and take the sampler's step."""
        # A copy where guidance makes none: the sampler may remember it, and the next evaluation overwrites `output`.
        guided = output.clone() if len(output) == 1 else self._guidance.combine(output)
        timestep = self.sampler.timesteps[self.tick]
        self.latents = self.sampler.step(guided, timestep, self.latents, self._generator)
        self.tick += 1
        if self._kept is not None:
            stays = self._kept.picture
            if self.tick < len(self.timesteps):
                stays = self.sampler.add_noise_at(stays, self._kept.noise, self.tick)
            self.latents = torch.where(self._kept.mask > 0.5, self.latents, stays)


Course = TableCourse | SamplerCourse


class TickNumbers:
    """The numbers of a tick that are copied from the host, in one copy: timesteps of rows and weights of tables."""

    def __init__(self, courses: Sequence[Course], rows: Sequence[int], device: torch.device) -> None:
        """For these jobs' next tick, of so many rows each."""
        tables = [table for _, table in _tables(courses)]
        slots = max((table.slots for table in tables), default=0)
        shape = (len(tables), 1 + slots, 3 + slots)
        size = shape[0] * shape[1] * shape[2]
        buffer = torch.zeros(size + sum(rows))  # torch's memory is aligned, on which the last bits of a product depend
        numbers = buffer.numpy()
        for matrix, table in zip(numbers[:size].reshape(shape), tables, strict=True):
            own = table.weights
            matrix[: own.shape[0], : own.shape[1]] = own
            if table.repainted is not None:  # what stays is looked for in the last two rows, see `_keep`
                matrix[-2:, : own.shape[1]] = own[-2:]
        numbers[size:] = np.repeat([course.timesteps[course.tick] for course in courses], rows)
        sent = send(pinned(buffer, device), device)
        self.weights = sent[:size].view(shape)
        """`[tables, 1 + slots, 3 + slots]`, in the order of `_tables`, smaller ones padded with zeros."""
        self.timesteps = sent[size:]
        """`[rows]`. Whole numbers below 2^24 are exact in float32, so integer timesteps fit."""


def _tables(courses: Sequence[Course]) -> list[tuple[int, TableCourse]]:
    """Those that go by tables, with their positions; those of which a part stays come first."""
    tables = [(place, course) for place, course in enumerate(courses) if isinstance(course, TableCourse)]
    return sorted(tables, key=lambda placed: placed[1].repainted is None)


def _keep(tables: Sequence[TableCourse], product: torch.Tensor) -> None:
    """Put what stays of pictures over what was drawn, next inputs and latents, of all jobs in one kernel.

    Args:
        tables: in the order of `_tables`.
        product: `[tables, rows, elements]`, changed in place; what stays is in the last two rows.
    """
    masks = [table.repainted for table in tables if table.repainted is not None]
    if masks:
        drawn, stays = product[: len(masks), :2], product[: len(masks), -2:]
        repainted = torch.stack(masks)[:, None] if len(masks) > 1 else masks[0][None, None]
        torch.where(repainted, drawn, stays, out=drawn)


def advance(
    courses: Sequence[Course], rows: Sequence[int], output: torch.Tensor, weights: torch.Tensor
) -> dict[int, Exception]:
    """Advance jobs of whatever samplers by one tick: those with tables in one product, the others one by one.

    Args:
        courses: the jobs' ways.
        rows: how many rows of `output` each has.
        output: `[rows, channels, height, width]` of the model; nothing of it is kept.
        weights: of `TickNumbers`.

    Returns:
        What the own sampler of a job raised, by the job's position. If the product fails nobody has advanced, and it
        is raised.
    """
    placed = _tables(courses)
    if placed:
        flat = output.to(torch.float32, memory_format=torch.contiguous_format).flatten(1).split(list(rows))
        slots = weights.shape[1] - 1
        columns = [column for place, table in placed for column in table.columns(flat[place], slots)]
        product = torch.bmm(weights, torch.cat(columns).view(len(placed), 3 + slots, -1))
        _keep([table for _, table in placed], product)
        for (_, table), state in zip(placed, product.unbind(), strict=True):
            table.move_on(state)
    failures: dict[int, Exception] = {}
    for position, (course, part) in enumerate(zip(courses, output.split(list(rows)), strict=True)):
        if isinstance(course, SamplerCourse):
            try:
                course.advance(part)
            except Exception as error:  # the job's own
                failures[position] = error
    return failures
