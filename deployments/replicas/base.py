"""The base of every replica that computes."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Literal

from config.precision import WantedPrecision
from deployments.ray_compat import gpu_share, raised_elsewhere
from deployments.replicas.worker import Worker
from deployments.telemetry.logs import LogFormat, show_logs
from pipelines.errors import LostDeviceError
from pipelines.processor import precision_here

logger = logging.getLogger(__name__)

# Replicas import torch, and what needs it, inside their constructors: building the graph, which imports their
# classes, goes without torch.


@dataclass(frozen=True)
class Runtime:
    """How a replica computes: the settings it needs, handed down by app.py."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is CUDA where the replica was given a GPU."""
    torch_threads: int | None = None
    """CPU threads, the machine's cores if None. Ray sets OMP_NUM_THREADS to 1 on a fraction of a CPU."""
    log_format: LogFormat = "text"
    precision: WantedPrecision = "float32"
    """Of UNets on a CPU."""

    def apply(self) -> Literal["cpu", "cuda"]:
        """Set this process up; returns the device.

        Ray's fraction of a GPU is bookkeeping. It is made true here: more memory than that is an out-of-memory error,
        which an engine and a VAE can handle, instead of one in another process (ENG-12).
        """
        import torch

        show_logs(self.log_format)
        torch.set_num_threads(self.torch_threads or os.cpu_count() or 1)
        share = gpu_share()
        device = self.device
        if device == "auto":
            device = "cuda" if share > 0 and torch.cuda.is_available() else "cpu"
        if device == "cuda" and 0 < share < 1:
            torch.cuda.set_per_process_memory_fraction(share)
        return device


class Replica:
    """Base of the deployments that compute."""

    def __init__(self, runtime: Runtime) -> None:
        self._device = runtime.apply()
        self._precision = precision_here(runtime.precision)
        self._worker = Worker(on_error=self._notice)
        self._lost: BaseException | None = None

    def _notice(self, error: BaseException) -> None:
        """Remember an error after which this process can compute nothing more on its GPU; on any thread.

        What another replica raised says nothing about this process.
        """
        from pipelines.torch_compat import lost_device

        cause: BaseException | None = error
        while cause is not None and not raised_elsewhere(cause):
            if lost_device(cause) and self._lost is None:
                self._lost = cause
                logger.error("this process lost its GPU: %s", cause)
            cause = cause.__cause__

    async def check_health(self) -> None:
        """Serve asks every few seconds, and replaces a replica that raises here.

        Raises:
            LostDeviceError: the GPU failed this process for good.
        """
        if self._lost is not None:
            raise LostDeviceError(f"this process lost its GPU: {self._lost}")

    async def ping(self) -> None:
        """Do nothing: the call itself starts the first replica of a deployment that scaled to zero."""
