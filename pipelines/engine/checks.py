"""Checks of one job before it shares a tick, so that other jobs do not fail with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.errors import DenoiseError, NonFiniteError

if TYPE_CHECKING:
    import torch

    from pipelines.control.types import ControlHint
    from pipelines.plan import StagePlan
    from pipelines.text.conditioning import Conditioning


def check_job(
    plan: StagePlan,
    latents: torch.Tensor,
    conditioning: Conditioning,
    added_conditions: Mapping[str, torch.Tensor],
    mask: torch.Tensor | None,
    masked: torch.Tensor | None,
    hints: Sequence[ControlHint],
    latent_shape: tuple[int, ...],
    unet_config: Mapping[str, Any],
) -> None:
    """Check everything that a job adds to a batch, except adapters, which are checked when they are loaded.

    Args:
        plan: the stage.
        latents: what it begins from.
        conditioning: one row, or uncond and cond where the stage is guided.
        added_conditions: what else the UNet is told, one entry a row.
        mask: which latents are repainted, if a part is.
        masked: latents of the picture without that part, for a UNet for inpainting.
        hints: its control maps, one for each of the plan's controls.
        latent_shape: `[1, channels, height, width]` of the latents of a picture of its size.
        unet_config: the UNet's `config.json`.

    Raises:
        DenoiseError: a shape that cannot be stacked with others or read by the UNet.
        NonFiniteError: values that are not finite numbers.
    """
    brought = latent_shape[1]
    if plan.reads_mask:
        brought += sum(tensor.shape[1] for tensor in (mask, masked) if tensor is not None)
    if unet_config["in_channels"] != brought:
        raise DenoiseError(
            f"component {plan.component} reads {unet_config['in_channels']} channels, and the job brings {brought}"
        )
    rows = 2 if plan.guided else 1
    embeds = conditioning.prompt_embeds
    _check_shape("latents", latents, latent_shape)
    _check_shape("prompt_embeds", embeds, (rows, None, unet_config["cross_attention_dim"]))
    for name, tensor in added_conditions.items():
        _check_shape(name, tensor, (rows, None))
    if mask is not None:
        _check_shape("mask", mask, (1, 1, *latent_shape[2:]))
    if masked is not None:
        _check_shape("masked picture", masked, latent_shape)
        check_finite(masked, plan, "the latents of the masked picture have")
    if len(hints) != len(plan.controls):
        raise DenoiseError(f"{len(hints)} control maps for {len(plan.controls)} controls")
    for hint in hints:
        _check_shape("control map", hint.image, (1, 3, plan.height, plan.width))
        check_finite(hint.image, plan, "the control map has")
    check_finite(embeds, plan, "the prompt's embeddings have")
    check_finite(latents, plan, "the latents to begin from have")


def check_finite(tensor: torch.Tensor, plan: StagePlan, what: str) -> None:
    """Raise NonFiniteError when a job's tensor has values that are not finite numbers; `what` begins the message."""
    if bool(tensor.isfinite().all()):
        return
    advice = f"sampler '{plan.sampler}' with {plan.schedule.steps} steps: {what} values that are not finite numbers. "
    advice += "Try another sampler, other steps or a lower cfg_scale"
    if plan.loras:
        raise NonFiniteError(f"{advice}, or smaller weights of the loras {[use.name for use in plan.loras]}", "loras")
    raise NonFiniteError(advice, "sampler")


def _check_shape(what: str, tensor: torch.Tensor, wanted: tuple[int | None, ...]) -> None:
    """Compare a shape; None fits any size but 0."""
    fits = tensor.ndim == len(wanted) and all(
        size == want or (want is None and size) for size, want in zip(tensor.shape, wanted, strict=True)
    )
    if not fits:
        shape = [want or "any" for want in wanted]
        raise DenoiseError(f"{what} {list(tensor.shape)} cannot join a batch, where {shape} is wanted")
