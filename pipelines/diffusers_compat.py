"""What is used of diffusers beyond its documented interface; `tests/upstream/test_diffusers.py` has a test for each.

Imports are inside the functions: diffusers' loaders bring transformers and scipy, which the engine does without, and
the names of samplers are known to processes without torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pipelines.errors import WeightsError

if TYPE_CHECKING:
    import torch


def with_defaults(model_class: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json`, with diffusers' default for every key it lacks, as the loaded model has it.

    Configs hold the keys of the diffusers that wrote them: the VAEs of SD1.5 and SD2 are older than `scaling_factor`.

    Args:
        model_class: diffusers' class, such as `AutoencoderKL`; its constructor's arguments are the keys.
        config: as it is published.
    """
    parameters = inspect.signature(model_class.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty} | dict(config)


def rename_lora(
    state: Mapping[str, torch.Tensor], unet_config: Mapping[str, Any] | None
) -> tuple[dict[str, torch.Tensor], dict[str, float] | None]:
    """Tensors of a LoRA file under `<part>.<module>`, and kohya's alphas under the same names, None in other layouts.

    SDXL's loader reads the files of SD too.

    Args:
        state: a file's tensors, in PEFT's, kohya's or diffusers' old layout.
        unet_config: config of an SDXL UNet, whose blocks kohya counts differently; None for SD.

    Raises:
        ValueError: keys of two layouts, or of none.
    """
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin

    blocks = None if unet_config is None else SimpleNamespace(**unet_config)  # it reads attributes of a config object
    renamed, alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(dict(state), unet_config=blocks)
    if alphas is not None and len(renamed) != sum(key.endswith(".weight") for key in state):
        raise ValueError("some keys name blocks as diffusers does and some as the original does")  # it drops some
    return renamed, alphas


def unet_lora_to_peft(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A UNet's LoRA in diffusers' old names -> PEFT's."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    converted: dict[str, torch.Tensor] = convert_unet_state_dict_to_peft(dict(state))
    return converted


def text_encoder_lora_to_peft(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A text encoder's LoRA in diffusers' old names -> PEFT's."""
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft

    # The converters tell a layout by its `to_out_lora`; a file without that layer needs the attention names mapped too.
    names = {"to_q_lora": "q_proj", "to_k_lora": "k_proj", "to_v_lora": "v_proj", "to_out_lora": "out_proj"}
    renamed = {}
    for key, value in state.items():
        for old, new in names.items():
            key = key.replace(f".{old}.", f".{new}.lora_linear_layer.")
        renamed[key] = value
    converted: dict[str, torch.Tensor] = convert_state_dict_to_peft(convert_state_dict_to_diffusers(renamed))
    return converted


def clip_from_checkpoint(
    model_class: Any, state: Mapping[str, torch.Tensor], subfolder: str, configuration: Path, dtype: torch.dtype
) -> Any:
    """A CLIP text model out of a single checkpoint in the original layout.

    Args:
        model_class: transformers' class.
        state: the whole checkpoint.
        subfolder: folder of its `config.json` in `configuration`, which also says which of SDXL's two it is.
        configuration: a diffusers folder; its weights are not read.
        dtype: of the model.
    """
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

    return create_diffusers_clip_model_from_ldm(
        model_class, state, subfolder, str(configuration), dtype, local_files_only=True
    )


def model_from_checkpoint(
    model_class: Any,
    state: Mapping[str, torch.Tensor],
    subfolder: str,
    configuration: Path,
    dtype: torch.dtype,
    where: str,
) -> Any:
    """A model of diffusers' out of a single checkpoint in the original layout.

    What else the checkpoint holds (other models, a trainer's averages) is left aside, as diffusers does.

    Args:
        model_class: such as `UNet2DConditionModel`.
        state: the whole checkpoint.
        subfolder: folder of the model's `config.json` in `configuration`.
        configuration: a diffusers folder; its weights are not read.
        dtype: of the model.
        where: names the checkpoint in messages.

    Raises:
        WeightsError: a tensor is missing; one of another shape is a ValueError.
    """
    try:
        return model_class.from_single_file(
            dict(state), config=str(configuration), subfolder=subfolder, dtype=dtype, local_files_only=True
        )
    except NotImplementedError as error:  # torch's, about a tensor that was never filled; it does not say which
        missing = _missing_from_checkpoint(model_class, state, configuration / subfolder)
        raise WeightsError(f"{where}: tensor {missing} is missing") from error


def _missing_from_checkpoint(model_class: Any, state: Mapping[str, torch.Tensor], config_folder: Path) -> str:
    """Name of the first tensor that a checkpoint lacks, as diffusers calls it."""
    import torch
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    config = model_class.load_config(config_folder)
    convert = SINGLE_FILE_LOADABLE_CLASSES[model_class.__name__]["checkpoint_mapping_fn"]
    converted = convert(config=config, checkpoint=dict(state))
    with torch.device("meta"):
        wanted = model_class.from_config(config).state_dict()
    return next((name for name in wanted if name not in converted), "(unknown)")


def take_map_embedder(controlnet: Any) -> torch.nn.Module:
    """A ControlNet's own layer that embeds control maps; from now on the ControlNet expects embedded maps."""
    from torch import nn

    embedder: nn.Module = controlnet.controlnet_cond_embedding
    controlnet.controlnet_cond_embedding = nn.Identity()
    return embedder


def begin_schedule_at(scheduler: Any, tick: int) -> None:
    """Tell a scheduler which of its timesteps comes first; those that keep no position need not be told."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(tick)


def takes_generator(scheduler: Any) -> bool:
    """Whether a scheduler's `step` draws noise from a generator that it is given."""
    return "generator" in inspect.signature(scheduler.step).parameters


def draw_brownian_tree_on_cpu(scheduler: Any, latents: torch.Tensor) -> None:
    """Let a DPMSolverSDEScheduler draw its noise on the CPU, where its `step` would draw on the device of the latents.

    Generators of different devices draw different numbers from one seed. Made as `step` makes it, before the first
    step after `set_timesteps`; at other times, and for other schedulers, this does nothing.
    """
    if getattr(scheduler, "noise_sampler", scheduler) is not None:
        return
    import torch
    from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

    device, sigmas = latents.device, scheduler.sigmas
    like = torch.zeros(latents.shape, dtype=latents.dtype)
    lowest, highest = sigmas[sigmas > 0].min().item(), sigmas.max().item()
    tree = BrownianTreeNoiseSampler(like, lowest, highest, scheduler.noise_sampler_seed)
    scheduler.noise_sampler = lambda sigma, sigma_next: tree(sigma, sigma_next).to(device)
