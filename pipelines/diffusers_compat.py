"""What is used of diffusers beyond its documented interface; `tests/upstream/test_diffusers.py` has a test for each.

Imports are inside the functions: diffusers' loaders bring transformers and scipy, which the engine does without, and
the names of samplers are known to processes without torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

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


def clip_from_checkpoint(
    model_class: Any, state: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> tuple[Any, dict[str, list[Any]]]:
    """A CLIP text model out of a single checkpoint in the original layout, or a file of this model alone.

    Args:
        model_class: transformers' class.
        state: the text encoders of a checkpoint, in one number format.
        config: the model's `config.json`; its width says which of SDXL's two it is.

    Returns:
        The model, and what `from_pretrained(..., output_loading_info=True)` would say of it.
    """
    from accelerate import init_empty_weights
    from diffusers.loaders import single_file_utils as ldm

    with init_empty_weights():
        model = model_class(model_class.config_class(**config))
    places = getattr(model, "text_model", model).embeddings.position_embedding.weight.shape[-1]
    named: Mapping[str, torch.Tensor]
    for prefix in ("cond_stage_model.model.", "conditioner.embedders.1.model.", "conditioner.embedders.0.model.", ""):
        key = f"{prefix}positional_embedding"
        if key in state and state[key].shape[-1] == places:
            named = ldm.convert_open_clip_checkpoint(model, dict(state), prefix=prefix)
            break
    else:
        named = ldm.convert_ldm_clip_checkpoint(dict(state)) or state
    return _filled(model, _with_or_without_level(named, model))


def _with_or_without_level(named: Mapping[str, torch.Tensor], model: Any) -> Mapping[str, torch.Tensor]:
    """Names with the level `text_model` where a transformers class has it, which differs from class to class."""
    if hasattr(model, "text_model"):
        bare = ("embeddings.", "encoder.", "final_layer_norm.")
        return {f"text_model.{key}" if key.startswith(bare) else key: value for key, value in named.items()}
    return {key.removeprefix("text_model."): value for key, value in named.items()}


def model_from_checkpoint(
    model_class: Any, state: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> tuple[Any, dict[str, list[Any]]]:
    """A model of diffusers' out of a single checkpoint in the original layout, or a file of this model alone.

    Args:
        model_class: such as `UNet2DConditionModel`.
        state: the tensors of this model in the checkpoint, in one number format.
        config: the model's `config.json`.

    Returns:
        The model, and what `from_pretrained(..., output_loading_info=True)` would say of it.
    """
    from accelerate import init_empty_weights
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    settings = with_defaults(model_class, config)
    with init_empty_weights():
        model = model_class.from_config(settings)
    converter = SINGLE_FILE_LOADABLE_CLASSES.get(model_class.__name__, {}).get("checkpoint_mapping_fn")
    original = ("model.diffusion_model.", "first_stage_model.", "control_model.")
    if converter is not None and any(key.startswith(original) for key in state):
        state = converter(config=settings, checkpoint=dict(state))
    return _filled(model, state)


def _filled(model: Any, state: Mapping[str, torch.Tensor]) -> tuple[Any, dict[str, list[Any]]]:
    """A model made without memory with its tensors, and an account of those that do not fit."""
    wanted = model.state_dict()
    mismatched = [
        (name, tensor.shape, wanted[name].shape)
        for name, tensor in state.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    info = {
        "missing_keys": [name for name in wanted if name not in state],
        "mismatched_keys": mismatched,
        "unexpected_keys": [name for name in state if name not in wanted],
    }
    if not info["missing_keys"] and not mismatched:
        model.load_state_dict({name: state[name] for name in wanted}, assign=True)
    return model.eval(), info


def take_map_embedder(controlnet: Any) -> torch.nn.Module:
    """A ControlNet's own layer that embeds control maps; from now on the ControlNet expects embedded maps."""
    from torch import nn

    embedder: nn.Module = controlnet.controlnet_cond_embedding
    controlnet.controlnet_cond_embedding = nn.Identity()
    return embedder


def mask_rows(controlnet: Any, mask: torch.Tensor) -> None:
    """Set which rows of the next pass a union ControlNet's attention lets see each other.

    It attends over the rows of a batch, not over its maps (CTL-1; `nn.MultiheadAttention` without `batch_first` reads
    `[rows, maps, channels]`). A pipeline's rows are one picture's, uncond and cond; rows of others must stay out.

    Args:
        controlnet: a `ControlNetUnionModel`.
        mask: `[rows, rows]`, added to the logits.
    """
    for block in controlnet.transformer_layes:
        block.attn_mask = mask


def begin_schedule_at(scheduler: Any, tick: int) -> None:
    """Tell a scheduler which of its timesteps comes first; those that keep no position need not be told."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(tick)


def takes_generator(scheduler: Any) -> bool:
    """Whether a scheduler's `step` draws noise from a generator that it is given."""
    return "generator" in inspect.signature(scheduler.step).parameters


def brownian_levels(scheduler: Any) -> tuple[float, float] | None:
    """Lowest and highest noise level of the Brownian tree that a DPMSolverSDEScheduler asks; None for all others."""
    if not hasattr(scheduler, "noise_sampler"):
        return None
    sigmas = scheduler.sigmas
    return sigmas[sigmas > 0].min().item(), sigmas.max().item()


def brownian_tree(
    shape: Sequence[int], dtype: torch.dtype, levels: tuple[float, float], seed: int
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The Brownian tree of a DPMSolverSDEScheduler, which gives the noise between two noise levels; on the CPU.

    The scheduler's `step` would make one on the device of the latents, and generators of different devices draw
    different numbers from one seed.
    """
    import torch
    from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

    tree: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    tree = BrownianTreeNoiseSampler(torch.zeros(tuple(shape), dtype=dtype), *levels, seed)
    return tree
