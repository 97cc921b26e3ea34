"""Weights, long prompts and clip skip draw what diffusers draws from embeddings made by the same rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from config.catalog import Catalog
from pipelines.errors import InvalidValueError
from pipelines.plan import GenerationParams
from pipelines.planning import make_plan
from pipelines.text2image import Text2Image
from tests.parity import oracle
from tests.support import prompts

MODELS = {"SD1.5": 128, "SD2": 128, "SDXL1.0-base": 256}
WEIGHTED = r"(red:1.4) fox, [snow], ((tree)) \(oak\) (a [b:1.2) c], open( bracket"
LONG = "a fox, " * 11 + "unbroken words that no comma parts from each other at all, a boat, " * 3
BROKEN = "a fox BREAK a boat on the (sea:1.3) BREAK snow"


def fields(model: str, **changes: Any) -> dict[str, Any]:
    base = {"seed": 1234, "steps": 4, "cfg_scale": 5.0, "sampler": "DPM++ 2M SDE Karras"}
    return {"model_name": model, "width": MODELS[model], "height": MODELS[model]} | base | changes


def expected(model: str, prompt: str, negative: str | None, **how: Any) -> np.ndarray:
    """diffusers' picture of the embeddings that tests/support makes."""
    folder, pipeline_class, _ = oracle.PIPELINES[model]
    embeds = prompts.embeds(oracle.pipeline(folder, pipeline_class), prompt, negative, **how)
    return oracle.draw(**fields(model), **embeds)


def distance(ours: Any, theirs: np.ndarray) -> int:
    pixels = np.asarray(ours).astype(int)
    assert pixels.std() > 10, "a flat picture proves nothing"
    return int(np.abs(pixels - theirs).max())


def params(model: str, prompt: str, negative: str | None = None, **changes: Any) -> GenerationParams:
    return GenerationParams(**fields(model), prompt=prompt, negative_prompt=negative, **changes)


@pytest.mark.parametrize("emphasis", ["Original", "No norm", "Ignore"])
@pytest.mark.parametrize("model", sorted(MODELS))
def test_weights(text2image: Text2Image, model: str, emphasis: str) -> None:
    ours = text2image.generate(
        params(model, WEIGHTED, "(fog:0.5), [text]", prompt_syntax="weighted", emphasis=emphasis)
    ).image
    theirs = expected(model, WEIGHTED, "(fog:0.5), [text]", emphasis=emphasis)
    assert distance(ours, theirs) <= 1
    plain = text2image.generate(params(model, WEIGHTED, "(fog:0.5), [text]")).image
    assert distance(plain, theirs) > 1, "the brackets changed nothing"


@pytest.mark.parametrize("negative", [None, "", "blurry, low quality"])
@pytest.mark.parametrize("model", sorted(MODELS))
def test_a_long_prompt_is_read_to_its_end(text2image: Text2Image, model: str, negative: str | None) -> None:
    picture = text2image.generate(params(model, LONG, negative)).image
    assert distance(picture, expected(model, LONG, negative, weighted=False)) <= 1
    cut = text2image.generate(params(model, LONG, negative, long_prompt="cut")).image
    assert distance(cut, np.asarray(picture)) > 1


@pytest.mark.parametrize("model", sorted(MODELS))
def test_a_negative_prompt_may_be_the_longer_one(text2image: Text2Image, model: str) -> None:
    picture = text2image.generate(params(model, "a fox", LONG)).image
    assert distance(picture, expected(model, "a fox", LONG, weighted=False)) <= 1


@pytest.mark.parametrize("model", sorted(MODELS))
def test_break_begins_a_chunk(text2image: Text2Image, model: str) -> None:
    picture = text2image.generate(params(model, BROKEN, prompt_syntax="weighted")).image
    assert distance(picture, expected(model, BROKEN, None)) <= 1
    plain = text2image.generate(params(model, BROKEN)).image
    assert distance(plain, oracle.draw(**fields(model), prompt=BROKEN)) <= 1


def test_the_second_text_of_sdxl_has_weights_and_chunks_of_its_own(text2image: Text2Image) -> None:
    how = {"prompt_2": LONG + "(oil:1.5) painting", "emphasis": "No norm"}
    request = params("SDXL1.0-base", "a (fox:0.4)", prompt_syntax="weighted", **how)
    assert distance(text2image.generate(request).image, expected("SDXL1.0-base", "a (fox:0.4)", None, **how)) <= 1


@pytest.mark.parametrize(("model", "ours", "theirs"), [("SD1.5", 2, 1), ("SD2", 3, 2), ("SDXL1.0-base", 3, 1)])
def test_clip_skip_is_one_more_than_diffusers_and_with_sdxl_two(
    text2image: Text2Image, model: str, ours: int, theirs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, pipeline_class, _ = oracle.PIPELINES[model]
    encoder = oracle.pipeline(folder, pipeline_class).text_encoder
    if not hasattr(encoder, "text_model"):  # diffusers 0.42 looks for the level that transformers 5 took away
        monkeypatch.setitem(vars(encoder), "text_model", encoder)
    unguided = fields(model, cfg_scale=1.0)
    picture = text2image.generate(GenerationParams(**unguided, prompt="a fox", clip_skip=ours)).image
    assert distance(picture, oracle.draw(**unguided, prompt="a fox", clip_skip=theirs)) <= 1
    default = text2image.generate(GenerationParams(**unguided, prompt="a fox")).image
    assert distance(default, np.asarray(picture)) > 1


@pytest.mark.parametrize(("model", "ours", "theirs"), [("SD1.5", 3, 2), ("SDXL1.0-base", 3, 1)])
def test_clip_skip_counts_for_the_negative_prompt_too(
    text2image: Text2Image, model: str, ours: int, theirs: int
) -> None:
    """As in A1111; diffusers' pipelines skip for the prompt alone."""
    picture = text2image.generate(params(model, "a fox", "fog", clip_skip=ours)).image
    assert distance(picture, expected(model, "a fox", "fog", clip_skip=theirs)) <= 1


@pytest.mark.parametrize(("model", "clip_skip"), [("SD1.5", 1), ("SDXL1.0-base", 1), ("SDXL1.0-base", 2)])
def test_the_least_clip_skip_is_what_a_model_reads_anyway(text2image: Text2Image, model: str, clip_skip: int) -> None:
    picture = text2image.generate(params(model, "a fox", clip_skip=clip_skip)).image
    assert np.array_equal(np.asarray(picture), np.asarray(text2image.generate(params(model, "a fox")).image))


def test_clip_skip_beyond_the_first_layer_names_the_layers(text2image: Text2Image) -> None:
    with pytest.raises(InvalidValueError, match="have 3 layers, so 1 to 3") as caught:
        text2image.generate(params("SDXL1.0-base", "a fox", clip_skip=4))
    assert caught.value.param == "clip_skip"


def test_more_chunks_than_the_model_allows_are_refused(text2image: Text2Image) -> None:
    for texts, param in [(("a, " * 700, None), "prompt"), (("a", "a, " * 700), "negative_prompt")]:
        with pytest.raises(InvalidValueError, match="16 chunks") as caught:
            text2image.generate(params("SD1.5", *texts))
        assert caught.value.param == param
    text2image.generate(params("SD1.5", "a, " * 700, long_prompt="cut", prompt_syntax="weighted"))


@pytest.mark.parametrize("model", ["SD1.5", "SDXL1.0-base"])
def test_eight_different_prompts_in_a_batch(text2image: Text2Image, model: str) -> None:
    """Short and long, weighted and plain, each as if it were alone."""
    weighted = {"prompt_syntax": "weighted"}
    jobs: list[tuple[str, str | None, dict[str, Any]]] = [
        ("a fox", None, {}),
        (WEIGHTED, "fog", weighted),
        (WEIGHTED, None, weighted | {"emphasis": "No norm"}),
        (LONG, None, {}),
        (LONG + WEIGHTED, "(fog:1.2)", weighted),
        (BROKEN, "snow", weighted),
        ("a boat", LONG, {}),
        ("a (tree:-0.5)", "", weighted | {"emphasis": "No norm"}),
    ]
    together = text2image.generate_many([params(model, prompt, negative, **how) for prompt, negative, how in jobs])
    for picture, (prompt, negative, how) in zip(together, jobs, strict=True):
        options = {"weighted": "prompt_syntax" in how, "emphasis": how.get("emphasis", "Original")}
        assert distance(picture.image, expected(model, prompt, negative, **options)) <= 1


def test_short_prompts_ride_in_a_long_ones_ticks(text2image: Text2Image, catalog: Catalog) -> None:
    """A context that is read twice says what it says once, so nothing is masked and no tick is the short one's own."""
    requests = [params("SD1.5", prompt, None) for prompt in (LONG, "a fox", "a boat")]
    plans = [make_plan(request, catalog) for request in requests]
    engine = text2image.torch_engine(plans[0].stages[0].component)
    for number, plan in enumerate(plans):
        text = text2image.text_encoders(plan.text_encoder).encode(plan.stages[0])
        engine.add(engine.prepare(str(number), plan.stages[0], text, None))
    assert engine.tick().rows == 6
    engine.clear()
    for picture, request in zip(text2image.generate_many(requests), requests, strict=True):
        assert distance(picture.image, expected("SD1.5", request.prompt, None, weighted=False)) <= 1
