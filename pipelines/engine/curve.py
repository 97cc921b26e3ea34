"""How many rows of a tick are worth their time on this device, measured at start for each common shape (ENG-19).

Where a UNet leaves a device idle (small pictures, launch-bound GPUs) a row more is almost free, and jobs that share a
tick gain. Where it is busy already, a row more costs what the first ones did: sharing gains nothing then, and everybody
in the tick waits longer.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from pipelines.backends.base import Denoiser, StepBatch
from pipelines.engine.batching import BatchKey
from pipelines.torch_compat import ran_out_of_memory

logger = logging.getLogger(__name__)

GUIDED = 2
"""Rows of one guided picture, with which a curve begins."""
ROWS = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Where a curve is measured, as far as the row budget goes."""
WARM_UP, MEASURED = 3, 3
"""Evaluations of each point: those that choose algorithms, and those whose median counts."""


def worthwhile_rows(seconds: Mapping[int, float], price: float) -> int:
    """The most rows of a tick such that a row more always cost less than `price` of one of the first.

    Args:
        seconds: of a tick, by its rows, the fewest first; those are the first ones.
        price: as a share of what each of the first rows costs.
    """
    (rows, spent), *more = seconds.items()
    first = spent / rows
    for many, longer in more:
        if longer - spent >= price * first * (many - rows):
            break
        rows, spent = many, longer
    return rows


def measure(evaluate: Callable[[int], object], max_rows: int, clock: Callable[[], float]) -> dict[int, float]:
    """Seconds of a tick by its rows, up to `max_rows` or what memory holds.

    Args:
        evaluate: evaluates the UNet for so many rows and waits for it.
        max_rows: of a tick.
        clock: seconds.
    """
    curve: dict[int, float] = {}
    for rows in [rows for rows in ROWS if rows <= max_rows] or [max_rows]:
        try:
            curve[rows] = _seconds(evaluate, rows, clock)
        except Exception as error:
            if not curve or not ran_out_of_memory(error):
                raise
            logger.warning("out of memory with %d rows, so larger ticks are not measured", rows)
            break
    return curve


def _seconds(evaluate: Callable[[int], object], rows: int, clock: Callable[[], float]) -> float:
    taken = []
    for _ in range(WARM_UP + MEASURED):
        begin = clock()
        evaluate(rows)
        taken.append(clock() - begin)
    return statistics.median(taken[WARM_UP:])


def trial_batch(denoiser: Denoiser, key: BatchKey, pooled: int, rows: int) -> StepBatch:
    """Random rows as jobs bring them, no LoRA and no ControlNet.

    Args:
        denoiser: the UNet.
        key: shapes of latents and context; channels are the UNet's.
        pooled: width of SDXL's pooled embeddings; 0 for SD.
        rows: how many.
    """
    config, generator = denoiser.config, torch.Generator().manual_seed(0)
    shapes = {"sample": (config["in_channels"], *key.latent_shape[1:]), "prompt_embeds": key.context_shape}
    if pooled:
        ids = (config["projection_class_embeddings_input_dim"] - pooled) // config["addition_time_embed_dim"]
        shapes |= {"text_embeds": (pooled,), "time_ids": (ids,)}
    made = {name: torch.randn(rows, *shape, generator=generator) for name, shape in shapes.items()}
    sent = {name: tensor.to(denoiser.device, denoiser.dtype) for name, tensor in made.items()}
    return StepBatch(
        sample=sent.pop("sample"),
        timesteps=torch.full((rows,), 500.0).to(denoiser.device),
        prompt_embeds=sent.pop("prompt_embeds"),
        added_conditions=sent,
        loras=[()] * rows,
    )


class RowCurves:
    """The number of rows that are worth their time, for each shape; that of the nearest size that was measured."""

    def __init__(self, evaluate: Callable[[BatchKey, int], object], price: float, max_rows: int) -> None:
        """Measure with `evaluate`; see `measure` and `worthwhile_rows` for the arguments."""
        self._evaluate, self._price, self._max_rows = evaluate, price, max_rows
        self.rows: dict[BatchKey, int] = {}

    def measure(self, keys: Sequence[BatchKey], clock: Callable[[], float] = time.perf_counter) -> None:
        """Measure these shapes."""
        for key in keys:
            curve = measure(lambda rows, key=key: self._evaluate(key, rows), self._max_rows, clock)  # type: ignore[misc]
            self.rows[key] = worthwhile_rows(curve, self._price)
            told = {rows: round(1000 * seconds, 1) for rows, seconds in curve.items()}
            logger.info(
                "latents %s: milliseconds of a tick by its rows %s; at most %d rows",
                key.latent_shape,
                told,
                self.rows[key],
            )

    def __call__(self, key: BatchKey) -> int:
        """Most rows of a tick of this shape."""
        nearest = min(self.rows, key=lambda known: abs(math.log(_size(known) / _size(key))))
        return self.rows[nearest]


def _size(key: BatchKey) -> int:
    return math.prod(key.latent_shape)
