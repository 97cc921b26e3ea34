"""A UNet component on the tvm backend: its programs, its packed weights, and what was measured when it started."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from config.catalog import Catalog, Size
from pipelines.backends.torch_backend import TorchDenoiser
from pipelines.backends.tvm.artifacts import BATCHES, ArtifactCache, ArtifactError, best_level
from pipelines.backends.tvm.denoiser import PackedWeights, Shape, TvmDenoiser, load_programs, speedup, trial_batch
from pipelines.backends.tvm.shapes import artifact_key
from pipelines.diffusers_compat import with_defaults
from pipelines.plan import CompiledSize
from pipelines.weights.files import read_config

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompiledDenoiser:
    """Compiled programs of one UNet, and the sizes they can draw."""

    denoiser: TvmDenoiser
    sizes: tuple[CompiledSize, ...]
    weights: PackedWeights


def load_denoiser(
    catalog: Catalog,
    component_id: str,
    cache: ArtifactCache,
    load_unet: Callable[[], UNet2DConditionModel],
    grows: bool = False,
) -> CompiledDenoiser | None:
    """Everything that is compiled of a UNet, None if nothing is or this processor is too old.

    Args:
        catalog: says what the UNet is and which sizes its models want compiled.
        component_id: the UNet.
        cache: where programs are kept.
        load_unet: loads torch's copy, on the CPU; called only if something is compiled. It serves to pack the weights
            and to be measured against; then it goes.
        grows: whether programs may come later, so that having none is no reason to return None.
    """
    try:
        level = best_level()
    except ArtifactError as error:
        logger.warning("%s", error)
        return None
    keys = {
        artifact_key(catalog, component_id, size.width, size.height, rows, control, level): size
        for size, control in size_table(catalog, component_id)
        for rows in BATCHES
    }
    nothing = None
    if grows:
        from diffusers import UNet2DConditionModel

        config = with_defaults(UNet2DConditionModel, read_config(catalog.component(component_id)))
        nothing = CompiledDenoiser(TvmDenoiser(config, []), (), PackedWeights({}))
    if not any((cache.folder / key.id).is_dir() for key in keys):
        return nothing
    unet = load_unet()
    weights = PackedWeights(unet.state_dict())
    programs = load_programs(cache, list(keys), weights)
    if not programs:
        return nothing
    denoiser, torch_denoiser = TvmDenoiser(dict(unet.config), programs), TorchDenoiser(unet)
    ratios: dict[tuple[int, int], float] = {}
    for program in sorted(programs, key=lambda p: (abs(p.artifact.key.rows - 2), p.artifact.key.control)):
        key = program.artifact.key
        if Shape(key.height, key.width, False) in denoiser.shapes and (key.height, key.width) not in ratios:
            ratios[key.height, key.width] = speedup(
                denoiser, torch_denoiser, trial_batch(denoiser.config, program.artifact)
            )
    weights.forget()
    sizes = {}
    for program in programs:
        key, size = program.artifact.key, keys[program.artifact.key]
        ratio = ratios.get((key.height, key.width), 0.0)
        sizes[size, key.control] = CompiledSize(component_id, size.width, size.height, key.control, ratio)
    logger.info(
        "%s: %d programs, weights packed in %.1f s; times as fast as torch: %s",
        component_id,
        len(programs),
        weights.seconds,
        {str(size): round(size.speedup, 2) for size in sizes.values()},
    )

    return CompiledDenoiser(denoiser, tuple(sizes.values()), weights)


def size_table(catalog: Catalog, component_id: str) -> list[tuple[Size, bool]]:
    """Sizes, without and with a ControlNet, that the models of a UNet want compiled."""
    table: dict[tuple[Size, bool], None] = {}
    for model in catalog.models:
        if component_id in (model.unet, model.refiner):
            for size in model.tvm_sizes:
                table[size, False] = None
                if model.requires_controlnet and component_id == model.unet:
                    table[size, True] = None
    return list(table)
