"""One training loop for everything: warm-up and cosine, moving average, checkpoints to go on from, time left."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

CHECKPOINT_EVERY_S = 120.0
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: `steps` optimizer steps, the peak learning rate, the length of the moving average."""

    steps: int
    learning_rate: float
    warmup: int = 100
    average: float = 0.998
    clip: float = 1.0

    def rate(self, step: int) -> float:
        """The learning rate of `step`: linear warm-up, then a cosine down to 3 %."""
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * max(0.03, cosine)


def train(
    name: str,
    model: M,
    loss_of: Callable[[M], Tensor],
    schedule: Schedule,
    checkpoint: Path,
    report: Callable[[M], str] | None = None,
    compiled: bool = False,
) -> M:
    """Train `model`; returns the moving average of its weights, in evaluation mode.

    Every step draws its randomness from its own number, so that a run which was interrupted and goes on from
    `checkpoint` sees the data an uninterrupted one sees.

    Args:
        name: for the progress bar.
        model: updated in place.
        loss_of: draws a batch and returns the loss.
        schedule: the number of steps and the rates.
        checkpoint: read if it exists, written every two minutes and at the end.
        report: what to print about the average beside each checkpoint.
        compiled: run the model through torch.compile, which takes two minutes at first and then less than half the
            time; `loss_of` must only call the model.
    """
    asked = cast("M", torch.compile(model)) if compiled else model
    average = copy.deepcopy(model).eval().requires_grad_(False)
    weights = [p for p in model.parameters() if p.requires_grad]
    averaged = [a for a, p in zip(average.parameters(), model.parameters(), strict=True) if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, schedule.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=weights[0].device)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]

    def save(step: int) -> None:
        state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        scratch = checkpoint.with_suffix(".partial")
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state | {"step": step}, scratch)
        scratch.replace(checkpoint)

    model.train()
    recent = 0.0
    saved_at = time.monotonic()
    bar = tqdm(range(first, schedule.steps), name, total=schedule.steps, initial=first, mininterval=5)
    for step in bar:
        torch.manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        loss = loss_of(asked)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, schedule.clip)
        optimizer.step()
        with torch.no_grad():
            newest = 1 - min(schedule.average, (1 + step) / (10 + step))
            for kept, now in zip(averaged, weights, strict=True):
                kept.lerp_(now, newest)
            for mine, its in zip(average.buffers(), model.buffers(), strict=True):  # a batch norm's running statistics
                mine.copy_(its)
        recent = loss.item() if step == first else 0.98 * recent + 0.02 * loss.item()
        bar.set_postfix(loss=f"{recent:.4f}")
        if time.monotonic() - saved_at > CHECKPOINT_EVERY_S:
            save(step + 1)
            saved_at = time.monotonic()
            if report:
                tqdm.write(f"{name} step {step + 1}: {report(average)}")
    save(schedule.steps)
    if report:
        tqdm.write(f"{name} done: {report(average)}")
    return average
