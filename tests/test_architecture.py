"""The house: import rules that bite, light processes that stay light, files that stay short."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from config.catalog import ROOT
from config.settings import Settings
from deployments.app import AppArgs
from deployments.local import ENVIRONMENT, LOCAL_CONFIG, README_REQUEST
from tests.graphs import deployment_names
from training.words import COLOURS, DRAWN

SOURCES = [p for room in ("config", "pipelines", "deployments") for p in sorted((ROOT / room).rglob("*.py"))]


def run(code: str) -> str:
    """Output of a fresh interpreter in the repository root."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("config.catalog", ["torch", "ray", "diffusers", "fastapi"]),
        ("pipelines.text2image", ["ray", "fastapi", "tvm"]),
        ("pipelines.backends.tvm.artifacts", ["torch", "tvm"]),
        ("pipelines.planning", ["torch", "diffusers"]),
        ("deployments.app", ["torch", "diffusers", "transformers"]),
    ],
)
def test_importing_a_module_brings_nothing_it_should_not(module: str, absent: list[str]) -> None:
    """The head builds the graph, and the ingress serves, without torch: 160 MB of memory instead of 540."""
    assert run(f"import sys, {module}; print([m for m in {absent} if m in sys.modules])") == "[]"


def test_the_import_rules_are_checked_and_kept() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "6 kept, 0 broken" in done.stdout


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350


def test_only_app_wraps_deployments() -> None:
    """`@serve.deployment` on a class in its module pickles it by value; plain classes are pickled by reference."""
    guilty = [
        p.name for p in SOURCES if p.name != "app.py" and re.search(r"serve\.(deployment|ingress)\b", p.read_text())
    ]
    assert guilty == []


@pytest.mark.parametrize(
    "name", ["config/serve.local.yaml", "config/serve.tvm.yaml", "serve_config.yaml", "tests/serve/graph.yaml"]
)
def test_serve_configs_build(name: str) -> None:
    """Arguments parse, and every deployment a config tunes exists in the graph it builds."""
    config = yaml.safe_load((ROOT / name).read_text())
    ServeDeploySchema.model_validate(config)
    for application in config["applications"]:
        assert application["import_path"] == "deployments.app:build_app"
        args = AppArgs.model_validate(application["args"])
        names = deployment_names(args)
        deployments = application.get("deployments", [])
        tuned = {deployment["name"] for deployment in deployments}
        for deployment in deployments:  # Serve's schema takes any mapping here
            assert set(deployment["autoscaling_config"]) <= set(AutoscalingConfig.model_fields)
            AutoscalingConfig(**deployment["autoscaling_config"])
        assert tuned <= names, f"{tuned - names} are no deployments of {name}"


def test_the_demo_sends_the_readmes_request() -> None:
    body = re.search(r"-d '(\{.*?\})'", (ROOT / "README.md").read_text(), re.DOTALL)
    assert body is not None
    assert json.loads(body[1]) == README_REQUEST


def test_committed_weights_stay_small() -> None:
    weights = [p for p in (ROOT / "models").rglob("*.safetensors") if "tiny" not in p.parts]
    sizes = [p.stat().st_size for p in weights]
    assert max(sizes) <= 16e6
    assert sum(sizes) <= 100e6


def test_the_model_card_lists_the_vocabulary() -> None:
    card = (ROOT / "models" / "README.md").read_text().replace("\n", " ")
    for heading, names in (("Objects", DRAWN), ("Colours", COLOURS)):
        listed = re.search(rf"\*\*{heading}\*\*[^:]*: ([^.]*)\.", card)
        assert listed is not None
        assert listed[1].split(", ") == list(names)


def test_every_setting_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert [name for name in Settings.model_fields if f"SDGRAPH_{name.upper()}" not in text] == []


def test_the_laptop_graphs_listen_on_loopback_only_and_differ_in_tvm_alone() -> None:
    local, compiled = (yaml.safe_load(p.read_text()) for p in (LOCAL_CONFIG, LOCAL_CONFIG.with_name("serve.tvm.yaml")))
    assert local["http_options"]["host"] == "127.0.0.1"
    assert local["applications"][0]["args"]["auth"] == "none"
    assert compiled["applications"][0]["args"].pop("tvm") is True
    assert compiled == local


def test_make_and_the_launcher_start_ray_the_same_way() -> None:
    makefile = (ROOT / "Makefile").read_text()
    exported = dict(re.findall(r"^export (\w+) := (.*)$", makefile, re.MULTILINE))
    assert {k: v for k, v in exported.items() if k.startswith("RAY_")} == {
        k: v for k, v in ENVIRONMENT.items() if k.startswith("RAY_")
    }
