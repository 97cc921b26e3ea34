"""What all replicas that compute have in common: their runtime, worker thread and health check."""

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

# Replicas import torch, and modules that need it, inside their constructors. The process that builds the graph imports
# only their classes and therefore loads no torch.


@dataclass(frozen=True)
class Runtime:
    """How a replica computes: the settings that it needs, which app.py passes on."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` means CUDA if Ray assigned a GPU to the replica, otherwise the CPU."""
    torch_threads: int | None = None
    """Number of torch's CPU threads; the number of the machine's cores if None. It is set in any case, because Ray sets
    OMP_NUM_THREADS to 1 for a replica with a fraction of a CPU."""
    log_format: LogFormat = "text"
    precision: WantedPrecision = "float32"
    """Precision of UNets and ControlNets on a CPU."""

    def apply(self) -> Literal["cpu", "cuda"]:
        """Set this process up, and return its device.

        Ray does not enforce fractions of a GPU. This method does: if the process allocates more than its fraction, it
        gets an out-of-memory error, which engines and VAEs handle. Otherwise another process would get one (ENG-12).
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
        """Remember an error after which this process cannot use its GPU any more. This may be called on any thread.

        Errors that another replica raised are ignored.
        """
        from pipelines.torch_compat import lost_device

        cause: BaseException | None = error
        while cause is not None and not raised_elsewhere(cause):
            if lost_device(cause) and self._lost is None:
                self._lost = cause
                logger.error("this process lost its GPU: %s", cause)
            cause = cause.__cause__

    async def check_health(self) -> None:
        """Report to Serve, which calls this every few seconds and replaces a replica that raises.

        Raises:
            LostDeviceError: this process cannot use its GPU any more.
        """
        if self._lost is not None:
            raise LostDeviceError(f"this process lost its GPU: {self._lost}")

    async def ping(self) -> None:
        """Do nothing: the call itself starts the first replica of a deployment that scaled to zero."""
