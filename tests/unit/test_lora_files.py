"""LoRA files as trainers write them: every spelling and shape is read as other tools read it, or refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from config.catalog import Catalog
from pipelines.adapters.reading import read_adapter
from pipelines.adapters.rows import RowAdapters
from pipelines.assembly import load_lora
from pipelines.errors import InvalidValueError, WeightsError
from pipelines.plan import LoraUse

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
STRIDED = "down_blocks.0.downsamplers.0.conv"
POINTWISE = "down_blocks.1.attentions.0.proj_in"
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 32, 64, 288]), max_size=5).filter(lambda s: math.prod(s) <= 20_000)
TARGETS = (ATTENTION, CONV, STRIDED, POINTWISE, "time_embedding.linear_1", "conv_in")
SD_PARTS = ("unet", "text_encoder")
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def unet(tiny_models: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(tiny_models / "sd15", subfolder="unet").eval()


@pytest.fixture(scope="module")
def hooks(unet: UNet2DConditionModel) -> RowAdapters:
    return RowAdapters(unet)


def factors(module: nn.Module, rank: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Down and up of a module's own shape."""
    out, *inner = module.weight.shape
    generator = torch.Generator().manual_seed(rank)
    down = torch.randn(rank, *inner, generator=generator)
    return down, torch.randn(out, rank, *[1] * (len(inner) - 1), generator=generator)


def kohya(name: str, down: torch.Tensor, up: torch.Tensor) -> Tensors:
    flat = f"lora_unet_{name.replace('.', '_')}"
    return {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(1.0)}


def peft(name: str, down: torch.Tensor, up: torch.Tensor, before: str = "unet.", adapter: str = "") -> Tensors:
    layer = f"{before}{name}"
    factors = {f"{layer}.lora_A{adapter}.weight": down, f"{layer}.lora_B{adapter}.weight": up}
    return factors | {f"{layer}.alpha": torch.tensor(1.0)}


LAYOUTS: dict[str, Callable[[str, torch.Tensor, torch.Tensor], Tensors]] = {
    "kohya": kohya,
    "PEFT with alphas": peft,
    "PEFT, default": lambda *layer: peft(*layer, adapter=".default"),
    "PEFT, default_0": lambda *layer: peft(*layer, adapter=".default_0"),
    "PEFT, a whole model": lambda *layer: peft(*layer, before="base_model.model."),
    "PEFT, a whole pipeline": lambda *layer: peft(*layer, before="base_model.model.unet."),
    "PEFT, a whole part": lambda *layer: peft(*layer, before="unet.base_model.model."),
}


def saved(folder: Path, state: Tensors, metadata: dict[str, str] | None = None) -> Path:
    path = folder / "file.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path, metadata)
    return path


def added(hooks: RowAdapters, unet: Any, path: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What a file's LoRA adds to the output of one module, and the input it was asked about."""
    lora = hooks.fit(read_adapter(path, "x", "unet", SD_PARTS), torch.device("cpu"), torch.float32)
    assert set(lora.layers) == {name}
    module = unet.get_submodule(name)
    size = [] if isinstance(module, nn.Linear) else [8, 8]
    rows = torch.randn(1, module.weight.shape[1], *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        plain = module(rows)
        with hooks.active([((lora, 1.0),)]):
            return module(rows) - plain, rows


def expected(module: nn.Module, rows: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """The same by a change of the weight, as tools that merge make it."""
    with torch.inference_mode():
        if isinstance(module, nn.Conv2d):
            return nn.functional.conv2d(rows, delta, stride=module.stride, padding=module.padding)
        return nn.functional.linear(rows, delta)


def forms(module: nn.Module, form: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factors in another form, and the change of the weight that A1111, ComfyUI or LyCORIS make of them.

    ComfyUI flattens both factors and gives their product the weight's shape; A1111 gives it the shape of the factors
    and adds it to the weight by broadcasting.
    """
    down, up = factors(module)
    shape = module.weight.shape
    match form:
        case "1x1 convolution" if isinstance(module, nn.Linear):
            down, up = down[:, :, None, None], up[:, :, None, None]
        case "matrix" if isinstance(module, nn.Conv2d):
            down, up = down.flatten(1), up.flatten(1)
        case "1x1 down" if isinstance(module, nn.Conv2d):
            down = down[:, :, :1, :1]
        case "narrow matrix" if isinstance(module, nn.Conv2d):
            down, up = down[:, :, 0, 0], up.flatten(1)
    product = up.flatten(1) @ down.flatten(1)
    inner = shape[1:] if product.shape[1] == shape[1:].numel() else (shape[1], 1, 1)
    return down, up, product.reshape(shape[0], *inner).expand(shape) / len(down)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(TARGETS),
    layout=st.sampled_from(sorted(LAYOUTS)),
    form=st.sampled_from(["own", "1x1 convolution", "matrix", "1x1 down", "narrow matrix"]),
)
def test_every_layout_and_form_adds_what_other_tools_merge(
    unet: Any, hooks: RowAdapters, tmp_path: Path, name: str, layout: str, form: str
) -> None:
    module = unet.get_submodule(name)
    down, up, delta = forms(module, form)
    difference, rows = added(hooks, unet, saved(tmp_path, LAYOUTS[layout](name, down, up)), name)
    torch.testing.assert_close(difference, expected(module, rows, delta), rtol=1e-3, atol=1e-4)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(TARGETS),
    layout=st.sampled_from(sorted(LAYOUTS)),
    down=SHAPES,
    up=SHAPES,
)
def test_factors_of_any_shape_work_or_are_refused_when_they_are_loaded(
    unet: Any, hooks: RowAdapters, tmp_path: Path, name: str, layout: str, down: list[int], up: list[int]
) -> None:
    """What is accepted here never breaks a tick."""
    path = saved(tmp_path, LAYOUTS[layout](name, torch.ones(down), torch.ones(up)))
    refusal: InvalidValueError | None = None
    try:
        difference, _ = added(hooks, unet, path, name)
    except InvalidValueError as error:
        refusal = error
    if refusal is None:
        assert difference.isfinite().all()
    else:
        assert refusal.param == "loras"
        assert path.name in refusal.message
        assert str(down) in refusal.message or str(up) in refusal.message


KINDS = {
    "LoRA with mid": ("lora_down.weight", "lora_mid.weight", "lora_up.weight", "alpha"),
    "DoRA": ("lora_down.weight", "lora_up.weight", "dora_scale"),
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"),
    "LoHa, Tucker": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "LoKr": ("lokr_w1", "lokr_w2"),
    "LoKr, one factored": ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"),
    "LoKr, Tucker": ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "LoKr, both factored": ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "dora_scale"),
    "OFT": ("oft_blocks", "rescale", "alpha"),
    "IA3": ("weight", "on_input"),
    "GLoRA": ("a1.weight", "a2.weight", "b1.weight", "b2.weight"),
    "GLoRA with mid": ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"),
    "difference": ("diff", "diff_b"),
    "norm": ("w_norm", "b_norm"),
}
SIDES = st.sampled_from([1, 2, 4, 8, 32, 64])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from([*TARGETS, "conv_norm_out"]),
    kind=st.sampled_from(sorted(KINDS)),
    shapes=st.lists(st.lists(SIDES, max_size=4).filter(lambda s: math.prod(s) <= 20_000), min_size=6, max_size=6),
)
def test_parameters_of_any_shape_work_or_are_refused_when_they_are_loaded(
    unet: Any, hooks: RowAdapters, tmp_path: Path, name: str, kind: str, shapes: list[list[int]]
) -> None:
    """Of every kind; what is accepted here never breaks a tick."""
    state = {
        f"lora_unet_{name.replace('.', '_')}.{key}": torch.full(shape, 0.1)
        for key, shape in zip(KINDS[kind], shapes, strict=False)
    }
    path = saved(tmp_path, state)
    refusal: InvalidValueError | None = None
    try:
        difference, _ = added(hooks, unet, path, name)
    except InvalidValueError as error:
        refusal = error
    if refusal is None:
        assert difference.isfinite().all()
    else:
        assert refusal.param == "loras"
        assert path.name in refusal.message


def test_a_tucker_factor_is_folded_into_the_down_factor(unet: Any, hooks: RowAdapters, tmp_path: Path) -> None:
    """LyCORIS: the weight changes by alpha / rank * einsum("orhw,ri,or'" over up, mid and down)."""
    module = unet.get_submodule(CONV)
    out, inner = module.weight.shape[:2]
    down, mid, up = torch.randn(4, inner, 1, 1), torch.randn(3, 4, 3, 3), torch.randn(out, 3, 1, 1)
    state = kohya(CONV, down, up)
    state[f"lora_unet_{CONV.replace('.', '_')}.lora_mid.weight"] = mid
    difference, rows = added(hooks, unet, saved(tmp_path, state), CONV)
    delta = torch.einsum("os,srhw,ri->oihw", up[:, :, 0, 0], mid, down[:, :, 0, 0]) / 4
    torch.testing.assert_close(difference, expected(module, rows, delta), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("said", ["not json", "[]", "3", json.dumps({"unet.r": 2, "unet.lora_alpha": None})])
def test_metadata_that_cannot_be_read_is_as_good_as_none(
    unet: Any, hooks: RowAdapters, tmp_path: Path, said: str
) -> None:
    state = peft(ATTENTION, *factors(unet.get_submodule(ATTENTION)))
    del state[f"unet.{ATTENTION}.alpha"]
    plain, _ = added(hooks, unet, saved(tmp_path, state), ATTENTION)
    spoilt, _ = added(hooks, unet, saved(tmp_path, state, {"lora_adapter_metadata": said}), ATTENTION)
    assert torch.equal(plain, spoilt)


def test_a_bundled_embedding_is_left_out(unet: Any, hooks: RowAdapters, tmp_path: Path) -> None:
    state = kohya(ATTENTION, *factors(unet.get_submodule(ATTENTION)))
    state["bundle_emb.token.string_to_param.*"] = torch.zeros(1, 32)
    assert added(hooks, unet, saved(tmp_path, state), ATTENTION)[0].any()


def flat(end: str) -> str:
    return f"lora_unet_{ATTENTION.replace('.', '_')}{end}"


SOUND = {flat(".lora_down.weight"): torch.ones(2, 64), flat(".lora_up.weight"): torch.ones(64, 2)}
REFUSED: dict[str, tuple[Tensors, str]] = {
    "Control-LoRA": (SOUND | {"lora_controlnet": torch.zeros(8)}, "Control-LoRA adapter"),
    "VeRA": (SOUND | {"unet.conv_in.vera_lambda_b": torch.zeros(8)}, "VeRA adapter"),
    "another word": (SOUND | {flat(".lora_sideways.weight"): torch.zeros(8)}, "not a LoRA weight"),
    "a key of no layer": (SOUND | {"lora_unet_conv_in": torch.zeros(8)}, "not a weight of a LoRA"),
    "a weight of no layer": (SOUND | {"lora_unet_conv_in.weight": torch.zeros(8)}, "not a LoRA weight"),
    "half of a LoHa": ({flat(".hada_w1_a"): torch.ones(64, 2)}, "half of a layer"),
    "half of a LoKr": ({flat(".lokr_w1"): torch.ones(8, 8)}, "half of a layer"),
    "half of a GLoRA": ({flat(".a1.weight"): torch.ones(64, 2)}, "half of a layer"),
    "magnitudes alone": ({flat(".dora_scale"): torch.ones(64, 1)}, "half of a layer"),
    "a difference of another shape": ({flat(".diff"): torch.ones(64, 63)}, "a difference \\[64, 64\\]"),
    "the norm of a linear layer": ({flat(".w_norm"): torch.ones(64)}, "no difference of a normalisation"),
    "a pair for a norm": (
        {f"lora_unet_conv_norm_out.lora_{end}.weight": torch.ones(2, 2) for end in ("down", "up")},
        "meets GroupNorm",
    ),
    "one weight twice": (
        SOUND | {f"lora_unet_{ATTENTION.replace('.', '_')}.lora_A.weight": torch.ones(2, 64)},
        "two keys for the same weight",
    ),
    "one module twice": (SOUND | peft(ATTENTION, torch.ones(2, 64), torch.ones(64, 2)), "two layers for the module"),
    "alphas alone": ({flat(".alpha"): torch.tensor(4.0)}, "not a LoRA weight"),
    "no up": ({flat(".lora_down.weight"): torch.ones(2, 64)}, "half of a layer"),
    "no down": ({flat(".lora_up.weight"): torch.ones(64, 2)}, "half of a layer"),
    "no lora_B": ({f"unet.{ATTENTION}.lora_A.weight": torch.ones(2, 64)}, "half of a layer"),
    "not a number": (SOUND | {flat(".alpha"): torch.tensor(float("nan"))}, "not finite"),
    "mid of another rank": (SOUND | {flat(".lora_mid.weight"): torch.ones(2, 3, 3, 3)}, "middle factor"),
    "Flux": (
        {f"transformer.blocks.0.to_q.lora_{end}.weight": torch.ones(2, 2) for end in "AB"}
        | {f"unet.{ATTENTION}.lora_{end}.weight": torch.ones(2, 2) for end in "AB"},
        "no part of Stable Diffusion",
    ),
    "another family": (
        {f"text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_{end}.weight": torch.ones(2, 2) for end in "AB"},
        "nothing for this model",
    ),
    "no such block": (
        {f"lora_unet_blocks_x.lora_{end}.weight": torch.ones(2, 2) for end in ("down", "up")},
        "no module",
    ),
    "empty": ({}, "no layers at all"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_cannot_be_read_is_refused_by_file_and_key(hooks: RowAdapters, tmp_path: Path, case: str) -> None:
    state, reason = REFUSED[case]
    path = saved(tmp_path, state)
    with pytest.raises(InvalidValueError, match=reason) as refused:
        hooks.fit(read_adapter(path, "x", "unet", SD_PARTS), torch.device("cpu"), torch.float32)
    assert refused.value.param == "loras"
    assert "'x'" in refused.value.message
    assert path.name in refused.value.message


def with_lora(catalog: Catalog, folder: Path) -> Catalog:
    """The catalog with one LoRA, `x`, for SD1.5."""
    data = catalog.model_dump()
    weights = {"bases": ["unet-sd15"], "source": {"folder": folder}, "file": "file.safetensors"}
    data["loras"] = [{"name": "x", "weights": [weights]}]
    return Catalog.model_validate(data)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"", "empty"),
        (b"\x10\0\0\0\0\0\0\0{", "truncated or damaged"),
        (b"<!DOCTYPE html><html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    ],
)
def test_a_missing_or_damaged_file_is_named(catalog: Catalog, tmp_path: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / "file.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=said) as failed:
        load_lora(with_lora(catalog, tmp_path), LoraUse(name="x", weight=1), "unet-sd15", "unet")
    assert str(failed.value).startswith("lora x, file file.safetensors: ")


def test_a_file_of_very_many_tensors_is_refused_before_they_are_read(catalog: Catalog, tmp_path: Path) -> None:
    entries = {f"lora_unet_{i}.alpha": {"dtype": "F32", "shape": [], "data_offsets": [0, 0]} for i in range(70_000)}
    header = json.dumps(entries).encode()
    (tmp_path / "file.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(WeightsError, match="more than 65,536 tensors"):
        load_lora(with_lora(catalog, tmp_path), LoraUse(name="x", weight=1.0), "unet-sd15", "unet")
