"""Write the tiny seeded models: the real classes at toy sizes, in ordinary diffusers folders.

They draw noise, not pictures. They exist so that parity with diffusers can be proved, and the graph run, on any machine
with no download. One folder for each of SD1.5, SD2, SDXL base, SSD, turbo and the refiner; seeds fixed; about 50 MB.
The shapes differ on purpose (downscale 8, 16 and 32; 4 and 8 latent channels; epsilon and v-prediction), so that code
which assumes a shape instead of reading the config fails.

    python models/make_tiny.py [folder]        # default: models/tiny; does nothing when the folder is up to date
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

if __name__ == "__main__":
    # Before the imports, which would tell that image processors make do without torchvision: nobody need know.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import diffusers
import numpy as np
import onnx
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    ControlNetUnionModel,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    VitPoseBackboneConfig,
    VitPoseConfig,
    VitPoseForPoseEstimation,
)
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil
from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil
from transformers.models.vitpose.image_processing_pil_vitpose import VitPoseImageProcessorPil

from pipelines.spandrel_compat import esrgan

M = TypeVar("M", bound=torch.nn.Module)
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """A CLIP tokenizer over single bytes: 256 symbols, the same 256 at a word's end, and the two specials."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
    vocabulary = {s: i for i, s in enumerate([*symbols, *(s + "</w>" for s in symbols)])}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77, pad_token=pad)


def text_config(width: int, layers: int, projection: int, activation: str) -> CLIPTextConfig:
    """A CLIP text tower whose special ids are the tokenizer's, or pooling would pick the wrong position."""
    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        projection_dim=projection,
        hidden_act=activation,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )


def vae(channels: tuple[int, ...], latent_channels: int, sample_size: int, scaling_factor: float) -> AutoencoderKL:
    """An AutoencoderKL that divides width and height by 2^(len(channels) - 1)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=sample_size,
        scaling_factor=scaling_factor,
    )


def sd_unet(latent_channels: int, context: int, sample_size: int, **extra: Any) -> UNet2DConditionModel:
    """A UNet of the SD family's shape."""
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=context,
        attention_head_dim=4,
        **extra,
    )


def sdxl_unet(context: int, time_ids: int, projection: int, **extra: Any) -> UNet2DConditionModel:
    """A UNet of the SDXL family's shape: no attention at the outermost level, pooled text and time ids added."""
    shape = {"transformer_layers_per_block": [1, 1, 2]} | extra
    return UNet2DConditionModel(
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=context,
        attention_head_dim=(2, 4, 8),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * time_ids + projection,
        **shape,
    )


def seeded(seed: int, module: M) -> M:
    """Fill every weight from `seed`, lively enough that prompt, time and size change the picture visibly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim >= 2:
                # Values louder, not queries and keys: a sharp softmax would blow rounding errors up to visible size.
                louder = ("attn2.to_v", "attn2.to_out", "add_embedding", "time_embedding")
                gain = 4.0 if any(part in name for part in louder) else 1.0
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain * fan_in**-0.5)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
            else:
                parameter.fill_(1)  # scales of norms, which RT-DETR draws from torch's global generator
    return module.eval()


def sd15() -> StableDiffusionPipeline:
    """SD1.5: epsilon, downscale 8, 4 latent channels."""
    return StableDiffusionPipeline(
        tokenizer=tokenizer(),
        text_encoder=seeded(11, CLIPTextModel(text_config(32, 3, 32, "quick_gelu"))),
        unet=seeded(12, sd_unet(4, 32, 64)),
        vae=seeded(13, vae((8, 8, 16, 16), 4, 512, 0.18215)),
        scheduler=PNDMScheduler(**NOISE, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd2() -> StableDiffusionPipeline:
    """SD2: v-prediction, downscale 16, 8 latent channels, a gelu text tower padded with `!`."""
    return StableDiffusionPipeline(
        tokenizer=tokenizer(pad="!"),
        text_encoder=seeded(21, CLIPTextModel(text_config(48, 3, 48, "gelu"))),
        unet=seeded(22, sd_unet(8, 48, 48, use_linear_projection=True)),
        vae=seeded(23, vae((8, 8, 8, 16, 16), 8, 768, 0.18215)),
        scheduler=DDIMScheduler(
            **NOISE, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl_shared() -> dict[str, Any]:
    """What every SDXL model has in common: both text encoders and the VAE (downscale 32)."""
    return {
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(pad="!"),
        "text_encoder": seeded(31, CLIPTextModel(text_config(32, 3, 32, "quick_gelu"))),
        "text_encoder_2": seeded(32, CLIPTextModelWithProjection(text_config(64, 4, 48, "gelu"))),
        "vae": seeded(33, vae((8, 8, 8, 16, 16, 16), 4, 1024, 0.13025)),
    }


def euler(**extra: Any) -> EulerDiscreteScheduler:
    """The scheduler SDXL ships with."""
    return EulerDiscreteScheduler(**NOISE, timestep_spacing="leading", steps_offset=1, **extra)


def sdxl() -> StableDiffusionXLPipeline:
    """SDXL base."""
    return StableDiffusionXLPipeline(
        **sdxl_shared(), unet=seeded(34, sdxl_unet(96, 6, 48)), scheduler=euler(), add_watermarker=False
    )


def ssd() -> StableDiffusionXLPipeline:
    """SSD: SDXL with transformer layers removed, differently on the way down and up, a mid block without attention."""
    unet = sdxl_unet(
        96,
        6,
        48,
        mid_block_type="UNetMidBlock2D",
        transformer_layers_per_block=[1, 1, 1],
        reverse_transformer_layers_per_block=[[1, 2], [1, 1], [1, 1]],
    )
    return StableDiffusionXLPipeline(**sdxl_shared(), unet=seeded(35, unet), scheduler=euler(), add_watermarker=False)


def turbo() -> StableDiffusionXLPipeline:
    """SDXL-turbo: few steps, trailing spacing."""
    return StableDiffusionXLPipeline(
        **sdxl_shared(),
        unet=seeded(36, sdxl_unet(96, 6, 48)),
        scheduler=EulerAncestralDiscreteScheduler(**NOISE, timestep_spacing="trailing", steps_offset=1),
        add_watermarker=False,
    )


def refiner() -> StableDiffusionXLImg2ImgPipeline:
    """The SDXL refiner: the second text encoder alone, five time ids with the aesthetic score."""
    shared = sdxl_shared() | {"tokenizer": None, "text_encoder": None}
    return StableDiffusionXLImg2ImgPipeline(
        **shared,
        unet=seeded(37, sdxl_unet(64, 5, 48)),
        scheduler=euler(),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def controlnet(seed: int) -> ControlNetModel:
    """A ControlNet of the tiny SD1.5; its map is 8 times the latents' size."""
    unet = sd_unet(4, 32, 64)
    return seeded(seed, ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 16, 16)))


def controlnet_union(channels: tuple[int, ...] = (8, 8, 8, 8, 8, 16)) -> ControlNetUnionModel:
    """A union ControlNet of the tiny SDXL, six control types; its map is 2^(channels - 1) times the latents."""
    unet = sdxl_unet(96, 6, 48)
    shape = {k: v for k, v in unet.config.items() if k in inspect.signature(ControlNetUnionModel).parameters}
    shape |= {"num_trans_head": 4, "num_trans_channel": 32, "num_proj_channel": 32}
    shape["conditioning_embedding_out_channels"] = channels
    return seeded(53, ControlNetUnionModel(**shape))


def controlnet_sdxl() -> ControlNetModel:
    """A plain ControlNet of the tiny SDXL."""
    channels = (8, 8, 8, 8, 8, 16)
    return seeded(54, ControlNetModel.from_unet(sdxl_unet(96, 6, 48), conditioning_embedding_out_channels=channels))


class DepthAnnotator:
    """A tiny Depth Anything with its image processor, to be saved like a pipeline."""

    def save_pretrained(self, folder: Path, **_: Any) -> None:
        """Write both into one folder, as on the hub."""
        backbone = Dinov2Config(
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            mlp_ratio=2,
            image_size=56,
            patch_size=14,
            out_features=["stage1", "stage2", "stage3", "stage4"],
            reshape_hidden_states=False,
        )
        config = DepthAnythingConfig(
            backbone_config=backbone,
            reassemble_hidden_size=32,
            neck_hidden_sizes=[8, 8, 16, 16],
            fusion_hidden_size=8,
            head_hidden_size=8,
        )
        seeded(61, DepthAnythingForDepthEstimation(config)).save_pretrained(folder)
        size = {"height": 56, "width": 56}
        DPTImageProcessorPil(size=size, ensure_multiple_of=14, keep_aspect_ratio=True).save_pretrained(folder)


class PersonDetector:
    """A tiny RT-DETR that takes what it sees for people."""

    def save_pretrained(self, folder: Path, **_: Any) -> None:
        """Write model and image processor into one folder, as on the hub."""
        backbone = RTDetrResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 8, 16, 16],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        )
        config = RTDetrConfig(
            backbone_config=backbone,
            encoder_in_channels=[8, 16, 16],
            encoder_hidden_dim=16,
            encoder_ffn_dim=16,
            encoder_attention_heads=2,
            decoder_in_channels=[16, 16, 16],
            d_model=16,
            decoder_ffn_dim=16,
            decoder_attention_heads=2,
            decoder_layers=1,
            num_queries=3,
            num_denoising=0,
            num_labels=80,
        )
        model = seeded(62, RTDetrForObjectDetection(config))
        with torch.no_grad():
            model.model.decoder.class_embed[0].bias[0] = 30.0  # above whatever the other classes score
        model.save_pretrained(folder)
        RTDetrImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)


class PoseEstimator:
    """A tiny ViTPose."""

    def save_pretrained(self, folder: Path, **_: Any) -> None:
        """Write model and image processor into one folder, as on the hub."""
        backbone = VitPoseBackboneConfig(
            image_size=[64, 48],
            patch_size=[16, 16],
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            out_features=["stage1"],
            out_indices=[1],
        )
        config = VitPoseConfig(backbone_config=backbone, use_simple_decoder=True, num_labels=17)
        seeded(63, VitPoseForPoseEstimation(config)).save_pretrained(folder)
        VitPoseImageProcessorPil(size={"height": 64, "width": 48}).save_pretrained(folder)


class EdgeDetector:
    """An ONNX file with DexiNed's inputs and outputs: a 512 px picture, edge logits at several scales."""

    def save_pretrained(self, folder: Path, **_: Any) -> None:
        """Write `edges.onnx`: two convolutions side by side."""
        folder.mkdir(parents=True)
        generator = np.random.default_rng(64)
        sizes = {"fine": 3, "coarse": 5}
        kernels = {n: generator.normal(0, 0.05, (1, 3, k, k)).astype(np.float32) for n, k in sizes.items()}
        helper, shape = onnx.helper, [1, 1, 512, 512]
        graph = helper.make_graph(
            [helper.make_node("Conv", ["picture", f"{n}-kernel"], [n], pads=[k // 2] * 4) for n, k in sizes.items()],
            "edges",
            [helper.make_tensor_value_info("picture", onnx.TensorProto.FLOAT, [1, 3, 512, 512])],
            [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n in sizes],
            [onnx.numpy_helper.from_array(kernel, f"{n}-kernel") for n, kernel in kernels.items()],
        )
        opset = [helper.make_opsetid("", 17)]
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), folder / "edges.onnx")


class Lora:
    """A LoRA of rank 4 on a tiny model's attention, in PEFT's layout."""

    def __init__(self, seed: int, build: Callable[[], Any]) -> None:
        self._seed, self._build = seed, build

    def save_pretrained(self, folder: Path, **_: Any) -> None:
        """Write the file that `load_lora_weights` looks for."""
        pipe = self._build()
        generator = torch.Generator().manual_seed(self._seed)
        encoders = {name: getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")}
        state: dict[str, torch.Tensor] = {}
        for part, model in {"unet": pipe.unet, **encoders}.items():
            endings = ("to_q", "to_v", "to_out.0") if part == "unet" else ("q_proj", "v_proj", "fc1")
            for name, module in model.named_modules() if model is not None else ():
                if name.endswith(endings):
                    out, into = module.weight.shape
                    down = torch.randn(4, into, generator=generator) * into**-0.5
                    # Moderate, or sharpened attention would blow rounding errors up to visible size.
                    up = torch.randn(out, 4, generator=generator) * 0.15
                    state |= {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}
        folder.mkdir(parents=True)
        save_file(state, folder / "pytorch_lora_weights.safetensors")


class Upscaler:
    """An upscaler of spandrel's ESRGAN at a toy size, which sees no farther than a tile's margin."""

    def __init__(self, seed: int, scale: int, unshuffle: int = 1) -> None:
        self._seed = seed
        self._scale = scale
        self._unshuffle = unshuffle

    def save_pretrained(self, folder: Path, **_: Any) -> None:
        """Write the file, with the old names of tensors, or Real-ESRGAN's where pixels are unshuffled."""
        channels, factor = 3 * self._unshuffle**2, self._unshuffle if self._unshuffle > 1 else None
        net = seeded(
            self._seed,
            esrgan()(in_nc=channels, num_filters=8, num_blocks=1, scale=self._scale, shuffle_factor=factor),
        )
        state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        last = f"model.{max(int(name.split('.')[1]) for name in state)}"
        state[f"{last}.weight"] *= 0.3  # pixels that are neither black nor white
        state[f"{last}.bias"] += 0.5
        if factor is not None:
            state = {_real_esrgan_name(name): tensor for name, tensor in state.items()}
        folder.mkdir(parents=True)
        save_file(state, folder / "model.safetensors")


def _real_esrgan_name(name: str) -> str:
    """Of an old name of a tensor of two upsampling layers."""
    for old, new in {
        r"model\.0\.": "conv_first.",
        r"model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.": r"body.\1.rdb\2.conv\3.",
        r"model\.1\.sub\.\d+\.": "conv_body.",
        r"model\.3\.": "conv_up1.",
        r"model\.6\.": "conv_up2.",
        r"model\.8\.": "conv_hr.",
        r"model\.10\.": "conv_last.",
    }.items():
        if re.match(old, name):
            return re.sub(old, new, name)
    raise ValueError(name)


MODELS = {"sd15": sd15, "sd2": sd2, "sdxl": sdxl, "ssd": ssd, "sdxl-turbo": turbo, "sdxl-refiner": refiner}
MODELS |= {
    "controlnet-sd15-canny": lambda: controlnet(51),
    "controlnet-sd15-soft": lambda: controlnet(52),
    "controlnet-sdxl-union": controlnet_union,
    "controlnet-sdxl": controlnet_sdxl,
    "annotator-depth": DepthAnnotator,
    "annotator-people": PersonDetector,
    "annotator-pose": PoseEstimator,
    "annotator-edges": EdgeDetector,
    "lora-detail-sd15": lambda: Lora(71, sd15),
    "lora-detail-sdxl": lambda: Lora(72, sdxl),
    "lora-pixel-sd15": lambda: Lora(73, sd15),
    "lora-pixel-sdxl": lambda: Lora(74, sdxl),
    "upscaler-x4": lambda: Upscaler(81, 4),
    "upscaler-x2": lambda: Upscaler(82, 4, unshuffle=2),
}


def fingerprint() -> str:
    """Changes when this file or a library that draws or saves the weights changes."""
    versions = f"{torch.__version__} {diffusers.__version__} {transformers.__version__}"
    return hashlib.sha256(Path(__file__).read_bytes() + versions.encode()).hexdigest()


def make_tiny(folder: Path) -> bool:
    """Write every model under `folder` unless it is up to date; returns whether it wrote."""
    stamp = folder / "fingerprint"
    if stamp.exists() and stamp.read_text() == fingerprint():
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        for name, build in MODELS.items():
            build().save_pretrained(Path(scratch) / name, safe_serialization=True)
        (Path(scratch) / "fingerprint").write_text(fingerprint())
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(scratch, folder)
    return True


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "tiny"
    print(f"{target}: {'written' if make_tiny(target) else 'up to date'}")
