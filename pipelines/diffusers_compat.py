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

if TYPE_CHECKING:
    import torch

UP_BLOCK_INPUT, UP_BLOCK_SKIPS = "hidden_states", "res_hidden_states_tuple"
"""Keyword arguments with which a UNet calls its up blocks: `[rows, channels, height, width]`, and a tuple of such."""


def with_defaults(model_class: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json`, with diffusers' default for every key it lacks, as the loaded model has it.

    Configs hold the keys of the diffusers that wrote them: the VAEs of SD1.5 and SD2 are older than `scaling_factor`.

    Args:
        model_class: diffusers' class, such as `AutoencoderKL`; its constructor's arguments are the keys.
        config: as it is published.
    """
    parameters = inspect.signature(model_class.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty} | dict(config)


def read_lora_file(
    path: Path, unet_config: Mapping[str, Any] | None
) -> tuple[dict[str, torch.Tensor], dict[str, float] | None]:
    """Tensors of a LoRA file under `<part>.<module>`, and kohya's alphas under the same names.

    SDXL's loader reads the files of SD too.

    Args:
        path: a `.safetensors` file in PEFT's, kohya's or diffusers' old layout.
        unet_config: config of an SDXL UNet, whose blocks kohya counts differently; None for SD.
    """
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin

    blocks = None if unet_config is None else SimpleNamespace(**unet_config)  # it reads attributes of a config object
    state, alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(
        str(path.parent), weight_name=path.name, unet_config=blocks, use_safetensors=True, local_files_only=True
    )
    return state, alphas


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
