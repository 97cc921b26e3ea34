"""Blocks under torch.compile: the same output, with adapters that come and go, in slots and by hooks.

With dynamo's own backend `eager`: what it traces and guards is what matters here; kernels are inductor's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from config.catalog import ROOT
from pipelines.acceleration import Acceleration
from pipelines.adapters.layers import Adapter
from pipelines.adapters.reading import AdapterFile
from pipelines.backends import torch_backend
from pipelines.backends.base import StepBatch
from pipelines.backends.blocks import compile_blocks
from pipelines.backends.torch_backend import TorchDenoiser
from pipelines.engine.batching import BatchKey
from pipelines.engine.curve import trial_batch
from tests.support.fake_capturer import FakeCapturer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch_backend, "compile_blocks", lambda unet: compile_blocks(unet, backend="eager"))
    yield
    torch.compiler.reset()


def denoiser(**options: Any) -> TorchDenoiser:
    return TorchDenoiser(UNet2DConditionModel.from_pretrained(ROOT / "models/tiny/sdxl", subfolder="unet"), **options)


def batch_of(unet: TorchDenoiser, rows: int, loras: Mapping[int, Any] | None = None, side: int = 16) -> StepBatch:
    ids = 6 * unet.config["addition_time_embed_dim"]
    pooled = unet.config["projection_class_embeddings_input_dim"] - ids
    key = BatchKey((unet.config["in_channels"], side, side), (77, unet.config["cross_attention_dim"]))
    return replace(trial_batch(unet, key, pooled, rows), loras=[(loras or {}).get(row, ()) for row in range(rows)])


def lora(unet: TorchDenoiser, rank: int, seed: int, ends: tuple[str, ...] = ("to_q", "to_out.0")) -> Adapter:
    """Random layers on modules whose names end so; ranks above 128 find no slots and go by hooks."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: {
            "down": torch.randn(rank, *module.weight.shape[1:], generator=generator) / module.weight[0].numel(),
            "up": torch.randn(len(module.weight), rank, *[1] * (module.weight.ndim - 2), generator=generator),
            "alpha": torch.tensor(float(rank)),
        }
        for name, module in unet.adapters._modules.items()
        if name.endswith(ends) and isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    return unet.adapters.fit(AdapterFile(f"rank {rank}", layers, {}), CPU, torch.float32)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).norm() <= 1e-5 * theirs.norm())


@pytest.mark.parametrize("captured", [False, True], ids=["as it comes", "recorded"])
def test_adapters_come_and_go_under_compiled_blocks(captured: bool) -> None:
    plain = denoiser()
    compiled = denoiser(acceleration=Acceleration(compiled_blocks=True), capturer=FakeCapturer() if captured else None)
    assert compiled.compiled_blocks > 4
    slotted, hooked = ([lora(unet, rank, 7) for unet in (plain, compiled)] for rank in (8, 160))
    assert slotted[0].slot_ranks
    assert not hooked[0].slot_ranks
    outputs = []
    for round_ in range(3):
        for own in (None, slotted, hooked, None):
            if captured and round_ == 0 and own is None:
                compiled.record(batch_of(compiled, 2))
            mixtures = [{} if own is None else {1: ((adapter, 0.5),)} for adapter in own or (None, None)]
            theirs = plain.predict(batch_of(plain, 2, mixtures[0]))
            ours = compiled.predict(batch_of(compiled, 2, mixtures[1]))
            assert same(ours, theirs)
            outputs.append(theirs[1])
    assert not same(outputs[1], outputs[0]), "the LoRA in slots shows"
    assert not same(outputs[2], outputs[0]), "the LoRA by hooks shows"
    assert same(outputs[3], outputs[0])
    assert bool(compiled.captured) == captured


@pytest.mark.slow
def test_more_shapes_are_compiled_than_dynamo_would_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counting(module: Any, _: Any) -> Any:
        made.append(module)
        return module.forward

    monkeypatch.setattr(torch_backend, "compile_blocks", lambda unet: compile_blocks(unet, backend=counting))
    compiled = denoiser(acceleration=Acceleration(compiled_blocks=True))
    grown = []
    for side in range(4, 26, 2):
        before = len(made)
        compiled.predict(batch_of(compiled, 1, side=side))
        grown.append(len(made) > before)
    assert all(grown), f"which of the shapes compiled anything: {grown}"


def test_channels_last_computes_the_same() -> None:
    """With LoRAs on convolutions too, whose products write into the layer's output in place."""
    plain, last = denoiser(), denoiser(acceleration=Acceleration(channels_last=True))
    assert same(last.predict(batch_of(last, 2)), plain.predict(batch_of(plain, 2)))
    ends = ("to_q", "conv1", "conv_shortcut", "downsamplers.0.conv")
    theirs, ours = (unet.predict(batch_of(unet, 2, {1: ((lora(unet, 8, 7, ends), 0.5),)})) for unet in (plain, last))
    assert same(ours, theirs)
    assert not same(theirs[1], plain.predict(batch_of(plain, 2))[1])
