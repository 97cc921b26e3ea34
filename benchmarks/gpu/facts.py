"""Measured facts, one JSON line each, and timing on a device that works asynchronously."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Facts:
    """Prints facts, and knows how much time is left."""

    def __init__(self, seconds: float, file: Path | None, dry: bool) -> None:
        """Until `seconds` from now.

        Args:
            seconds: for everything.
            file: also gets the lines, each at once.
            dry: rehearse with toy sizes on the CPU; no number means anything then.
        """
        self._begin = time.monotonic()
        self._seconds = seconds
        self._file = file.open("a") if file is not None else None
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.dtype = torch.float32 if dry else torch.float16

    @property
    def left(self) -> float:
        """Seconds."""
        return self._seconds - (time.monotonic() - self._begin)

    def tell(self, fact: str, **values: Any) -> None:
        """Print a line now, and keep it."""
        line = json.dumps({"at": round(self._seconds - self.left, 1), "fact": fact, **values}, default=str)
        print(line, flush=True)
        if self._file is not None:
            print(line, file=self._file, flush=True)

    def sync(self) -> None:
        """Wait until the device has nothing to do."""
        if not self.dry:
            torch.cuda.synchronize()

    def clean(self) -> None:
        """Free all memory that is not in use."""
        gc.collect()
        if not self.dry:
            torch.cuda.empty_cache()

    def ms(self, run: Callable[[], object], repeats: int = 7, warm_up: int = 2) -> float:
        """Median milliseconds of `run`, the device's work included; a rehearsal runs it once."""
        if self.dry:
            repeats, warm_up = 1, 0
        for _ in range(warm_up):
            run()
        taken = []
        for _ in range(repeats):
            self.sync()
            begin = time.perf_counter()
            run()
            self.sync()
            taken.append(1000 * (time.perf_counter() - begin))
        return round(statistics.median(taken), 3)

    def host_us(self, run: Callable[[], object], count: int = 300) -> float:
        """Microseconds that the host spends in one `run` of many."""
        count = 1 if self.dry else count
        self.sync()
        begin = time.perf_counter()
        for _ in range(count):
            run()
        spent = time.perf_counter() - begin
        self.sync()
        return round(1e6 * spent / count, 2)

    def mib(self) -> int:
        """Memory that torch's allocator has taken, nothing of it cached."""
        self.clean()
        return 0 if self.dry else round(torch.cuda.memory_reserved() / 2**20)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())
