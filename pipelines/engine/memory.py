"""How many rows of a tick fit into memory, counted on the meta device (ENG-8): no weights, no arithmetic, no GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from pipelines.engine.batching import BatchKey
from pipelines.torch_compat import PeakBytes

USABLE = 0.6
"""Share of the free memory that activations may take: the rest is for work spaces, ControlNets and fragmentation."""
GROW_AFTER_TICKS = 128
"""Ticks without running out of memory after which a halved row budget doubles: growing too early costs one tick of
so many, growing late costs throughput after a spike of another process."""
CGROUP = Path("/sys/fs/cgroup")


@torch.inference_mode()
def row_bytes(config: Mapping[str, Any], dtype: torch.dtype, key: BatchKey) -> int:
    """Bytes that one row of a UNet's forward pass holds at its peak, weights not counted.

    Args:
        config: the UNet's `config.json`.
        dtype: of the computation.
        key: the row's latent shape `(channels, height, width)` and context shape `(tokens, features)`. A UNet for
            inpainting reads more channels than its latents have; the configuration says how many.
    """
    from diffusers import UNet2DConditionModel  # brings transformers and scipy, which an engine does not need

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(config))
        for parameter in unet.parameters():  # `.to(dtype)` would warn about modules kept in float32, of which none are
            parameter.data = parameter.data.to(dtype)
        sample = torch.empty(1, config["in_channels"], *key.latent_shape[1:], dtype=dtype)
        context = torch.empty(1, *key.context_shape, dtype=dtype)
        added = None
        if config.get("addition_embed_type") == "text_time":
            # However the width is shared between text and time ids: what is stacked is as large.
            pooled = config["projection_class_embeddings_input_dim"] - config["addition_time_embed_dim"]
            added = {"text_embeds": torch.empty(1, pooled, dtype=dtype), "time_ids": torch.empty(1, 1, dtype=dtype)}
        counted = PeakBytes()
        with counted:
            unet(sample, torch.zeros(1), context, added_cond_kwargs=added)
    return counted.peak


def free_bytes(device: torch.device) -> int:
    """Memory that new tensors may take: of this process's share of a GPU, of the machine or its container."""
    if device.type == "cuda":
        outside, whole = torch.cuda.mem_get_info(device)
        allocated = torch.cuda.memory_allocated(device)
        share = int(torch.cuda.get_per_process_memory_fraction(device) * whole)
        return min(outside + torch.cuda.memory_reserved(device), share) - allocated
    free = int(psutil.virtual_memory().available)
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free


class RowBudget:
    """Rows of one UNet that fit into the memory that is free now."""

    def __init__(
        self,
        config: Mapping[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        free: Callable[[torch.device], int] = free_bytes,
    ) -> None:
        """Of the UNet that `config` describes; `free` measures the memory."""
        self._device, self._free = device, free
        self._row_bytes = functools.cache(lambda key: row_bytes(config, dtype, key))

    def __call__(self, key: BatchKey) -> int:
        """Rows of this shape; at least one, which is tried whatever the memory says."""
        return max(1, int(USABLE * self._free(self._device) / self._row_bytes(key)))


class RecoveringBudget:
    """A row budget that is reduced when memory runs out and grows back (ENG-13)."""

    def __init__(self, grow_after: int = GROW_AFTER_TICKS) -> None:
        """Double the budget after so many ticks in a row that had enough memory."""
        self._grow_after = grow_after
        self._rows: int | None = None
        self._calm = 0

    def limit(self, max_rows: int) -> int:
        """Most rows of the next tick, where `max_rows` is the usual budget."""
        return max_rows if self._rows is None else min(max_rows, self._rows)

    def halve(self, rows: int) -> int:
        """Reduce the budget after memory ran out in a tick of `rows`; returns the new one, at least one row."""
        self._rows, self._calm = max(1, rows // 2), 0
        return self._rows

    def had_enough(self, max_rows: int) -> None:
        """Record a tick that had enough memory."""
        if self._rows is None:
            return
        self._calm += 1
        if self._calm >= self._grow_after:
            self._rows, self._calm = self._rows * 2, 0
            if self._rows >= max_rows:
                self._rows = None
