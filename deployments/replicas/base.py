"""What every replica that computes has in common."""

from __future__ import annotations

import asyncio
import contextvars
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

from deployments.telemetry.logs import LogFormat, show_logs
from deployments.telemetry.stages import Stopwatch

R = TypeVar("R")


@dataclass(frozen=True)
class Runtime:
    """How a replica computes: the settings it needs, handed down by app.py.

    Attributes:
        device: `auto` is CUDA where the replica was given a GPU.
        torch_threads: CPU threads, the machine's cores if None. Ray sets OMP_NUM_THREADS to 1 on a fraction of a CPU.
        log_format: of its log lines.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    torch_threads: int | None = None
    log_format: LogFormat = "text"

    def apply(self) -> Literal["cpu", "cuda"]:
        """Set this process up; returns the device."""
        import torch

        from pipelines.weights.loading import choose_device

        show_logs(self.log_format)
        torch.set_num_threads(self.torch_threads or os.cpu_count() or 1)
        return choose_device(self.device)


class Wakeable:
    """What every deployment that may sleep answers."""

    async def awake(self) -> None:
        """Nothing: a call starts the first replica of a deployment that has none."""


class Worker:
    """The one thread on which a replica touches its models, so that the event loop stays free to cancel and answer."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="model")

    async def run(self, function: Callable[..., R], *args: object) -> R:
        """Run `function(*args)` after everything handed in before it, in the caller's context (request id, trace)."""
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._executor, context.run, function, *args)

    async def stage(self, watch: Stopwatch, function: Callable[..., R], *args: object) -> R:
        """The same as the work of a stage: until it begins, the stage waits."""

        def work() -> R:
            watch.start_work()
            return function(*args)

        return await self.run(work)

    def submit(self, function: Callable[..., object], *args: object) -> None:
        """Run it without waiting for it."""
        self._executor.submit(contextvars.copy_context().run, function, *args)
