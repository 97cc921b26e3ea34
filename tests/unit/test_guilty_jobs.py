"""One job's own fault fails that job alone: found when it is added, or by trying each job of a failed tick alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from config.catalog import Catalog
from pipelines.adapters.layers import Adapter, Mixture
from pipelines.adapters.linear_changes import LoraLayer
from pipelines.assembly import load_engine, load_text_encoders, load_vae
from pipelines.control.types import ControlHint
from pipelines.control_plan import ControlUse
from pipelines.engine.engine import StepEngine
from pipelines.engine.job import DenoiseJob
from pipelines.errors import DenoiseError, NonFiniteError, SdgraphError
from pipelines.pictures.vae import VAE
from pipelines.plan import GenerationParams, LoraUse
from pipelines.planning import make_plan
from pipelines.sampling.latents import Latents
from pipelines.text.conditioning import Conditioning
from pipelines.text.encoders import TextEncoderStack
from tests.parity import oracle

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
HEALTHY = {"a": {"seed": 1, "sampler": "Heun"}, "b": {"seed": 2, "sampler": "Euler a"}}


@pytest.fixture
def engine(catalog: Catalog) -> StepEngine:
    return load_engine(catalog, "unet-sd15", "cpu")


@pytest.fixture(scope="module")
def encoders(catalog: Catalog) -> TextEncoderStack:
    return load_text_encoders(catalog, "text-encoder-sd15", "cpu")


@pytest.fixture(scope="module")
def vae(catalog: Catalog) -> VAE:
    return load_vae(catalog, "vae-sd15", "cpu")


def fields(**changes: Any) -> dict[str, Any]:
    base = {"model_name": "SD1.5", "prompt": "a red fox", "width": 128, "height": 128, "steps": 4, "cfg_scale": 5.0}
    return base | changes


Add = Callable[..., DenoiseJob]


@pytest.fixture
def add(engine: StepEngine, encoders: TextEncoderStack, catalog: Catalog) -> Add:
    """Add a job, with whatever a test changes of it."""

    def add_job(
        name: str,
        conditioning: Callable[[Conditioning], Conditioning] = lambda it: it,
        latents: Latents | None = None,
        loras: Mixture = (),
        hint: ControlHint | None = None,
        **changes: Any,
    ) -> DenoiseJob:
        (stage,) = make_plan(GenerationParams(**fields(**changes)), catalog).stages
        text = conditioning(encoders.encode(stage))
        if hint is not None:
            use = ControlUse(name="canny", component=hint.component, mode=hint.mode, preprocess=False)
            stage = stage.model_copy(update={"controls": (use,)})
        job = engine.prepare(name, stage, text, latents, (hint,) if hint is not None else ())
        uses = tuple(LoraUse(name=lora.name, weight=weight) for lora, weight in loras)
        job.loras, job.plan = loras, stage.model_copy(update={"loras": uses})  # past the store, which would check them
        return engine.add(job)

    return add_job


def finish(engine: StepEngine) -> tuple[dict[str, Latents], dict[str, SdgraphError]]:
    done: dict[str, Latents] = {}
    failed: dict[str, SdgraphError] = {}
    while len(engine):
        report = engine.tick()
        failed |= {job.id: error for job, error in report.failed}
        for fetched in report.finished:
            try:
                done[fetched.job.id] = fetched.result()
            except NonFiniteError as error:
                failed[fetched.job.id] = error
    return done, failed


def check_healthy(done: dict[str, Latents], vae: VAE) -> None:
    """The pictures of the other jobs equal diffusers'."""
    assert set(done) == set(HEALTHY)
    for name, own in HEALTHY.items():
        picture = np.asarray(vae.decode(done[name])).astype(int)
        assert np.abs(picture - oracle.draw(**fields(**own))).max() <= 1


def broken_lora(shape: tuple[int, int], value: float = 1.0) -> Mixture:
    """An adapter of another shape than its layer's, as if no one had fitted it."""
    return ((Adapter("broken", {LAYER: (LoraLayer(torch.full(shape, value), torch.full((64, 4), value)),)}), 1.0),)


def test_a_lora_that_raises_fails_its_own_job(engine: StepEngine, add: Add, vae: VAE) -> None:
    add("a", **HEALTHY["a"])
    add("guilty", loras=broken_lora((4, 7)), sampler="Euler")
    add("b", **HEALTHY["b"])
    done, failed = finish(engine)
    assert list(failed) == ["guilty"]
    assert isinstance(failed["guilty"], DenoiseError)
    check_healthy(done, vae)


def test_a_hint_that_raises_fails_its_own_job(engine: StepEngine, add: Add, vae: VAE) -> None:
    """A map for a ControlNet that this engine does not have."""
    add("guilty", hint=ControlHint("map", "net", None, torch.rand(1, 3, 128, 128)), sampler="Euler")
    for name, own in HEALTHY.items():
        add(name, **own)
    done, failed = finish(engine)
    assert list(failed) == ["guilty"]
    assert "no ControlNet" in str(failed["guilty"])
    check_healthy(done, vae)


def test_conditioning_that_raises_fails_its_own_job(engine: StepEngine, add: Add, vae: VAE) -> None:
    """Past the checks of `add`: embeddings that are on another device than the UNet."""
    guilty = add("guilty", sampler="Euler")
    guilty.conditioning = replace(guilty.conditioning, prompt_embeds=guilty.conditioning.prompt_embeds.to("meta"))
    for name, own in HEALTHY.items():
        add(name, **own)
    done, failed = finish(engine)
    assert list(failed) == ["guilty"]
    check_healthy(done, vae)


@pytest.mark.parametrize("value", [1e30, float("inf")])
def test_a_lora_that_overflows_is_named_and_draws_nothing(engine: StepEngine, add: Add, vae: VAE, value: float) -> None:
    add("guilty", loras=broken_lora((4, 64), value), sampler="Euler", steps=2)
    for name, own in HEALTHY.items():
        add(name, **own)
    done, failed = finish(engine)
    assert isinstance(failed["guilty"], NonFiniteError)
    assert "'Euler' with 2 steps" in failed["guilty"].message
    assert "loras ['broken']" in failed["guilty"].message
    check_healthy(done, vae)


def narrower(conditioning: Conditioning) -> Conditioning:
    return replace(conditioning, prompt_embeds=conditioning.prompt_embeds[..., 1:])


def one_row(conditioning: Conditioning) -> Conditioning:
    return replace(conditioning, prompt_embeds=conditioning.prompt_embeds[:1])


def not_a_number(conditioning: Conditioning) -> Conditioning:
    return replace(conditioning, prompt_embeds=conditioning.prompt_embeds * float("nan"))


@pytest.mark.parametrize(
    ("brought", "error", "said"),
    [
        ({"latents": Latents(torch.zeros(0, 4, 16, 16))}, DenoiseError, r"latents \[0, 4, 16, 16\]"),
        ({"latents": Latents(torch.zeros(1, 4, 8, 8))}, DenoiseError, r"latents \[1, 4, 8, 8\]"),
        ({"latents": Latents(torch.full((1, 4, 16, 16), float("inf")))}, NonFiniteError, "latents to begin from"),
        ({"conditioning": narrower}, DenoiseError, "prompt_embeds"),
        ({"conditioning": one_row}, DenoiseError, "prompt_embeds"),
        ({"conditioning": not_a_number}, NonFiniteError, "prompt's embeddings"),
        ({"hint": ControlHint("map", "net", None, torch.rand(1, 3, 64, 64))}, DenoiseError, "control map"),
    ],
    ids=["no rows", "another size", "infinite", "too narrow", "unguided", "not a number", "small map"],
)
def test_what_cannot_join_a_batch_is_found_when_it_is_added(
    engine: StepEngine, add: Add, brought: dict[str, Any], error: type[SdgraphError], said: str
) -> None:
    with pytest.raises(error, match=said):
        add("guilty", sampler="Euler", **brought)
    assert len(engine) == 0


def test_pixels_that_are_not_finite_are_no_picture(vae: VAE) -> None:
    with pytest.raises(NonFiniteError, match="the VAE"):
        vae.decode(Latents(torch.full((1, 4, 16, 16), float("nan"))))
