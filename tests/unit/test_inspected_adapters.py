"""Adapters as their trainers write them, in the shapes of published models: what their headers tell."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipelines.weights.inspection import inspect_file
from tests.support import adapter_files as files
from tests.support import sparse_files
from tests.support.adapter_files import adapter

ONE, BOTH, TEXT = ("unet", "text_encoder"), ("unet", "text_encoder", "text_encoder_2"), ("text_encoder",)
EVERYTHING: dict[str, Any] = {"pattern": files.EVERYTHING}
QUERIES: dict[str, Any] = {"pattern": r"attn1\.to_q$"}

LORAS: dict[str, tuple[Callable[[], dict[str, Any]], str, str | None]] = {
    "kohya, SD1.5": (partial(adapter, "sd15", files.kohya, files.lora, parts=ONE), "lora", "sd15"),
    "kohya, SD2": (partial(adapter, "sd2", files.kohya, files.lora, parts=ONE), "lora", "sd2"),
    "kohya, SDXL": (partial(adapter, "sdxl", files.kohya_original, files.lora, parts=BOTH), "lora", "sdxl"),
    "kohya, SDXL, UNet alone": (partial(adapter, "sdxl", files.kohya_original, files.lora), "lora", "sdxl"),
    "OneTrainer, SDXL": (partial(adapter, "sdxl", files.kohya_te1, files.lora, parts=BOTH), "lora", "sdxl"),
    "kohya, SSD": (partial(adapter, "ssd", files.kohya, files.lora), "lora", "ssd"),
    "kohya, the refiner": (partial(adapter, "sdxl-refiner", files.kohya, files.lora), "lora", "sdxl-refiner"),
    "LoCon with a middle": (partial(adapter, "sd15", files.kohya, files.tucker, **EVERYTHING), "lora", "sd15"),
    "LyCORIS' wrapper": (partial(adapter, "sd15", files.lycoris, files.lora), "lora", "sd15"),
    "PEFT, SD1.5": (partial(adapter, "sd15", files.dotted, files.peft_lora, parts=ONE), "lora", "sd15"),
    "PEFT, SDXL": (partial(adapter, "sdxl", files.dotted, files.peft_lora, parts=BOTH), "lora", "sdxl"),
    "PEFT, a whole model": (partial(adapter, "sdxl", files.whole_peft, files.peft_lora), "lora", "sdxl"),
    "ComfyUI's names": (partial(adapter, "sdxl", files.comfy, files.peft_lora), "lora", "sdxl"),
    "attention processors": (partial(adapter, "sd15", files.processors, files.old_pair), "lora", "sd15"),
    "the oldest": (partial(adapter, "sd15", files.oldest, files.old_pair), "lora", "sd15"),
    "without alphas": (lambda: files.without(adapter("sdxl", files.kohya, files.lora), "alpha$"), "lora", "sdxl"),
    "text encoder alone, SD1.5": (
        partial(adapter, "sd15", files.kohya, files.lora, parts=TEXT),
        "lora",
        "sd15",
    ),
    "text encoder alone, SD2": (
        partial(adapter, "sd2", files.kohya, files.lora, parts=TEXT),
        "lora",
        "sd2",
    ),
    "text encoders alone, SDXL": (
        partial(adapter, "sdxl", files.kohya_te1, files.lora, parts=("text_encoder", "text_encoder_2")),
        "lora",
        "sdxl",
    ),
    "self attention alone, SDXL": (
        partial(adapter, "sdxl", files.kohya_original, files.lora, **QUERIES),
        "lora",
        "sdxl",
    ),
    "self attention alone, SD": (
        partial(adapter, "sd2", files.kohya, files.lora, **QUERIES),
        "lora",
        None,
    ),
    "convolutions alone": (partial(adapter, "sd15", files.kohya, files.lora, pattern="conv1$"), "lora", None),
    "DoRA, kohya": (partial(adapter, "sdxl", files.kohya_original, files.dora, parts=BOTH), "dora", "sdxl"),
    "DoRA, PEFT": (partial(adapter, "sd15", files.dotted, files.peft_dora, parts=ONE), "dora", "sd15"),
    "LoHa": (partial(adapter, "sd15", files.kohya, files.loha, pattern=files.EVERYTHING, parts=ONE), "loha", "sd15"),
    "LoHa, SDXL": (partial(adapter, "sdxl", files.kohya_original, files.loha, **EVERYTHING), "loha", "sdxl"),
    "LoKr": (partial(adapter, "sd2", files.kohya, files.lokr, **EVERYTHING), "lokr", "sd2"),
    "LoKr, SDXL": (partial(adapter, "sdxl", files.kohya_original, files.lokr, parts=BOTH), "lokr", "sdxl"),
    "OFT, SDXL": (partial(adapter, "sdxl", files.kohya_original, files.oft), "oft", "sdxl"),
    "OFT, SD": (partial(adapter, "sd15", files.kohya, files.oft), "oft", None),
    "OFT, PEFT": (partial(adapter, "sd15", files.dotted, files.peft_oft), "oft", "sd15"),
    "BOFT, PEFT": (partial(adapter, "sdxl", files.dotted, files.peft_boft), "oft", "sdxl"),
}


@pytest.mark.parametrize("name", LORAS)
def test_kind_and_base_of_every_layout(tmp_path: Path, name: str) -> None:
    make, kind, base = LORAS[name]
    report = inspect_file(sparse_files.write(tmp_path / "one.safetensors", make()))
    assert (report.kind, report.base) == (kind, base), report
    if kind != "oft":
        assert report.rank == files.RANK
    assert report.reason


def test_the_parts_an_adapter_changes(tmp_path: Path) -> None:
    for parts in (ONE, BOTH, ("unet",)):
        shapes = adapter("sdxl", files.kohya_original, files.lora, parts=parts)
        assert inspect_file(sparse_files.write(tmp_path / "one.safetensors", shapes)).parts == parts


@pytest.mark.parametrize("said", ["sdxl_base_v1-0", "sd_v1", "sd_v2"])
def test_shapes_outweigh_metadata(tmp_path: Path, said: str) -> None:
    for base in ("sd15", "sdxl"):
        shapes = adapter(base, files.kohya, files.lora)
        path = sparse_files.write(tmp_path / "one.safetensors", shapes, {"ss_base_model_version": said})
        report = inspect_file(path)
        assert report.base == base
        told = {"sdxl_base_v1-0": "sdxl", "sd_v1": "sd15", "sd_v2": "sd2"}[said]
        assert any("metadata says" in note for note in report.notes) == (told != base)


def test_what_travels_beside_the_layers_is_told(tmp_path: Path) -> None:
    shapes = adapter("sdxl", files.kohya_original, files.lora)
    shapes |= {"bundle_emb.token.clip_l": (2, 768), "bundle_emb.token.clip_g": (2, 1280)}
    shapes |= {"lora_unet_out_2.diff_b": (4,), "lora_unet_out_0.w_norm": (320,)}
    report = inspect_file(sparse_files.write(tmp_path / "one.safetensors", shapes))
    assert (report.kind, report.base) == ("lora", "sdxl")
    assert "embedding" in " ".join(report.notes)
    assert "differences" in " ".join(report.notes)


def test_layers_of_several_kinds(tmp_path: Path) -> None:
    shapes = adapter("sdxl", files.kohya_original, files.lokr, pattern="to_q$")
    shapes |= adapter("sdxl", files.kohya_original, files.lora, pattern="to_k$")
    report = inspect_file(sparse_files.write(tmp_path / "one.safetensors", shapes))
    assert (report.kind, report.base, report.notes) == ("lokr", "sdxl", ("some layers are LoRA",))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "another family"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "Flux"),
        ("lora_unet_joint_blocks_0_context_block_attn_qkv.lora_down.weight", "another family"),
        ("unet.down_blocks.0.motion_modules.0.temporal_transformer.proj_in.lora_A.weight", "AnimateDiff"),
        ("diffusion_model.blocks.0.cross_attn.q.lora_A.weight", "another family"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.diff", "full-difference"),
        ("lora_unet_mid_block_attentions_0_proj_in.on_input", "IA3"),
        ("lora_unet_mid_block_attentions_0_proj_in.a1.weight", "GLoRA"),
        ("lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight", "LLLite"),
        ("lora_controlnet", "Control-LoRA"),
    ],
)
def test_other_families_and_kinds_are_unknown_by_name(tmp_path: Path, name: str, said: str) -> None:
    report = inspect_file(sparse_files.write(tmp_path / "one.safetensors", {name: (8, 320), "more.weight": (8, 8)}))
    assert (report.kind, report.base) == ("unknown", None)
    assert said in report.reason
