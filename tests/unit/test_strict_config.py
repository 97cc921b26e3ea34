"""Serve configs that are refused before anything is started."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from config.catalog import ROOT
from deployments import ray_compat
from deployments.app import AppArgs, deployment_names
from deployments.launcher import LOCAL_CONFIG, StartError, confinement, main, running_graph
from deployments.strict_config import check, problems
from tests.support import bound

LOCAL = yaml.safe_load(LOCAL_CONFIG.read_text())


def changed(**fields: Any) -> dict[str, Any]:
    """The laptop's config with other fields of its application."""
    config: dict[str, Any] = copy.deepcopy(LOCAL)
    config["applications"][0] |= fields
    return config


@pytest.mark.parametrize(
    "args",
    [
        {"catalog": "tiny"},
        {"catalog": "tiny", "grouping": "role", "tvm": True},
        {"catalog": "embedded", "tvm": True, "tvm_models": ["SD1.5"]},
        {"catalog": "hub", "controlnet_placement": "colocated", "models": ["SD1.5", "SDXL-ControlNet"]},
    ],
)
def test_the_names_it_knows_are_those_that_are_bound(args: dict[str, Any]) -> None:
    assert deployment_names(AppArgs.model_validate(args)) == bound.deployment_names(AppArgs.model_validate(args))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"deployments": [{"name": "unet-torhc"}]}, "deployment 'unet-torhc' is none of this graph's: controlnet,"),
        ({"deployments": [{"name": "vae", "ray_actor_options": {"num_gpus": 1.5}}]}, "vae: num_gpus 1.5 must be whole"),
        ({"args": {"catalog": "embedded", "groping": "role"}}, "groping"),
        ({"args": {"catalog": "nowhere"}}, "nowhere"),
        ({"args": {"models": ["SD9"]}}, "SD9"),
    ],
)
def test_a_wrong_application_is_refused_by_name(fields: dict[str, Any], said: str) -> None:
    assert any(said in complaint for complaint in problems(changed(**fields))), list(problems(changed(**fields)))


@pytest.mark.parametrize("text", ["", "[]", "applications: none", "a: b: c", "applications: ["])
def test_what_is_no_config_is_said_so(tmp_path: Path, text: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"serve\.yaml: "):
        check(file)


def test_every_shipped_config_is_accepted() -> None:
    for file in [ROOT / "serve_config.yaml", *(ROOT / "config").glob("serve.*.yaml"), *(ROOT / "k8s").rglob("serve_*")]:
        check(file)


def test_make_serve_and_the_launcher_refuse_a_wrong_config(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(changed(deployments=[{"name": "vaee"}])))
    with pytest.raises(SystemExit, match="'vaee' is none"):
        main(["serve", str(file)])
    with pytest.raises(StartError, match="'vaee' is none"), running_graph(file):
        pytest.fail("it started")


def test_ray_asks_for_a_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ray_compat, "TOKEN_FILE", tmp_path / "auth_token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    made = confinement()
    assert made["RAY_AUTH_MODE"] == "token"
    assert len(made["RAY_AUTH_TOKEN"]) == 64
    assert made != confinement(), "one for each start"
    ray_compat.TOKEN_FILE.write_text("the user's")
    assert "RAY_AUTH_TOKEN" not in confinement(), "Ray reads it by itself"
    ray_compat.TOKEN_FILE.unlink()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    assert "RAY_AUTH_TOKEN" not in confinement(), "it is handed on with the environment"
    assert confinement()["RAY_AUTH_MODE"] == "token"
