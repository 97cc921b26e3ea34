"""What `pipelines/diffusers_compat.py` and the sampler adapter assume of diffusers. A failure here after an upgrade
names the assumption that no longer holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, ControlNetUnionModel, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModel

from config.catalog import ROOT
from pipelines import diffusers_compat as compat
from pipelines.control.passes import ControlInputs, ControlNetPass
from pipelines.sampling.samplers import SAMPLERS
from tests.support import original_layout

TINY = ROOT / "models" / "tiny"
CONFIG = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CONFIG |= {"skip_prk_steps": True}  # as every model's configuration says of PNDM
OF_DIFFUSERS = sorted(name for name, spec in SAMPLERS.items() if spec.make is None)


@pytest.mark.parametrize(
    "model_class", [AutoencoderKL, UNet2DConditionModel, ControlNetModel], ids=lambda given: given.__name__
)
def test_a_models_config_is_its_constructors_arguments_with_their_defaults(model_class: Any) -> None:
    if model_class is AutoencoderKL:
        small: dict[str, Any] = {"block_out_channels": (32,)}
    else:
        small = {
            "block_out_channels": (32, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "cross_attention_dim": 8,
        }
    if model_class is UNet2DConditionModel:
        small["up_block_types"] = ("UpBlock2D", "CrossAttnUpBlock2D")
    loaded = {key: value for key, value in model_class(**small).config.items() if not key.startswith("_")}
    assert compat.with_defaults(model_class, small) == loaded


def test_a_clip_model_is_read_from_an_original_checkpoint(tiny_models: Path) -> None:
    expected = load_file(tiny_models / "sd15" / "text_encoder" / "model.safetensors")
    bare = {name.removeprefix("text_model."): tensor for name, tensor in expected.items()}
    state = {f"cond_stage_model.transformer.text_model.{name}": tensor for name, tensor in bare.items()}
    config = json.loads((tiny_models / "sd15" / "text_encoder" / "config.json").read_text())
    model, _ = compat.clip_from_checkpoint(CLIPTextModel, state, config)
    read = {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(read[name], tensor) for name, tensor in bare.items())


def test_a_tensor_that_a_checkpoint_lacks_is_told_and_never_filled(tiny_models: Path) -> None:
    state = original_layout.of_folder(tiny_models / "sd15")
    del state["model.diffusion_model.out.2.bias"]
    config = UNet2DConditionModel.load_config(tiny_models / "sd15" / "unet")
    model, info = compat.model_from_checkpoint(UNet2DConditionModel, state, config)
    assert info["missing_keys"] == ["conv_out.bias"]
    assert model.conv_out.bias.is_meta


def test_a_controlnet_takes_embedded_maps_once_its_embedder_is_taken(tiny_models: Path) -> None:
    net = ControlNetModel.from_pretrained(tiny_models / "controlnet-sd15-canny").eval()
    arguments = {"encoder_hidden_states": torch.zeros(1, 77, 32), "return_dict": False}
    photo, sample = torch.rand(1, 3, 128, 128), torch.zeros(1, 4, 16, 16)
    with torch.inference_mode():
        *_, expected = net(sample, 1, controlnet_cond=photo, **arguments)
        embedder = compat.take_map_embedder(net)
        *_, mid = net(sample, 1, controlnet_cond=embedder(photo), **arguments)
    assert torch.equal(mid, expected)


def test_a_union_controlnet_multiplies_by_scales_and_attends_over_rows(tiny_models: Path) -> None:
    """Rows of one pass can have scales of their own, and a mask separates rows of different pictures."""
    model = ControlNetUnionModel.from_pretrained(tiny_models / "controlnet-sdxl-union").eval()
    embed = compat.take_map_embedder(model)
    config, rows, generator = model.config, 2, torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(rows, *shape, generator=generator)

    projection = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    sample, embeds = noise(config.in_channels, 8, 8), noise(77, config.cross_attention_dim)
    added, scales = (noise(projection), torch.ones(rows, 6)), (torch.tensor([0.5, 1.5]), torch.tensor([2.0, 0.0]))
    downscale = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
    with torch.inference_mode():
        maps = tuple(embed(noise(3, 8 * downscale, 8 * downscale)) for _ in scales)
        strangers = torch.full((rows, rows), -torch.inf).fill_diagonal_(0)
        inputs = ControlInputs(sample, torch.full((rows,), 300.0), embeds, maps, scales, (strangers,), added)
        together = ControlNetPass(model, (3, 1)).evaluate(inputs)
        compat.mask_rows(model, torch.zeros(1, 1))
        for row in range(rows):
            one = slice(row, row + 1)
            down, mid = model(
                sample[one],
                inputs.timesteps[one],
                encoder_hidden_states=embeds[one],
                controlnet_cond=[image[one] for image in maps],
                control_type=torch.tensor([[0.0, 1.0, 0.0, 1.0, *(0.0,) * (config.num_control_type - 4)]]),
                control_type_idx=[3, 1],
                conditioning_scale=[scale[row].item() for scale in scales],
                added_cond_kwargs={"text_embeds": added[0][one], "time_ids": added[1][one]},
                return_dict=False,
            )
            for ours, theirs in zip(together, (*down, mid), strict=True):
                assert (ours[row] - theirs[0]).norm() < 1e-5 * theirs.norm()


def test_a_controlnet_names_the_channel_order_of_its_maps(tiny_models: Path) -> None:
    net = ControlNetModel.from_pretrained(tiny_models / "controlnet-sd15-canny")
    assert net.config.controlnet_conditioning_channel_order == "rgb"


@pytest.mark.parametrize("name", OF_DIFFUSERS)
def test_a_scheduler_walks_its_schedule_from_any_tick(name: str) -> None:
    """`order`, the length of `timesteps`, the begin index, and a `step` that answers a tuple."""
    spec = SAMPLERS[name]
    scheduler = getattr(diffusers, spec.scheduler).from_config(CONFIG, **spec.settings)
    scheduler.set_timesteps(4)
    assert scheduler.order in (1, 2)
    compat.begin_schedule_at(scheduler, scheduler.order)
    extra = {"generator": torch.Generator().manual_seed(0)} if compat.takes_generator(scheduler) else {}
    latents = torch.ones(1, 4, 8, 8)
    for timestep in scheduler.timesteps[scheduler.order :]:
        output = scheduler.scale_model_input(latents, timestep) * 0.1
        (latents, *_) = scheduler.step(output, timestep, latents, return_dict=False, **extra)
    assert latents.isfinite().all()
    assert float(scheduler.init_noise_sigma) > 0


@pytest.mark.parametrize("name", OF_DIFFUSERS)
def test_a_scheduler_draws_noise_from_its_generator_alone(name: str) -> None:
    """Twice from one seed, with torch's global generator elsewhere, is the same bytes."""
    spec = SAMPLERS[name]
    settings = dict(spec.settings)
    if spec.scheduler == "DPMSolverSDEScheduler":
        settings["noise_sampler_seed"] = 3
    drawn = []
    for elsewhere in (1, 2):
        torch.manual_seed(elsewhere)
        scheduler = getattr(diffusers, spec.scheduler).from_config(CONFIG, **settings)
        scheduler.set_timesteps(3)
        extra = {"generator": torch.Generator().manual_seed(0)} if compat.takes_generator(scheduler) else {}
        latents = torch.ones(1, 4, 8, 8)
        for timestep in scheduler.timesteps:
            output = scheduler.scale_model_input(latents, timestep) * 0.1
            (latents, *_) = scheduler.step(output, timestep, latents, return_dict=False, **extra)
        drawn.append(latents)
    assert torch.equal(*drawn)


def test_a_vae_says_whether_half_precision_overflows(tiny_models: Path) -> None:
    assert AutoencoderKL.load_config(tiny_models / "sdxl" / "vae")["force_upcast"] is True
    assert AutoencoderKL().config.force_upcast is True


def test_the_noise_of_a_seed_is_torchs_own_on_the_cpu() -> None:
    """Pipelines draw with `randn_tensor`; `latents.draw_noise` says the same without it."""
    from diffusers.utils.torch_utils import randn_tensor

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        theirs = randn_tensor((1, 4, 8, 8), torch.Generator().manual_seed(5), torch.device("cpu"), dtype)
        assert torch.equal(theirs, torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5), dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_brownian_tree_made_before_the_first_step_is_the_one_that_step_makes(dtype: torch.dtype) -> None:
    drawn = []
    for ours in (False, True):
        scheduler = diffusers.DPMSolverSDEScheduler.from_config(CONFIG, noise_sampler_seed=3)
        scheduler.set_timesteps(3)
        assert scheduler.noise_sampler is None
        latents = torch.ones(1, 4, 8, 8, dtype=dtype)
        for timestep in scheduler.timesteps:
            if ours and scheduler.noise_sampler is None:
                levels = compat.brownian_levels(scheduler)
                assert levels is not None
                scheduler.noise_sampler = compat.brownian_tree(latents.shape, dtype, levels, 3)
            (latents, *_) = scheduler.step(latents * 0.1, timestep, latents, return_dict=False)
        drawn.append(latents)
    assert torch.equal(*drawn)
    others = diffusers.EulerDiscreteScheduler.from_config(CONFIG)
    assert compat.brownian_levels(others) is None
