"""How many rows of a tick fit into memory, counted on the meta device: no weights, no arithmetic, no GPU needed."""

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
CGROUP = Path("/sys/fs/cgroup")


@torch.inference_mode()
def row_bytes(config: Mapping[str, Any], dtype: torch.dtype, key: BatchKey) -> int:
    """Bytes that one row of a UNet's forward pass holds at its peak, weights not counted.

    Args:
        config: the UNet's `config.json`.
        dtype: of the computation.
        key: the row's latent shape `(channels, height, width)` and context shape `(tokens, features)`.
    """
    from diffusers import UNet2DConditionModel  # brings transformers and scipy, which an engine does not need

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(config))
        for parameter in unet.parameters():  # `.to(dtype)` would warn about modules kept in float32, of which none are
            parameter.data = parameter.data.to(dtype)
        sample = torch.empty(1, *key.latent_shape, dtype=dtype)
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
    """Memory that new tensors may take: of the GPU with torch's own reserve, of the machine or its container."""
    if device.type == "cuda":
        outside, _ = torch.cuda.mem_get_info(device)
        return outside + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
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
