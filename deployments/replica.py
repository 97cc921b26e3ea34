"""What every replica that computes has in common."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

from deployments.observability import show_logs

R = TypeVar("R")


@dataclass(frozen=True)
class Runtime:
    """How a replica computes: the settings it needs, handed down by app.py.

    Attributes:
        device: `auto` is CUDA where the replica was given a GPU.
        torch_threads: CPU threads, the machine's cores if None. Ray sets OMP_NUM_THREADS to 1 on a fraction of a CPU.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    torch_threads: int | None = None

    def apply(self) -> Literal["cpu", "cuda"]:
        """Set this process up; returns the device."""
        import torch

        from pipelines.weights import choose_device

        show_logs()
        torch.set_num_threads(self.torch_threads or os.cpu_count() or 1)
        return choose_device(self.device)


class Worker:
    """The one thread on which a replica touches its models, so that the event loop stays free to cancel and answer."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="model")

    async def run(self, function: Callable[..., R], *args: object) -> R:
        """Run `function(*args)` after everything handed in before it."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    def submit(self, function: Callable[..., object], *args: object) -> None:
        """The same, without waiting for it."""
        self._executor.submit(function, *args)
