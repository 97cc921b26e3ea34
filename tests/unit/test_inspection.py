"""Models, embeddings and upscalers in their published shapes: kind and base from the header alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import infer_diffusers_model_type

from config.catalog import ROOT
from pipelines.weights.inspection import FileReport, inspect_file, inspect_folder
from tests.support import original_layout, sparse_files
from tests.support import published_shapes as published

CHECKPOINTS = {
    ("sd15", 4): "v1",
    ("sd15", 9): "inpainting",
    ("sd2", 4): "v2",
    ("sd2", 9): "inpainting_v2",
    ("sdxl", 4): "xl_base",
    ("sdxl", 9): "xl_inpaint",
    ("sdxl-refiner", 4): "xl_refiner",
    ("ssd", 4): "xl_base",  # diffusers takes SSD for SDXL and cannot fill it
}
"""Base and channels, and what diffusers calls such a checkpoint."""


def inspected(folder: Path, shapes: dict[str, Any], metadata: dict[str, str] | None = None) -> FileReport:
    return inspect_file(sparse_files.write(folder / "one.safetensors", shapes, metadata))


@pytest.mark.parametrize(("base", "channels"), CHECKPOINTS)
def test_a_checkpoint(tmp_path: Path, base: str, channels: int) -> None:
    state = published.checkpoint(base, channels)
    assert infer_diffusers_model_type(state) == CHECKPOINTS[base, channels]
    report = inspected(tmp_path, state)
    assert (report.kind, report.base, report.channels) == ("checkpoint", base, channels)
    encoders = tuple(original_layout.ENCODERS[base])
    assert report.parts == ("unet", *encoders, "vae")
    assert any("mask" in note for note in report.notes) == (channels == 9)
    assert report.prediction == (None if (base, channels) == ("sd2", 4) else "epsilon")
    assert report.dtype == "F16"


@pytest.mark.parametrize(
    ("marks", "prediction", "ends_in_noise"),
    [
        ({"v_pred": ()}, "v_prediction", False),
        ({"v_pred": (), "ztsnr": ()}, "v_prediction", True),
        ({"edm_mean": (1, 4, 1, 1), "edm_std": (1, 4, 1, 1)}, "edm", False),
        ({"edm_vpred.sigma_max": (), "edm_vpred.sigma_min": ()}, "edm", False),
    ],
)
def test_marks_of_an_sdxl(tmp_path: Path, marks: dict[str, Any], prediction: str, ends_in_noise: bool) -> None:
    report = inspected(tmp_path, published.checkpoint("sdxl") | marks)
    assert (report.kind, report.base) == ("checkpoint", "sdxl")
    assert (report.prediction, report.zero_terminal_snr) == (prediction, ends_in_noise)


@pytest.mark.parametrize(
    ("metadata", "prediction"),
    [
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction"),
        ({"modelspec.prediction_type": "v"}, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, "epsilon"),
    ],
)
def test_what_an_sd2_predicts_only_its_metadata_tells(
    tmp_path: Path, metadata: dict[str, str], prediction: str
) -> None:
    report = inspected(tmp_path, published.checkpoint("sd2"), metadata)
    assert (report.base, report.prediction) == ("sd2", prediction)


def test_metadata_that_lies_changes_no_base(tmp_path: Path) -> None:
    lies = {"modelspec.architecture": "stable-diffusion-xl-v1-base", "ss_base_model_version": "sdxl_base_v1-0"}
    assert inspected(tmp_path, published.checkpoint("sd15"), lies).base == "sd15"


def test_an_average_is_told_and_left_aside(tmp_path: Path) -> None:
    report = inspected(tmp_path, published.with_average(published.checkpoint("sd15")))
    assert (report.kind, report.base) == ("checkpoint", "sd15")
    assert any("EMA" in note for note in report.notes)


def test_a_checkpoint_that_lacks_parts_says_so(tmp_path: Path) -> None:
    whole = published.checkpoint("sdxl")
    for prefix, missing in (("conditioner.", "text encoder"), ("first_stage_model.", "VAE")):
        report = inspected(tmp_path, {name: shape for name, shape in whole.items() if not name.startswith(prefix)})
        assert (report.kind, report.base) == ("checkpoint", "sdxl")
        assert any(missing in note for note in report.notes)


@pytest.mark.parametrize("base", ["sd15", "sd2", "sdxl", "sdxl-refiner", "ssd"])
@pytest.mark.parametrize("spelling", ["model.diffusion_model.", "diffusion_model.", "", "diffusers"])
def test_a_unet_alone(tmp_path: Path, base: str, spelling: str) -> None:
    state = published.unet(base)
    if spelling != "diffusers":
        state = original_layout.prefixed(spelling, original_layout.unet(state, published.LAYERS_PER_BLOCK))
    report = inspected(tmp_path, state)
    assert (report.kind, report.base, report.channels) == ("unet", base, 4)
    assert report.layout == ("diffusers" if spelling == "diffusers" else "original")


def test_a_unet_built_another_way_has_no_base(tmp_path: Path) -> None:
    """As Segmind Vega and Tiny-SD are: a known width, other blocks."""
    pruned = {n: s for n, s in published.unet("sdxl").items() if ".transformer_blocks.9." not in n}
    report = inspected(tmp_path, pruned)
    assert (report.kind, report.base) == ("unet", None)
    assert "no known configuration" in report.reason


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_a_vae_does_not_tell_its_base(tmp_path: Path, base: str) -> None:
    state = published.vae(base)
    original = original_layout.vae(state, 4)
    for shapes in (state, original, original_layout.prefixed("first_stage_model.", original)):
        report = inspected(tmp_path, shapes)
        assert (report.kind, report.base, report.channels) == ("vae", None, 4)


def test_a_vae_of_another_family(tmp_path: Path) -> None:
    state = published.vae("sd15")
    into = torch.empty(512, 16, 3, 3, device="meta")
    report = inspected(tmp_path, state | {"decoder.conv_in.weight": into})
    assert (report.kind, report.channels) == ("vae", 16)
    assert report.notes


@pytest.mark.parametrize(
    ("base", "part", "expected"),
    [
        ("sd15", "text_encoder", "sd15"),
        ("sdxl", "text_encoder", "sd15"),  # the same weights
        ("sd2", "text_encoder", "sd2"),
        ("sdxl", "text_encoder_2", "sdxl"),
    ],
)
def test_a_text_encoder(tmp_path: Path, base: str, part: str, expected: str) -> None:
    state = published.text_encoder(base, part)
    flat = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    seeing = {"class_embedding": (1024,), "patch_embedding.weight": (1024, 3, 14, 14)}
    whole = state | {f"vision_model.embeddings.{name}": shape for name, shape in seeing.items()} | {"logit_scale": ()}
    for shapes in (state, flat, original_layout.open_clip(state), whole):
        report = inspected(tmp_path, shapes)
        assert (report.kind, report.base, report.parts) == ("text_encoder", expected, (part,))


@pytest.mark.parametrize("base", ["sd15", "sd2", "sdxl"])
def test_a_controlnet(tmp_path: Path, base: str) -> None:
    state = published.controlnet(base)
    original = original_layout.unet(state, published.LAYERS_PER_BLOCK)
    prefixed = original_layout.prefixed("control_model.", original)
    with_unet = prefixed | original_layout.prefixed("model.diffusion_model.", original)  # as lllyasviel published his
    for shapes in (state, original, prefixed, with_unet):
        report = inspected(tmp_path, shapes)
        assert (report.kind, report.base, report.control_types) == ("controlnet", base, None)


@pytest.mark.parametrize("types", [6, 8])
def test_a_union_controlnet(tmp_path: Path, types: int) -> None:
    report = inspected(tmp_path, published.controlnet("sdxl", types))
    assert (report.kind, report.base, report.control_types) == ("controlnet", "sdxl", types)


def test_a_small_controlnet_of_sdxl(tmp_path: Path) -> None:
    """diffusers/controlnet-canny-sdxl-1.0-small has no attention at all."""
    small = {name: shape for name, shape in published.controlnet("sdxl").items() if ".attentions." not in name}
    report = inspected(tmp_path, small)
    assert (report.kind, report.base) == ("controlnet", "sdxl")


EMBEDDINGS: dict[str, tuple[dict[str, Any], str | None, int]] = {
    "A1111, SD1.5": ({"emb_params": (8, 768)}, "sd15", 8),
    "A1111, SD2": ({"emb_params": (4, 1024)}, "sd2", 4),
    "diffusers, one vector": ({"<cat-toy>": (768,)}, "sd15", 1),
    "diffusers, several": ({"<cat-toy>": (3, 1024)}, "sd2", 3),
    "SDXL's pair": ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "sdxl", 2),
    "diffusers' pair": ({"text_encoders_0": (2, 768), "text_encoders_1": (2, 1280)}, "sdxl", 2),
    "of a tiny model": ({"emb_params": (2, 32)}, None, 2),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_a_textual_inversion(tmp_path: Path, name: str) -> None:
    shapes, base, tokens = EMBEDDINGS[name]
    report = inspect_file(sparse_files.write(tmp_path / "one.safetensors", shapes, dtype="F32"))
    assert (report.kind, report.base, report.tokens) == ("embedding", base, tokens)


def test_a_pair_of_different_lengths_is_refused(tmp_path: Path) -> None:
    report = inspected(tmp_path, {"clip_l": (2, 768), "clip_g": (3, 1280)})
    assert (report.kind, report.base) == ("unknown", None)
    assert "as many" in report.reason


def dense(prefix: str, conv: str, blocks: int, dense_block: str) -> dict[str, Any]:
    """The residual dense blocks that the ESRGAN layouts have in common."""
    return {
        f"{prefix}.{block}.{dense_block.format(part)}.conv{index}{conv}": (32, 64 + 32 * (index - 1), 3, 3)
        for block in range(blocks)
        for part in (1, 2, 3)
        for index in range(1, 6)
    }


FIRST, LAST = (64, 3, 3, 3), (3, 64, 3, 3)
UPSCALERS = {
    "old keys": {"model.0.weight": FIRST, "model.1.sub.23.weight": (64, 64, 3, 3), "model.10.weight": LAST}
    | dense("model.1.sub", ".0.weight", 23, "RDB{}"),
    "new keys": {"conv_first.weight": FIRST, "conv_body.weight": (64, 64, 3, 3), "conv_last.weight": LAST}
    | dense("body", ".weight", 23, "rdb{}"),
    "new keys, averaged": {"params_ema.conv_first.weight": (64, 12, 3, 3)}
    | dense("params_ema.body", ".weight", 6, "rdb{}"),
    "trunk keys": {"conv_first.weight": FIRST, "trunk_conv.weight": (64, 64, 3, 3), "conv_last.weight": LAST}
    | dense("RRDB_trunk", ".weight", 23, "RDB{}"),
    "compact": {f"body.{2 * i}.weight": FIRST if i == 0 else (64, 64, 3, 3) for i in range(34)}
    | {f"body.{2 * i + 1}.weight": (64,) for i in range(33)},
}


@pytest.mark.parametrize("name", UPSCALERS)
def test_an_upscaler(tmp_path: Path, name: str) -> None:
    report = inspected(tmp_path, UPSCALERS[name])
    assert (report.kind, report.base) == ("upscaler", None), report.reason


UNSERVED_KINDS = {
    "Flux": "model.diffusion_model.double_blocks.0.img_attn.qkv.weight",
    "Stable Diffusion 3": "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight",
    "IP-Adapter": "image_proj.proj.weight",
    "T2I-Adapter": "body.0.resnets.0.block1.weight",
    "AnimateDiff": "down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight",
    "T5": "encoder.block.0.layer.0.SelfAttention.q.weight",
    "CLIP model of pictures": "vision_model.embeddings.patch_embedding.weight",
    "TAESD": "decoder.layers.1.weight",
    "bitsandbytes": "model.diffusion_model.input_blocks.1.0.emb_layers.1.weight.absmax",
    "scaled float8": "scaled_fp8",
    "names": "something.else.weight",
}


@pytest.mark.parametrize("said", UNSERVED_KINDS)
def test_what_is_not_served_is_unknown_by_name(tmp_path: Path, said: str) -> None:
    flux_with_vae = original_layout.prefixed("vae.", original_layout.vae(published.vae("sd15"), 4))
    shapes: dict[str, Any] = {UNSERVED_KINDS[said]: (64, 64)} | (flux_with_vae if said == "Flux" else {})
    report = inspected(tmp_path, shapes)
    assert (report.kind, report.base) == ("unknown", None)
    assert said in report.reason


def walked(root: Path) -> dict[str, FileReport]:
    return {str(report.file.relative_to(root)): report for report in inspect_folder(root)}


def test_a_folder_is_walked(tmp_path: Path, tiny_models: Path) -> None:
    (tmp_path / "loras").mkdir()
    sparse_files.write(tmp_path / "loras" / "words.safetensors", {"emb_params": (8, 768)})
    shutil.copytree(tiny_models / "sdxl", tmp_path / "whole")
    (tmp_path / "net").mkdir()
    sparse_files.write(tmp_path / "net" / "diffusion_pytorch_model.safetensors", published.controlnet("sd15"))
    (tmp_path / "net" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02")
    (tmp_path / "old.ckpt").write_bytes(b"PK\x03\x04")
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / ".cache").mkdir()
    sparse_files.write(tmp_path / ".cache" / "x.safetensors", {"emb_params": (8, 768)})
    found = walked(tmp_path)
    assert {name: (report.kind, report.base) for name, report in found.items()} == {
        "loras/words.safetensors": ("embedding", "sd15"),
        "whole": ("checkpoint", "sdxl"),
        "net/diffusion_pytorch_model.safetensors": ("controlnet", "sd15"),
        "old.ckpt": ("unknown", None),
    }
    assert "convert it to safetensors" in found["old.ckpt"].reason


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_an_index_and_its_files_are_one_model(tmp_path: Path, variant: str) -> None:
    state = published.unet("sd15")
    names = list(state)
    files = [f"diffusion_pytorch_model{variant}-0000{part}-of-00002.safetensors" for part in (1, 2)]
    halves = (names[:300], names[300:])
    for file, half in zip(files, halves, strict=True):
        sparse_files.write(tmp_path / file, {name: state[name] for name in half})
    where = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    index = tmp_path / f"diffusion_pytorch_model.safetensors.index{variant}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    found = walked(tmp_path)
    assert {name: (report.kind, report.base) for name, report in found.items()} == {index.name: ("unet", "sd15")}
    assert "give their index" in inspect_file(tmp_path / files[0]).reason
    (tmp_path / files[1]).unlink()
    assert f"names {files[1]}, which is not there" in inspect_file(index).reason


def test_a_diffusers_folder_says_more_than_tensors(tmp_path: Path, tiny_models: Path) -> None:
    report = inspect_file(tiny_models / "sd2")
    assert (report.kind, report.prediction, report.notes) == ("checkpoint", "v_prediction", ())
    refiner = inspect_file(tiny_models / "sdxl-refiner")
    assert (refiner.kind, refiner.base) == ("checkpoint", "sdxl-refiner")
    shutil.copytree(tiny_models / "sd15", tmp_path / "broken")
    (tmp_path / "broken" / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    broken = inspect_file(tmp_path / "broken")
    assert broken.kind == "unknown"
    assert "vae cannot be used: it is empty" in broken.reason


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.weights.inspect", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_prints_json_and_a_table(tmp_path: Path) -> None:
    words = sparse_files.write(tmp_path / "wor\nds.safetensors", {"emb_params": (8, 768)})
    net = sparse_files.write(tmp_path / "net.safetensors", published.controlnet("sdxl", 6))
    done = run("--json", words, net)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)
    assert list(first)[:4] == ["file", "kind", "base", "reason"]
    assert first == json.loads(json.dumps(asdict(inspect_file(words)) | {"file": str(words)}))
    assert (second["file"], second["kind"], second["base"]) == (str(net), "controlnet", "sdxl")
    lines = run(tmp_path).stdout.splitlines()
    assert lines[0].split() == ["FILE", "KIND", "BASE", "WHY"]
    assert "union controlnet" in lines[1]
    assert "wor\\nds.safetensors" in lines[2]


def test_the_command_names_a_file_that_is_not_there(tmp_path: Path) -> None:
    done = run("--json", tmp_path / "nothing.safetensors")
    assert json.loads(done.stdout)[0]["reason"] == "no such file"
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("base", "numbers"), [("sd15", 859_520_964), ("sd2", 865_910_724), ("sdxl", 2_567_463_684), ("ssd", 1_331_334_404)]
)
def test_the_architectures_have_as_many_numbers_as_was_published(base: str, numbers: int) -> None:
    assert sum(tensor.numel() for tensor in published.unet(base).values()) == numbers
