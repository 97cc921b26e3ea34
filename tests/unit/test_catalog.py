"""The catalog: both built-in ones load, and one that contradicts itself does not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from config.catalog import HERE, Catalog, CatalogError
from config.choices import Choices, UnknownChoiceError
from config.sources import CheckpointSource, HubSource

REVISIONS = {
    "stabilityai/stable-diffusion-xl-base-1.0": "462165984030d82259a11f4367a4eed129e94a7b",
    "stabilityai/stable-diffusion-xl-refiner-1.0": "5d4cfe854c9a9a87939ff3653551c2b3c99a4356",
    "stabilityai/sdxl-turbo": "71153311d3dbb46851df1931d3ca6e939de83304",
    "segmind/SSD-1B": "60987f37e94cd59c36b1cba832b9f97b57395a10",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
    "stabilityai/stable-diffusion-2": "1e128c8891e52218b74cde8f26dbfc701cb99d79",
    "madebyollin/sdxl-vae-fp16-fix": "207b116dae70ace3637169f1ddd2434b91b3a8cd",
}
MODELS = ["SDXL1.0-base", "SD2", "SD1.5", "SSD", "SDXL-turbo", "SDXL-ControlNet", "SD1.5-ControlNet"]


@pytest.mark.parametrize("name", ["hub", "tiny", "embedded"])
def test_every_catalog_names_the_seven_models(name: str) -> None:
    assert [m.name for m in Catalog.load(name).models] == MODELS


def test_the_hub_catalog_pins_the_contracts_revisions() -> None:
    sources = [c.source for c in Catalog.load("hub").components]
    pinned = {s.repo: s.revision for s in sources if isinstance(s, HubSource)}
    assert {repo: pinned.get(repo) for repo in REVISIONS} == REVISIONS


def test_the_hub_catalog_shares_components_by_weights() -> None:
    catalog = Catalog.load("hub")
    family = [catalog.model(n) for n in ("SDXL1.0-base", "SSD", "SDXL-turbo", "SDXL-ControlNet")]
    assert {(m.text_encoder, m.vae, m.refiner) for m in family} == {("text-encoder-sdxl", "vae-sdxl", "refiner-sdxl")}
    assert catalog.model("SD1.5-ControlNet").unet == catalog.model("SD1.5").unet
    assert len(catalog.served_components()) == 18


def test_the_hub_catalog_offers_the_contracts_controlnets_and_loras() -> None:
    catalog = Catalog.load("hub")
    names = ["canny", "depth", "openpose", "softedge"]
    for model, own in (("SDXL-ControlNet", "SDXL1.0-base"), ("SD1.5-ControlNet", "SD1.5")):
        assert list(catalog.controls_of(model)) == names + ["lineart"] * (own == "SD1.5")
        assert catalog.controls_of(own) == catalog.controls_of(model), "the same UNet"
    assert catalog.controls_of("SSD") == {}
    assert len(catalog.loras) == 13


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the tiny catalog, to be spoilt."""
    return Path(shutil.copytree(HERE / "catalogs" / "tiny", tmp_path / "catalog"))


def spoil(folder: Path, file: str, index: int, **changes: Any) -> None:
    path = folder / f"{file}.yaml"
    entries = yaml.safe_load(path.read_text())
    entries[index] |= changes
    path.write_text(yaml.safe_dump(entries))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("models", {"unet": "unet-sd99"}, "unet 'unet-sd99' is not an sdxl unet component"),
        ("models", {"vae": "unet-sdxl-base"}, "vae 'unet-sdxl-base' is not an sdxl vae component"),
        ("models", {"family": "sd"}, "is not an sd text_encoder component"),
        ("models", {"name": "sd2"}, "would mean two names"),
        ("models", {"sizes": ["1000x1000"]}, "1000x1000 is not a multiple of 32"),
        ("controlnets", {"component": "unet-ssd"}, "is not a ControlNet, or mode and union disagree"),
        ("controlnets", {"mode": None}, "is not a ControlNet, or mode and union disagree"),
        ("controlnets", {"models": ["SDXL-ControlNet", "SD1.5-ControlNet"]}, "does not steer"),
        ("models", {"szies": ["512x512"]}, "Extra inputs are not permitted"),
        ("components", {"source": {"repo": "a/b", "revision": "main"}}, "should match pattern"),
        ("components", {"source": {"folder": "x", "repo": "a/b"}}, "Extra inputs are not permitted"),
        ("components", {"id": "vae-sd15"}, "share an id"),
    ],
)
def test_a_catalog_that_contradicts_itself_is_refused_with_the_reason(
    folder: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    spoil(folder, file, 0, **changes)
    with pytest.raises(CatalogError, match=message):
        Catalog.load(folder)


def test_a_model_that_requires_a_controlnet_has_one(folder: Path) -> None:
    spoil(folder, "models", 3, requires_controlnet=True)
    with pytest.raises(CatalogError, match="requires_controlnet, and no ControlNet is listed for it"):
        Catalog.load(folder)


def test_a_refiner_needs_the_sdxl_family(folder: Path) -> None:
    spoil(folder, "models", 2, refiner="unet-sd2")
    with pytest.raises(CatalogError, match="refiner belongs to the SDXL family"):
        Catalog.load(folder)


def test_models_of_one_unet_decode_with_one_vae(folder: Path) -> None:
    spoil(folder, "models", 6, vae="vae-sd2", size_multiple=16)
    with pytest.raises(CatalogError, match="different VAEs"):
        Catalog.load(folder)


def test_pickled_checkpoints_are_refused() -> None:
    with pytest.raises(ValueError, match=r"only \.safetensors"):
        CheckpointSource.model_validate({"checkpoint": "model.ckpt", "configuration": {"folder": "x"}})


def test_an_unknown_catalog_names_the_known_ones() -> None:
    with pytest.raises(CatalogError, match=r"\['embedded', 'hub', 'tiny'\]"):
        Catalog.load("nowhere")


def test_serving_a_part() -> None:
    part = Catalog.load("tiny").only(("sd1.5",))
    assert [m.name for m in part.available_models()] == ["SD1.5"]
    assert [c.id for c in part.served_components()] == ["text-encoder-sd15", "unet-sd15", "vae-sd15"]


def test_controlnets_are_left_out_with_the_model_that_requires_them() -> None:
    catalog = Catalog.load("tiny")
    assert catalog.only(("SD1.5",)).controls_of("SD1.5") == {}
    both = catalog.only(("SD1.5", "SD1.5-ControlNet"))
    assert "canny" in both.controls_of("SD1.5")
    nets = ("controlnet-sd15-canny", "controlnet-sd15-soft")
    assert both.controlnets_of("unet-sd15") == catalog.only(("SD1.5-ControlNet",)).controlnets_of("unet-sd15") == nets


def test_choices_resolve_without_case_and_suggest() -> None:
    choices = Choices("sampler", ["Euler", "Euler a"], {"K_EULER": "Euler"})
    assert choices.resolve(" k_euler ") == "Euler"
    with pytest.raises(UnknownChoiceError) as caught:
        choices.resolve("Eular")
    message = "Unexpected sampler 'Eular'. Did you mean 'Euler'? Only ['Euler', 'Euler a'] allowed now"
    assert str(caught.value) == message


def test_choices_refuse_ambiguity() -> None:
    with pytest.raises(ValueError, match="would mean two names"):
        Choices("x", ["a", "A"])
    with pytest.raises(ValueError, match="which is not a name"):
        Choices("x", ["a"], {"b": "c"})


@pytest.mark.parametrize(
    ("look_up", "message"),
    [
        (lambda c: c.model("SD9"), "model 'SD9' is not in the catalog, which has .*SD1.5"),
        (lambda c: c.style("gothic"), "style 'gothic' is not in the catalog"),
        (lambda c: c.component("unet-sd9"), "component 'unet-sd9' is not in the catalog"),
        (lambda c: c.lora_weights("Nothing", "unet-sd15"), "lora 'Nothing' is not in the catalog"),
        (lambda c: c.lora_weights("Add_Detail", "unet-sd2"), "base of lora 'Add_Detail' 'unet-sd2' is not in"),
        (lambda c: c.vae_of("unet-sd9"), "UNet of a model 'unet-sd9' is not in the catalog"),
        (lambda c: c.text_encoder_of("vae-sd15"), "UNet of a model 'vae-sd15' is not in the catalog"),
    ],
)
def test_an_unknown_name_is_a_key_error_that_lists_the_known_ones(
    look_up: Callable[[Catalog], object], message: str
) -> None:
    with pytest.raises(KeyError, match=message):
        look_up(Catalog.load("tiny"))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"repo": "a/b"}, "components.0.source.repo.revision: Field required"),
        ({"folder": "x", "variant": "fp16"}, "components.0.source.folder.variant: Extra inputs are not permitted"),
        (
            {"checkpoint": "x.ckpt", "configuration": {"folder": "y"}},
            "components.0.source.checkpoint: checkpoint x.ckpt: only .safetensors is loaded, a pickle can run code",
        ),
        (
            {"checkpoint": "x.safetensors", "configuration": {"folder": 3}},
            "components.0.source.checkpoint.configuration.folder.folder: Input is not a valid path",
        ),
        ({}, "components.0.source: say where the weights lie: repo and revision, folder, or checkpoint"),
        ("x", "components.0.source: say where the weights lie"),
    ],
)
def test_a_wrong_source_is_told_in_one_line(folder: Path, source: object, said: str) -> None:
    """Of the kind that it is, not of all there are."""
    spoil(folder, "components", 0, source=source)
    with pytest.raises(CatalogError) as refused:
        Catalog.load(folder)
    assert str(refused.value).startswith(f"catalog '{folder}': {said}")
    assert "\n" not in str(refused.value)
    assert ";" not in str(refused.value)
