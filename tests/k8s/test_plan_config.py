"""A Serve config for any catalog and cards: the shipped ones are its output, the others pass the strict checker too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from config.catalog import ROOT, Catalog
from config.choices import UnknownChoiceError
from deployments.app import AppArgs
from deployments.plan_config.cards import CLUSTER, PlanError, parse_cards
from deployments.plan_config.serve_config import serve_config
from deployments.strict_config import problems
from tests.support.bound import deployment_names
from tests.support.library import UNET, put
from tests.support.upscalers import FILE

ONE_CARD = ("SDXL1.0-base", "SDXL-ControlNet", "SD1.5")


def deployments(text: str) -> dict[str, dict[str, Any]]:
    """Name -> deployment of a config that the strict checker and the graph accept."""
    config = yaml.safe_load(text)
    assert list(problems(config)) == []
    (application,) = config["applications"]
    planned = {d["name"]: d for d in application["deployments"]}
    args = AppArgs.model_validate(application["args"])
    assert planned.keys() | {"ingress"} == deployment_names(args)
    return planned


def test_the_shipped_config_is_what_is_planned_for_the_hubs_catalog() -> None:
    shipped = (ROOT / "serve_config.yaml").read_text()
    assert serve_config("hub", CLUSTER) == shipped, "python -m deployments.plan_config > serve_config.yaml; make k8s"


def test_the_one_card_config_is_what_is_planned_for_one_card() -> None:
    shipped = (ROOT / "config" / "serve.gpu.yaml").read_text()
    assert serve_config("hub", "1x24", ONE_CARD) == shipped, "its first line says the command"
    shares = {name: d["ray_actor_options"]["num_gpus"] for name, d in deployments(shipped).items()}
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize("catalog", ["hub", "embedded"])
@pytest.mark.parametrize(("gpus", "large", "small"), [("2x80,1x24", 2, 1), ("4x24", 4, 4), ("1x16,3x80", 3, 1)])
def test_every_deployment_lies_on_cards_that_hold_it(catalog: str, gpus: str, large: int, small: int) -> None:
    planned = deployments(serve_config(catalog, gpus))
    room = {"large": large, "small": small}
    awake: dict[str, float] = {"large": 0, "small": 0}
    for name, entry in planned.items():
        role = entry["ray_actor_options"]["label_selector"]["sdgraph/role"]
        if name == "ingress":
            assert role == "cpu"
            continue
        share = entry["ray_actor_options"]["num_gpus"]
        assert 0 < share <= 1
        denoises = name.startswith(("unet-", "refiner-", "controlnet-"))
        assert role == ("large" if denoises or gpus == "4x24" else "small")
        assert ("policy" in entry["autoscaling_config"]) == name.startswith(("unet-", "refiner-"))
        awake[role] += share * entry["autoscaling_config"]["min_replicas"]
    assert all(awake[role] <= room[role] for role in room), "what never sleeps has a place"
    sleepless = {n for n, d in planned.items() if d["autoscaling_config"]["min_replicas"] > 0}
    assert sleepless == {"ingress", "text-encoder-sdxl", "unet-sdxl-base-torch", "vae-sdxl"}


def test_a_larger_card_gives_smaller_shares() -> None:
    shares = [deployments(serve_config("hub", gpus))["unet-ssd-torch"] for gpus in ("9x24", "9x80")]
    small, large = (entry["ray_actor_options"]["num_gpus"] for entry in shares)
    assert small > large == 0.25


def test_chosen_models_are_planned_alone() -> None:
    planned = deployments(serve_config("hub", "2x24", ("sd1.5",)))
    assert set(planned) == {"ingress", "text-encoder-sd15", "unet-sd15-torch", "vae-sd15"}


@pytest.mark.parametrize(
    ("gpus", "models", "said"),
    [
        ("2x", (), "--gpus '2x': write the number of cards and their GB"),
        ("0x24", (), "--gpus '0x24'"),
        ("2x24,", (), "--gpus ''"),
        ("1x24,1x48,1x80", (), "one kind of card or two"),
        ("1x24,2x24", (), "each once"),
        ("4x4", (), "unet-sd15-torch needs .* GB, and its cards have 4; give it larger ones"),
        ("1x12,1x8", (), "is too small: .* cards for what always runs"),
        ("1x8", ("SDXL1.0-base",), r"does not hold 18\.\d GB \(.*\); use a larger card$"),
        (
            "1x24",
            ("SDXL1.0-base", "SSD", "SDXL-turbo", "SDXL-ControlNet"),
            r"a card of 24 GB does not hold .* GB \(text-encoder 2.*fewer models",
        ),
    ],
)
def test_cards_that_do_not_hold_the_graph_are_named(gpus: str, models: tuple[str, ...], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        serve_config("hub", gpus, models)


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(UnknownChoiceError, match="Did you mean 'SDXL-turbo'"):
        serve_config("hub", "1x24", ("SDXL-turbe",))


def test_one_kind_of_card_is_both_large_and_small() -> None:
    assert len(set(parse_cards("3x48"))) == 1
    assert [cards.gigabytes for cards in parse_cards("1x24, 2x80")] == [80, 24]


def test_the_hubs_components_say_their_architecture() -> None:
    assert all(component.architecture for component in Catalog.load("hub").components)


def test_a_librarys_models_are_planned_beside_the_catalogs(tiny_models: Path, tmp_path: Path) -> None:
    put(tiny_models / "sd15" / UNET, tmp_path / "My SD.safetensors")
    put(tiny_models / "upscaler-x4" / FILE, tmp_path / "My x4.safetensors")
    text = serve_config("tiny", "2x24", (), (tmp_path,))
    assert f"--library {tmp_path} " in text.splitlines()[0]
    planned = deployments(text)
    assert planned["unet-my-sd-torch"]["autoscaling_config"]["min_replicas"] == 0
    assert "vae-my-sd" not in planned
    upscaler = planned["upscaler-my-x4"]
    assert (upscaler["autoscaling_config"]["min_replicas"], upscaler["max_ongoing_requests"]) == (0, 8)
    assert 0 < upscaler["ray_actor_options"]["num_gpus"] < 0.25
    one = deployments(serve_config("tiny", "1x24", (), (tmp_path,)))
    assert sum(entry["ray_actor_options"]["num_gpus"] for entry in one.values()) == pytest.approx(1)
    assert "upscaler" in one
