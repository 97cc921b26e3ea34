"""Samplers as tables: what a solver does at a tick, as a small matrix, read off diffusers' own scheduler (ENG-16).

Every sampler here is linear in what it is given, and works on each element of the latents alone. So its own code, run
once on basis vectors, tells the numbers it will multiply with: `[next model input; slots] = W [model output; noise;
slots]`, where the slots are the latents and whatever else the solver remembers from one tick to the next. The engine
then needs no solver, and one product advances jobs of different samplers.

The same run carries random numbers, from zero to very large, in the elements that hold no basis vector, and a second
run carries others. Where one matrix does not tell their ways too (clipping, thresholding, statistics of the picture, a
memory that cannot be seen), the sampler keeps its own `step`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from pipelines.sampling.base import Sampler
from pipelines.sampling.diffusers_sampler import DiffusersSampler
from pipelines.sampling.table import FIRST_SLOT, NOISE, OUTPUT, Draw, Table

_SHAPE = (1, 4, 4, 8)
_BASIS = 16
"""Elements of the probe that hold basis vectors; a solver that needs more columns keeps its own steps."""
_SCALES = (0.0, 1e-3, 1.0, 1e4)
"""Magnitudes of the other elements: what is added shows at zero, what is clipped at the largest."""
_TOLERANCE = 1e-3
"""Of the sum of the magnitudes that are added. Some schedulers round one of two terms that nearly cancel to float32,
which is seen at zero signal-to-noise (2e-5); clipping and its like are off by whole numbers."""


class NotATableError(Exception):
    """A solver whose steps are no matrices."""


@torch.inference_mode()
def read_table(sampler: Sampler, img2img: bool = False, masked: bool = False) -> Table:
    """Run a new sampler through its schedule twice and read off its table.

    Args:
        sampler: on the CPU, not used yet; it can be copied.
        img2img: whether it may be asked to noise a picture.
        masked: whether a part of the picture stays.

    Raises:
        NotATableError: it is not linear, mixes elements, or remembers more than can be seen.
    """
    table, again = (_read(copy.deepcopy(sampler), _Probe(seed), img2img, masked) for seed in (0, 1))
    if not np.allclose(table.weights, again.weights, rtol=1e-5):
        raise NotATableError("its weights depend on the picture")
    return table


def _read(sampler: Sampler, probe: _Probe, img2img: bool, masked: bool) -> Table:
    """The table of one run."""
    generator = torch.Generator()
    untouched = generator.get_state()
    noised = None
    if img2img:
        picture, noise = probe.column(0), probe.column(1)
        noised = tuple(probe.read(sampler.add_noise(picture, noise), [picture, noise]).tolist())
    ticks: list[_Tick] = []
    kept: list[tuple[float, float]] = []
    latents = probe.column(FIRST_SLOT)
    for number, timestep in enumerate(sampler.timesteps):
        slots = [latents, *_remembered(sampler, [latents])]
        output, noise = probe.column(OUTPUT), probe.column(NOISE)
        for place, slot in enumerate(slots):
            probe.write(slot, FIRST_SLOT + place)
        columns = [output.clone(), noise, *(slot.clone() for slot in slots)]
        given = probe.read(sampler.scale_input(latents, timestep), columns)
        with _Intercepted(sampler, generator, noise) as intercepted:
            latents = sampler.step(output, timestep, latents, generator)
        after = [latents, *_remembered(sampler, [latents])]
        ticks.append(_Tick(given, np.stack([probe.read(slot, columns) for slot in after]), intercepted.draw()))
        if masked:
            kept.append(_kept(sampler, probe, number + 1))
    if not torch.equal(generator.get_state(), untouched):
        raise NotATableError("it draws noise by other means than torch.randn")
    weights = _weights(ticks)
    if masked and any(np.count_nonzero(tick.given[FIRST_SLOT + 1 :]) for tick in ticks):
        raise NotATableError("its model input is made of more than the latents")
    if not np.isfinite(weights).all():
        raise NotATableError("its weights are not finite")
    levels = sampler.tree_levels if isinstance(sampler, DiffusersSampler) else None
    return Table(
        timesteps=tuple(sampler.timesteps.tolist()),
        order=sampler.order,
        init_noise_sigma=sampler.init_noise_sigma,
        noised=noised,
        first_input=float(ticks[0].given[FIRST_SLOT]) if ticks else 1.0,
        weights=weights,
        draws=tuple(tick.draw for tick in ticks),
        levels=levels,
        inputs=tuple(float(tick.given[FIRST_SLOT]) for tick in ticks),
        kept=tuple(kept),
    )


def _kept(sampler: Sampler, probe: _Probe, tick: int) -> tuple[float, float]:
    """Weights of picture and noise in what stays of a picture before a tick; after the last it is the picture."""
    if tick == len(sampler.timesteps):
        return 1.0, 0.0
    picture, noise = probe.column(0), probe.column(1)
    of_picture, of_noise = probe.read(sampler.add_noise_at(picture, noise, tick), [picture, noise]).tolist()
    return of_picture, of_noise


class _Tick(NamedTuple):
    """What was read at one tick. Columns: output, noise, and the tensors remembered before it, the latents first."""

    given: np.ndarray
    """`[columns]`: the model input."""
    after: np.ndarray
    """`[remembered after it, columns]`."""
    draw: Draw | None


class _Probe:
    """Tensors of which some elements are basis vectors and the others random numbers, mixed over all axes."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        size = int(np.prod(_SHAPE))
        order = torch.randperm(size, generator=self._generator)
        self._basis, self._tests = order[:_BASIS], order[_BASIS:]
        scales = torch.tensor(_SCALES, dtype=torch.float64)
        self._scale = scales[torch.arange(len(self._tests)) % len(scales)]

    def column(self, number: int) -> torch.Tensor:
        """A new tensor: basis vector `number`, and random numbers."""
        made = torch.zeros(_SHAPE, dtype=torch.float64)
        random = torch.randn(len(self._tests), generator=self._generator, dtype=torch.float64)
        made.view(-1)[self._tests] = random * self._scale
        self.write(made, number)
        return made

    def write(self, tensor: torch.Tensor, number: int) -> None:
        """Make a tensor basis vector `number` in place, leaving its other elements."""
        if number >= _BASIS:
            raise NotATableError(f"it remembers more than {_BASIS - FIRST_SLOT} tensors")
        flat = tensor.flatten()
        flat[self._basis] = (torch.arange(_BASIS) == number).to(tensor.dtype)
        tensor.copy_(flat.view(_SHAPE))

    def read(self, result: torch.Tensor, columns: Sequence[torch.Tensor]) -> np.ndarray:
        """The weights `[columns]` with which `result` is made of `columns`, each basis vector of its own number.

        Raises:
            NotATableError: the random numbers went another way.
        """
        if result.shape != torch.Size(_SHAPE):
            raise NotATableError(f"a result of shape {list(result.shape)} from latents {list(_SHAPE)}")
        weights = result.flatten()[self._basis].double()
        if weights[len(columns) :].count_nonzero():
            raise NotATableError("it mixes elements, or adds something of its own")
        weights = weights[: len(columns)]
        parts = torch.stack([column.flatten()[self._tests].double() for column in columns])
        off = (result.flatten()[self._tests].double() - weights @ parts).abs()
        if not bool((off <= _TOLERANCE * (weights.abs() @ parts.abs())).all()):
            raise NotATableError("its steps are not linear, or depend on what cannot be seen")
        return weights.numpy()


class _Intercepted(TorchFunctionMode):
    """While active, on this thread, a sampler that draws noise gets the probe's."""

    def __init__(self, sampler: Sampler, generator: torch.Generator, noise: torch.Tensor) -> None:
        super().__init__()
        self._generator, self._noise = generator, noise
        self._draws: list[Draw] = []
        if isinstance(sampler, DiffusersSampler):
            sampler.ask_instead_of_the_tree(self._of_a_tree)

    def draw(self) -> Draw | None:
        """What was drawn."""
        if len(self._draws) > 1:
            raise NotATableError("it draws noise more than once a tick")
        return self._draws[0] if self._draws else None

    def _of_a_tree(self, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        self._draws.append(Draw(None, (sigma, sigma_next)))
        return self._noise.clone()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.randn or kwargs.get("generator") is not self._generator:
            return func(*args, **kwargs)
        asked = func(*args, **kwargs | {"generator": torch.Generator()})
        if asked.shape != self._noise.shape:
            raise NotATableError(f"noise of shape {list(asked.shape)} for latents {list(_SHAPE)}")
        self._draws.append(Draw(None if asked.dtype is torch.float64 else asked.dtype))
        return self._noise.to(asked.dtype, copy=True)


def _remembered(owner: object, known: Collection[torch.Tensor]) -> list[torch.Tensor]:
    """Every tensor of the latents' shape that `owner` holds, however deep, but for those known already."""
    seen = {id(tensor) for tensor in known}
    found: list[torch.Tensor] = []

    def look(value: Any) -> None:
        if id(value) in seen or isinstance(value, (str, bytes, int, float, type, ModuleType, FunctionType)):
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if value.shape == torch.Size(_SHAPE) and value.is_floating_point():
                found.append(value)
        elif isinstance(value, Mapping):
            for part in value.values():
                look(part)
        elif isinstance(value, Collection) and not isinstance(value, np.ndarray):
            for part in value:
                look(part)
        elif hasattr(value, "__dict__"):
            look(vars(value))

    look(owner)
    return found


def _weights(ticks: Sequence[_Tick]) -> np.ndarray:
    """One matrix a tick, `[ticks, 1 + slots, 2 + slots]`, of the remembered tensors that anything still depends on."""
    needed = [[0]]  # after the last tick, the latents alone
    for number in reversed(range(len(ticks))):
        rows = ticks[number].after[needed[0]]
        if number + 1 < len(ticks):
            rows = np.vstack([rows, _next_input(ticks, number)])
        used = np.flatnonzero(np.any(rows[:, FIRST_SLOT:] != 0, axis=0))
        needed.insert(0, sorted({0, *used.tolist(), *np.flatnonzero(ticks[number].given[FIRST_SLOT:]).tolist()}))
    slots = max(map(len, needed))
    weights = np.zeros((len(ticks), 1 + slots, FIRST_SLOT + slots), dtype=np.float32)
    for number, tick in enumerate(ticks):
        before, after = needed[number : number + 2]
        columns = [OUTPUT, NOISE, *(FIRST_SLOT + slot for slot in before)]
        weights[number, 1 : 1 + len(after), : len(columns)] = tick.after[after][:, columns]
        if number + 1 < len(ticks):
            weights[number, 0, : len(columns)] = _next_input(ticks, number)[columns]
    return weights


def _next_input(ticks: Sequence[_Tick], number: int) -> np.ndarray:
    """The model input of the next tick by the columns of this one."""
    own: np.ndarray = ticks[number + 1].given[FIRST_SLOT:] @ ticks[number].after
    return own
