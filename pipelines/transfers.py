"""Copies between host and device that block neither of them.

A GPU copies from and to page-locked memory by itself; any other copy stops the host until everything that is queued
before it is done. On a CPU nothing is copied and nothing is ever waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

R = TypeVar("R")


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host in memory that `device` can copy from by itself."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`, when the device gets there; without a wait if it is `pinned`, or there already."""
    return tensor.to(device, non_blocking=True)


def fetch(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host, to be read after a `Mark` that was made after it."""
    if tensor.device.type != "cuda":
        return tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)


class Mark:
    """A place in the queue of a device."""

    def __init__(self, device: torch.device) -> None:
        """Behind everything that this thread has queued."""
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        if self._event is not None:
            self._event.record()

    @property
    def passed(self) -> bool:
        """Whether the device is past it."""
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """Return when the device is past it; on any thread."""
        if self._event is not None:
            self._event.synchronize()


class Fetching(Generic[R]):
    """A result that a device computes and copies to the host."""

    def __init__(self, device: torch.device, finish: Callable[[], R]) -> None:
        """`finish` makes it of copies that `fetch` began, when they are there."""
        self._mark, self._finish = Mark(device), finish

    def result(self) -> R:
        """Wait for the device; on any thread, once. Raises what `finish` raises."""
        self._mark.wait()
        return self._finish()
