"""The arguments of a compiled UNet, read from the configuration files of a catalog's components."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from config.catalog import Catalog
from config.precision import Precision
from pipelines.backends.tvm.artifacts import ArtifactKey, config_hash, sources_hash
from pipelines.families import FAMILIES
from pipelines.sampling.latents import LatentSpace
from pipelines.weights.files import read_config


def artifact_key(
    catalog: Catalog,
    component_id: str,
    width: int,
    height: int,
    rows: int,
    control: bool,
    level: str,
    loras: bool = False,
    precision: Precision = "float32",
) -> ArtifactKey:
    """The key of a UNet component for pictures of `width` x `height` pixels."""
    spec = catalog.component(component_id)
    vae = read_config(catalog.component(catalog.vae_of(component_id)))
    downscale = LatentSpace.from_vae_config(vae, FAMILIES[spec.family].applies_latent_statistics).downscale
    encoders = catalog.component(catalog.text_encoder_of(component_id))
    tokenizer = read_config(encoders, "tokenizer")
    pooled = 0
    if spec.family == "sdxl":
        pooled = int(read_config(encoders, "text_encoder_2")["projection_dim"])
    return ArtifactKey(
        config=config_hash(read_config(spec)),
        height=height // downscale,
        width=width // downscale,
        rows=rows,
        tokens=int(tokenizer["model_max_length"]),
        pooled=pooled,
        control=control,
        loras=loras,
        level=level,
        dtype=precision,
        sources=sources_hash(),
    )


def residual_shapes(config: Mapping[str, Any], height: int, width: int) -> list[tuple[int, int, int]]:
    """`(channels, height, width)` of a ControlNet's residuals for latents of this size: down blocks, then mid block."""
    channels, layers = config["block_out_channels"], config["layers_per_block"]
    counts = [layers] * len(channels) if isinstance(layers, int) else list(layers)
    shapes = [(channels[0], height, width)]
    for level, (wide, count) in enumerate(zip(channels, counts, strict=True)):
        shapes += [(wide, height, width)] * count
        if level + 1 < len(channels):
            height, width = (height + 1) // 2, (width + 1) // 2
            shapes.append((wide, height, width))
    return [*shapes, (channels[-1], height, width)]


def example_inputs(config: Mapping[str, Any], key: ArtifactKey) -> tuple[Tensor, ...]:
    """The inputs of a program, as zeros: sample, timesteps, context, SDXL's text_embeds and time_ids, residuals."""
    rows, context = key.rows, config["cross_attention_dim"]
    inputs = [
        torch.zeros(rows, config["in_channels"], key.height, key.width),
        torch.zeros(rows),
        torch.zeros(rows, key.tokens, context if isinstance(context, int) else context[0]),
    ]
    if key.pooled:
        ids = (config["projection_class_embeddings_input_dim"] - key.pooled) // config["addition_time_embed_dim"]
        inputs += [torch.zeros(rows, key.pooled), torch.zeros(rows, ids)]
    if key.control:
        inputs += [torch.zeros(rows, *shape) for shape in residual_shapes(config, key.height, key.width)]
    return tuple(inputs)
