"""Catalog components -> what a process runs: engines, text encoders, ControlNets, VAEs.

The only place that knows of which parts each is made; `weights/` only reads files, and the parts only compute.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL, ControlNetModel, ControlNetUnionModel, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file

from config.catalog import Catalog
from config.precision import Precision
from pipelines.acceleration import Acceleration
from pipelines.adapters.layers import Adapter
from pipelines.adapters.reading import AdapterFile, read_adapter
from pipelines.adapters.store import LoraStore
from pipelines.backends.base import Denoiser
from pipelines.backends.torch_backend import TorchDenoiser
from pipelines.compiling import Compiling, RefusedSize
from pipelines.control.annotators import Annotators
from pipelines.control.nets import ControlNets
from pipelines.control.types import ControlSource
from pipelines.engine.batching import BatchKey
from pipelines.engine.curve import RowCurves, trial_batch
from pipelines.engine.engine import StepEngine
from pipelines.engine.memory import RowBudget
from pipelines.errors import WeightsError
from pipelines.families import FAMILIES
from pipelines.pictures.precision import overflows
from pipelines.pictures.upscaling import TILE, Upscaler
from pipelines.pictures.vae import VAE
from pipelines.plan import CompiledSize, EmbeddingUse, LoraUse
from pipelines.recordings import Capturer
from pipelines.sampling.latents import LatentSpace
from pipelines.spandrel_compat import read_upscaler
from pipelines.text.encoders import TextEncoder, TextEncoderStack
from pipelines.text.inversions import read_inversion
from pipelines.transfers import Mark
from pipelines.weights.checks import check_finite
from pipelines.weights.files import ComponentFiles, embedding_path, lora_path, read_config
from pipelines.weights.loading import Device, load_model, load_text_models

if TYPE_CHECKING:
    from pipelines.backends.tvm.on_demand import OnDemand

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompiledUNet:
    """An engine on compiled programs, and the sizes it can draw."""

    engine: StepEngine
    sizes: tuple[CompiledSize, ...]
    on_demand: OnDemand | None = None
    """What has further sizes compiled; None where all are compiled ahead."""


def load_engine(
    catalog: Catalog,
    component_id: str,
    device: Device,
    max_rows: int = 16,
    strict: bool = False,
    control: ControlSource | None = None,
    row_price: float | None = None,
    capturer: Capturer | None = None,
    acceleration: Acceleration | None = None,
    precision: Precision = "float32",
) -> StepEngine:
    """A UNet component on the torch backend, in an engine ready for jobs.

    Args:
        catalog: says what it is.
        component_id: the UNet.
        device: where it runs.
        max_rows: most rows of a tick; memory may allow fewer.
        strict: equal bytes whatever else is in the tick.
        control: what steers it, if anything.
        row_price: measure now how many rows of a tick are worth their time, each at less than this share of what the
            first ones cost (`engine/curve.py`); None takes `max_rows` at their word.
        capturer: records passes that come often, one for all networks of this process; None none.
        acceleration: what else is done to the UNet on a GPU.
        precision: what it computes in on a CPU.

    Raises:
        WeightsError: the weights are missing, or the UNet does not fit its VAE.
    """
    unet = load_model(UNet2DConditionModel, catalog.component(component_id), device, precision)
    denoiser = TorchDenoiser(unet, strict, capturer, acceleration if device == "cuda" else None)

    def fit(use: LoraUse, base: str) -> Adapter:
        return denoiser.adapters.fit(load_lora(catalog, use, base, "unet"), denoiser.device, denoiser.unet_dtype)

    engine = engine_over(denoiser, catalog, component_id, LoraStore(fit), max_rows, strict, control)
    if row_price is not None:
        engine.rows_that_fit = _measured(engine, catalog, component_id, row_price)
    return engine


def _measured(engine: StepEngine, catalog: Catalog, component_id: str, price: float) -> Callable[[BatchKey], int]:
    """Rows of a tick that are worth their time and that memory holds, measured for the sizes of the UNet's models."""
    denoiser, space = engine.denoiser, latent_space(catalog, component_id)
    context, pooled = _text_shapes(catalog, component_id, denoiser)
    models = [model for model in catalog.models if component_id in (model.unet, model.refiner)]
    sizes = {size: None for model in models for size in model.sizes}
    keys = [BatchKey(space.shape(size.width, size.height)[1:], context) for size in sizes]

    def evaluate(key: BatchKey, rows: int) -> None:
        denoiser.predict(trial_batch(denoiser, key, pooled, rows))
        Mark(denoiser.device).wait()

    curves, fits = RowCurves(evaluate, price, engine.max_rows), engine.rows_that_fit
    curves.measure(keys)
    return lambda key: min(curves(key), fits(key) if fits is not None else engine.max_rows)


def _text_shapes(catalog: Catalog, component_id: str, denoiser: Denoiser) -> tuple[tuple[int, int], int]:
    """What a row of a UNet is told by a prompt of one chunk: tokens and width; width of SDXL's pooled embeddings."""
    encoders = catalog.component(catalog.text_encoder_of(component_id))
    tokens = int(read_config(encoders, "tokenizer")["model_max_length"])
    sdxl = catalog.component(component_id).family == "sdxl"
    pooled = int(read_config(encoders, "text_encoder_2")["projection_dim"]) if sdxl else 0
    return (tokens, denoiser.config["cross_attention_dim"]), pooled


def load_compiled(
    catalog: Catalog,
    component_id: str,
    compiling: Compiling,
    max_rows: int = 16,
    strict: bool = False,
    control: ControlSource | None = None,
) -> CompiledUNet | None:
    """A UNet component on the tvm backend with everything that is compiled of it; None if nothing is and will be.

    `compiling` says where programs are kept, and whether others come while it serves; the rest is `load_engine`'s.
    """
    # tvm takes a second to import, and only replicas that run it need to have it.
    from pipelines.backends.tvm.artifacts import BATCHES, ArtifactCache
    from pipelines.backends.tvm.loading import load_denoiser
    from pipelines.backends.tvm.on_demand import OnDemand, table_of

    load_unet = functools.partial(load_model, UNet2DConditionModel, catalog.component(component_id), "cpu")
    cache = ArtifactCache(compiling.folder)
    compiled = load_denoiser(catalog, component_id, cache, load_unet, compiling.mode != "ahead", compiling.precision)
    if compiled is None:
        return None

    loras = LoraStore(lambda use, base: compiled.denoiser.fit(load_lora(catalog, use, base, "unet")))
    rows = min(max_rows, max(BATCHES))
    engine = engine_over(compiled.denoiser, catalog, component_id, loras, rows, strict, control)
    if compiling.mode == "ahead":
        return CompiledUNet(engine, compiled.sizes)
    on_demand = OnDemand(catalog, component_id, cache, compiled, load_unet, compiling.most_sizes)
    if compiling.mode == "tables":
        on_demand.want(*table_of(catalog, component_id))
    return CompiledUNet(engine, compiled.sizes, on_demand)


def refused_sizes(catalog: Catalog, component_id: str, compiling: Compiling) -> tuple[RefusedSize, ...]:
    """What is compiled of a UNet and not run here, with reasons."""
    from pipelines.backends.tvm import loading
    from pipelines.backends.tvm.artifacts import ArtifactCache

    return loading.refused_sizes(catalog, component_id, ArtifactCache(compiling.folder), compiling.precision)


def engine_over(
    denoiser: Denoiser,
    catalog: Catalog,
    component_id: str,
    loras: LoraStore,
    max_rows: int,
    strict: bool,
    control: ControlSource | None,
) -> StepEngine:
    """An engine for a UNet component on whatever backend.

    Raises:
        WeightsError: the UNet works on latents that its VAE does not have.
    """
    spec = catalog.component(component_id)
    space = latent_space(catalog, component_id)
    reads, for_inpainting = denoiser.config["in_channels"], 2 * space.channels + 1  # latents, mask, masked picture
    if reads not in (space.channels, for_inpainting):
        raise WeightsError(f"component {component_id} takes {reads} latent channels, its VAE has {space.channels}")
    if spec.inpainting != (reads == for_inpainting):
        raise WeightsError(
            f"component {component_id} reads {reads} channels: write `inpainting: {str(not spec.inpainting).lower()}` "
            "in its entry of the catalog"
        )
    return StepEngine(
        denoiser,
        FAMILIES[spec.family],
        read_config(spec, "scheduler"),
        space,
        loras,
        control=control,
        max_rows=max_rows,
        strict=strict,
        rows_that_fit=RowBudget(denoiser.config, denoiser.dtype, denoiser.device),
    )


def latent_space(catalog: Catalog, component_id: str) -> LatentSpace:
    """Of the VAE that a UNet component works with."""
    family = FAMILIES[catalog.component(component_id).family]
    vae_config = read_config(catalog.component(catalog.vae_of(component_id)))
    return LatentSpace.from_vae_config(vae_config, family.applies_latent_statistics)


def record_common_passes(denoiser: TorchDenoiser, catalog: Catalog, component_id: str) -> None:
    """Record what one picture and two pictures of the default size of each of a UNet's models need."""
    space = latent_space(catalog, component_id)
    context, pooled = _text_shapes(catalog, component_id, denoiser)
    for model in catalog.available_models():
        if component_id in (model.unet, model.refiner):
            rows = 2 if model.defaults.cfg_scale > 1 else 1
            key = BatchKey(space.shape(model.defaults.width, model.defaults.height)[1:], context)
            for pictures in (1, 2):
                denoiser.record(trial_batch(denoiser, key, pooled, pictures * rows))


def load_controlnets(
    catalog: Catalog,
    component_ids: Sequence[str],
    device: Device,
    capturer: Capturer | None = None,
    precision: Precision = "float32",
) -> ControlNets:
    """ControlNets of one UNet, with the annotators of the catalog; `capturer` and `precision` as for `load_engine`."""
    models = {}
    for component_id in component_ids:
        spec = catalog.component(component_id)
        model_class = ControlNetUnionModel if spec.union else ControlNetModel
        models[component_id] = load_model(model_class, spec, device, precision)
    return ControlNets(models, Annotators(catalog, device), capturer)


def load_text_encoders(catalog: Catalog, component_id: str, device: Device) -> TextEncoderStack:
    """A family's text encoders with their tokenizers."""
    spec = catalog.component(component_id)
    family = FAMILIES[spec.family]
    encoders = [
        TextEncoder(
            tokenizer,
            model,
            functools.partial(load_lora, catalog, part=part),
            functools.partial(load_embedding, catalog, part=part),
            family.text_layer,
            part,
        )
        for part, tokenizer, model in load_text_models(spec, device)
    ]
    return TextEncoderStack(encoders, family.embed)


def load_vae(catalog: Catalog, component_id: str, device: Device) -> VAE:
    """A VAE with its latent space.

    Raises:
        WeightsError: the catalog promises sizes that this VAE cannot make.
    """
    spec = catalog.component(component_id)
    family = FAMILIES[spec.family]
    model = load_model(AutoencoderKL, spec, device)
    space = LatentSpace.from_vae_config(model.config, family.applies_latent_statistics)
    marked = family.upcasts_vae and model.config.force_upcast  # then it is turned to float32 without asking
    if model.dtype == torch.float16 and not marked and overflows(model, space):
        logger.warning("component %s overflows in half precision and is computed in float32", component_id)
        model = model.to(torch.float32)
    vae = VAE(model, space, family.upcasts_vae)
    for entry in catalog.models:
        if entry.vae == component_id and entry.size_multiple % vae.space.downscale:
            raise WeightsError(
                f"model {entry.name}: its size_multiple {entry.size_multiple} is not a multiple of "
                f"{vae.space.downscale}, the downscale of {component_id}"
            )
    return vae


def load_upscaler(catalog: Catalog, component_id: str, device: Device) -> Upscaler:
    """A model that enlarges pictures.

    Raises:
        WeightsError: its file is missing, damaged, or of another model.
    """
    spec = catalog.component(component_id)
    files = ComponentFiles(spec)
    where = files.check_checkpoint(files.upscaler)
    with files.explained(where):
        read = read_upscaler(load_file(files.upscaler))
    if read.purpose != "SR" or read.scale < 2 or (read.input_channels, read.output_channels) != (3, 3):
        raise WeightsError(f"{where}: a model of {read.architecture.name} that does not enlarge pictures of 3 channels")
    check_finite(where, read.model)
    half = {"float16": read.supports_half, "bfloat16": read.supports_bfloat16}
    dtype = getattr(torch, spec.dtype) if device != "cpu" and half.get(spec.dtype) else torch.float32
    read.model.to(device, dtype).eval()
    tile = None if read.tiling.name == "INTERNAL" else TILE
    return Upscaler(read, read.scale, device, dtype, tile, multiple=read.size_requirements.multiple_of)


def load_embedding(catalog: Catalog, use: EmbeddingUse, base: str, part: str) -> torch.Tensor:
    """The vectors of a textual inversion for one text encoder of a base UNet's models, `[vectors, width]`.

    Raises:
        WeightsError: the file is missing or damaged, or another one took its place in a library.
        InvalidValueError: it is none, or of another family.
    """
    path = embedding_path(catalog, use, base)
    with _explained(f"embedding {use.name}, file {path.name}"):
        return read_inversion(path, use.name, part, pair=catalog.component(base).family == "sdxl")


def load_lora(catalog: Catalog, use: LoraUse, base: str, part: str) -> AdapterFile:
    """The layers a LoRA has for one part (`unet`, `text_encoder`, `text_encoder_2`) of a base UNet's models.

    Raises:
        WeightsError: the file is missing or damaged, or another one took its place in a library.
        InvalidValueError: it is another kind of adapter.
    """
    spec, path = catalog.component(base), lora_path(catalog, use, base)
    parts = ("unet", "text_encoder", "text_encoder_2") if spec.family == "sdxl" else ("unet", "text_encoder")
    with _explained(f"lora {use.name}, file {path.name}"):
        return read_adapter(path, use.name, part, parts)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """What reading a small file raises -> a WeightsError that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise WeightsError(f"{what}: no such file") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise WeightsError(f"{what}: {error}") from error
