"""Loading a UNet on the tvm backend: its programs, its packed weights, and how fast it is compared with torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from config.catalog import Catalog, Size
from config.precision import WantedPrecision
from pipelines.adapters.rows import RowAdapters
from pipelines.backends.base import StepBatch
from pipelines.backends.torch_backend import TorchDenoiser
from pipelines.backends.tvm.artifacts import (
    LEVELS,
    Artifact,
    ArtifactCache,
    ArtifactError,
    ProgramKind,
    every_kind,
    program_kinds,
    program_rows,
)
from pipelines.backends.tvm.denoiser import (
    PackedWeights,
    Program,
    Shape,
    TvmDenoiser,
    load_programs,
    seconds,
    shape_of,
    trial_batch,
)
from pipelines.backends.tvm.shapes import artifact_key
from pipelines.compiling import RefusedSize
from pipelines.diffusers_compat import with_defaults
from pipelines.plan import CompiledSize
from pipelines.weights.files import read_config

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompiledDenoiser:
    """The compiled programs of one UNet, and the sizes that they can draw."""

    denoiser: TvmDenoiser
    sizes: tuple[CompiledSize, ...]
    weights: PackedWeights
    kind: ProgramKind
    """The kind of all its programs, also of those that are added later."""


def load_denoiser(
    catalog: Catalog,
    component_id: str,
    cache: ArtifactCache,
    load_unet: Callable[[], UNet2DConditionModel],
    grows: bool = False,
    precision: WantedPrecision = "float32",
) -> CompiledDenoiser | None:
    """Load the compiled programs of a UNet. None if there are none, or if this processor is too old.

    All programs are of one kind, because each kind needs its own packed copy of the weights. It is the best kind that
    this machine runs and that has compiled programs.

    Args:
        catalog: describes the UNet, and lists the sizes of its models.
        component_id: id of the UNet.
        cache: the folder of compiled programs.
        load_unet: loads the UNet in torch, on the CPU; called only if there are programs. The UNet is measured, then
            its weights are packed, and each unpacked weight is released as soon as it is packed.
        grows: whether programs may be added later; then the result is never None for lack of programs.
        precision: the setting `SDGRAPH_TVM_PRECISION`.
    """
    kinds = program_kinds(precision)
    if not kinds:
        logger.warning("this processor reaches none of %s: backend tvm needs AVX2 and FMA", list(LEVELS))
        return None
    nothing = None
    if grows:
        from diffusers import UNet2DConditionModel

        config = with_defaults(UNet2DConditionModel, read_config(catalog.component(component_id)))
        empty = TvmDenoiser(config, [], skeleton_adapters(config))
        nothing = CompiledDenoiser(empty, (), PackedWeights({}), kinds[0])
    compiled, refused = _compiled(catalog, component_id, cache, kinds)
    for left in refused:
        logger.warning("%s at %s: %s", component_id, left, left.reason)
    if not compiled:
        return nothing
    artifacts = sorted(compiled.values(), key=_measured_first)
    unet = load_unet()
    config, weights = dict(unet.config), PackedWeights(unet.state_dict())
    trials: dict[Shape, StepBatch] = {}
    for artifact in artifacts:
        if not artifact.key.control and not artifact.key.loras:
            trials.setdefault(shape_of(artifact.key), trial_batch(config, artifact))
    torch_denoiser = TorchDenoiser(unet)
    torch_seconds = {shape: seconds(torch_denoiser, batch) for shape, batch in trials.items()}
    unet.to("meta")  # now only `weights` holds the tensors, and packing releases them one by one
    del unet, torch_denoiser
    weights.pack(artifacts)
    programs = load_programs(cache, [artifact.key for artifact in artifacts], weights)
    denoiser = TvmDenoiser(config, _finite(component_id, config, programs, trials), skeleton_adapters(config))
    if not denoiser.shapes:
        return nothing
    ratios = {
        (shape.height, shape.width): torch_seconds[shape] / seconds(denoiser, batch)
        for shape, batch in trials.items()
        if shape in denoiser.shapes
    }
    sizes = {}
    for (size, _), artifact in compiled.items():
        key = artifact.key
        if shape_of(key) in denoiser.shapes:
            ratio = ratios.get((key.height, key.width), 0.0)
            loras = denoiser.takes_loras(Shape(key.height, key.width, key.control))
            sizes[size, key.control] = CompiledSize(
                component_id, size.width, size.height, key.control, ratio, key.dtype, loras
            )
    kind = ProgramKind(artifacts[0].key.dtype, artifacts[0].key.level)
    logger.info(
        "%s: %d programs, %s on %s, weights packed in %.1f s; times as fast as torch: %s",
        component_id,
        len(programs),
        kind.precision,
        kind.level,
        weights.seconds,
        {str(size): round(size.speedup, 2) for size in sizes.values()},
    )
    return CompiledDenoiser(denoiser, tuple(sizes.values()), weights, kind)


def refused_sizes(
    catalog: Catalog, component_id: str, cache: ArtifactCache, precision: WantedPrecision
) -> tuple[RefusedSize, ...]:
    """The compiled sizes of a UNet that are not run here, with the reasons."""
    return _compiled(catalog, component_id, cache, program_kinds(precision))[1]


def _compiled(
    catalog: Catalog, component_id: str, cache: ArtifactCache, kinds: Sequence[ProgramKind]
) -> tuple[dict[tuple[Size, str], Artifact], tuple[RefusedSize, ...]]:
    """The valid programs of the best kind that has any, by size and artifact id; and the sizes that are refused."""
    found: dict[tuple[Size, str], Artifact] = {}
    refused: dict[RefusedSize, None] = {}
    keys = {  # read from the configuration files once; kind, rows and LoRAs are filled in below
        (size, control): artifact_key(catalog, component_id, size.width, size.height, 1, control, every_kind()[0].level)
        for size, control in size_table(catalog, component_id)
    }
    for kind in (*kinds, *(kind for kind in every_kind() if kind not in kinds)):
        of_kind: dict[tuple[Size, str], Artifact] = {}
        of_program = {"level": kind.level, "dtype": kind.precision}
        for (size, control), base in keys.items():
            for rows, loras in program_rows():
                key = base.model_copy(update=of_program | {"rows": rows, "loras": loras})
                try:
                    if artifact := cache.find(key):
                        of_kind[size, key.id] = artifact
                except ArtifactError as error:
                    refused[RefusedSize(component_id, size.width, size.height, control, str(error))] = None
        if of_kind and not found and kind in kinds:
            found = of_kind
            continue
        reason = f"a program in {kind.precision} for {kind.level} is left aside: another kind is run here"
        for (size, _), artifact in of_kind.items():
            refused[RefusedSize(component_id, size.width, size.height, artifact.key.control, reason)] = None
    return found, tuple(refused)


def _finite(
    component_id: str, config: Mapping[str, Any], programs: Sequence[Program], trials: Mapping[Shape, StepBatch]
) -> list[Program]:
    """The programs, without those of a size at which the output is not finite."""
    sound = list(programs)
    for shape, batch in trials.items():
        denoiser = TvmDenoiser(config, sound)
        if shape in denoiser.shapes and not denoiser.predict(batch).isfinite().all():
            size = f"{shape.width}x{shape.height}"
            logger.warning("%s: compiled for latents of %s its output is not finite: left to torch", component_id, size)
            sides = (shape.height, shape.width)
            sound = [p for p in sound if (p.artifact.key.height, p.artifact.key.width) != sides]
    return sound


def _measured_first(artifact: Artifact) -> tuple[int, bool]:
    """Sort key: two rows come before other numbers, programs without a ControlNet before those with one."""
    return abs(artifact.key.rows - 2), artifact.key.control


def skeleton_adapters(config: Mapping[str, Any]) -> RowAdapters:
    """Slots for LoRAs on a UNet of this configuration that has no weights of its own."""
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel

    with init_empty_weights():
        return RowAdapters(UNet2DConditionModel.from_config(dict(config)))


def size_table(catalog: Catalog, component_id: str) -> list[tuple[Size, bool]]:
    """The sizes in the tables of a UNet's models, each as `(size, with a ControlNet)`."""
    table: dict[tuple[Size, bool], None] = {}
    for model in catalog.models:
        if component_id in (model.unet, model.refiner):
            for size in model.tvm_sizes:
                table[size, False] = None
                if model.requires_controlnet and component_id == model.unet:
                    table[size, True] = None
    return list(table)
