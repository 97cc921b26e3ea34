"""Configurations of the hub catalog's models as they are published, without what no code here reads.

Each says where its values were read. The hub itself was not asked: copies of a repository on GitHub are named with
their commit, and what is marked so is public knowledge about the repository that no copy was found of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KL: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
"""What the files below have in common."""

VAES: Mapping[str, tuple[dict[str, Any], float]] = {
    # wswplay/stable-diffusion-v1-5 at 782dc29b92d98e5e6b7ee2ff8a581b20f84ff045: the Flax class, and no scale.
    "SD1.5, Flax": (
        KL | {"_class_name": "FlaxAutoencoderKL", "_diffusers_version": "0.6.0", "sample_size": 512},
        0.18215,
    ),
    # HDRJ-One/runwayml-stable-diffusion-v1-5 at c448ce0770e757aaeeed8369bd3d510b82a0d541.
    "SD1.5": (KL | {"_diffusers_version": "0.6.0", "sample_size": 512, "scaling_factor": 0.18215}, 0.18215),
    # jack-op11/stable-diffusion-2-1-base at 1f758383196d38df1dfe523ddb1030f2bfab7741; SD2's is as old (0.8).
    "SD2": (KL | {"_diffusers_version": "0.10.0.dev0", "sample_size": 768}, 0.18215),
    # PRITHIVSAKTHIUR/AI-Art-Generator-SDXL at a04712fe9b65454f2e625e522f1d0b43e2ff76bc; the refiner, SSD and turbo
    # have the same VAE.
    "SDXL": (
        KL
        | {"_diffusers_version": "0.22.0.dev0", "force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025},
        0.13025,
    ),
    # madebyollin/sdxl-vae-fp16-fix, which the catalog takes for all of SDXL: public knowledge, not read from a copy.
    "SDXL, fp16 fix": (KL | {"force_upcast": False, "sample_size": 512, "scaling_factor": 0.13025}, 0.13025),
}
"""Name -> the VAE's `config.json`, and what its latents are multiplied by."""

BETAS: dict[str, Any] = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
"""What the files below have in common."""
_EULER: dict[str, Any] = {"interpolation_type": "linear", "prediction_type": "epsilon", "sample_max_value": 1.0}

SCHEDULERS: Mapping[str, dict[str, Any]] = {
    # wswplay/stable-diffusion-v1-5 at 782dc29b92d98e5e6b7ee2ff8a581b20f84ff045: the Flax class.
    "SD1.5": BETAS | {"_class_name": "FlaxPNDMScheduler", "_diffusers_version": "0.6.0"},
    # Vikas-2025/Hugging_face_sta_dif_2.1 at 8d0c902020b6347a7f6d10420bb5e1bf57ff129e: SD2.1's, which predicts v as SD2.
    "SD2": BETAS
    | {"_class_name": "FlaxDDIMScheduler", "_diffusers_version": "0.9.0.dev0", "prediction_type": "v_prediction"},
    # PRITHIVSAKTHIUR/AI-Art-Generator-SDXL at a04712fe9b65454f2e625e522f1d0b43e2ff76bc. That the refiner's and SSD's
    # are the same is public knowledge, not read from copies.
    "SDXL": BETAS
    | _EULER
    | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "use_karras_sigmas": False},
    # stabilityai/sdxl-turbo: public knowledge, not read from a copy.
    "SDXL-turbo": BETAS | _EULER | {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
}
"""Name -> the model's `scheduler_config.json`."""
