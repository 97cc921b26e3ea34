"""The architecture: import rules hold, processes without torch stay without it, files stay short."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from config.catalog import ROOT
from deployments import ray_compat
from deployments.app import AppArgs
from deployments.launcher import LOCAL_CONFIG, README_REQUEST
from tests.support.bound import deployment_names
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
        ("pipelines.engine.engine", ["cv2", "transformers", "scipy"]),
        ("pipelines.engine.memory", ["cv2", "transformers", "scipy"]),
        ("pipelines.backends.torch_backend", ["cv2", "transformers", "scipy"]),
        # Not backends.tvm.compile: it builds a UNet, and diffusers' UNet class itself imports transformers and scipy.
        ("pipelines.backends.tvm.loading", ["cv2", "transformers", "scipy"]),
        ("pipelines.weights.download", ["torch", "diffusers", "transformers"]),
        ("pipelines.weights.inspect", ["torch", "numpy", "safetensors", "pydantic"]),
        ("deployments.app", ["torch", "diffusers", "transformers"]),
        ("deployments.replicas.engine_loop", ["ray", "torch", "fastapi"]),
    ],
)
def test_importing_a_module_brings_nothing_it_should_not(module: str, absent: list[str]) -> None:
    """The head builds the graph, and the ingress serves, without torch: 160 MB of memory instead of 540."""
    assert run(f"import sys, {module}; print([m for m in {absent} if m in sys.modules])") == "[]"


def test_the_import_rules_are_checked_and_kept() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350


UNDOCUMENTED = re.compile(
    r"diffusers\.(loaders|utils)|torch\.(utils\._|_|multiprocessing)|transformers\.models"
    r"|_cdata|res_hidden_states_tuple|controlnet_cond_embedding|set_begin_index"
)


def test_what_upstream_does_not_document_is_used_in_one_place_each() -> None:
    guilty = {str(p.relative_to(ROOT)) for p in SOURCES if UNDOCUMENTED.search(p.read_text())}
    halves = "pipelines/backends/halves.py"  # is nothing but that; tests/unit/test_halves.py compares every bit
    assert guilty == {"pipelines/diffusers_compat.py", "pipelines/torch_compat.py", halves}


def test_the_tested_versions_lie_within_bounds_that_end() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line)
    tested = {canonicalize_name(name): version.strip() for name, version in tested.items()}
    for requirement in map(Requirement, project["dependencies"]):
        assert requirement.specifier.contains(tested[canonicalize_name(requirement.name)]), requirement
        assert any(part.operator == "<" for part in requirement.specifier), f"{requirement} has no upper bound"


def test_only_app_wraps_deployments() -> None:
    """`@serve.deployment` on a class in its module pickles it by value; plain classes are pickled by reference."""
    assert not any("@serve.deployment" in p.read_text() for p in SOURCES if p.name != "app.py")
    wrapping = [str(p.relative_to(ROOT)) for p in SOURCES if re.search(r"serve\.deployment\(", p.read_text())]
    assert wrapping == ["deployments/app.py"]


@pytest.mark.parametrize(
    "name",
    [
        "config/serve.local.yaml",
        "config/serve.tvm.yaml",
        "config/serve.gpu.yaml",
        "serve_config.yaml",
        "tests/serve/graph.yaml",
    ],
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
            scaling = deployment.get("autoscaling_config", {})
            assert set(scaling) <= set(AutoscalingConfig.model_fields)
            AutoscalingConfig(**scaling)
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


def test_the_laptop_graphs_listen_on_loopback_only_and_differ_in_tvm_alone() -> None:
    local, compiled = (yaml.safe_load(p.read_text()) for p in (LOCAL_CONFIG, LOCAL_CONFIG.with_name("serve.tvm.yaml")))
    assert local["http_options"]["host"] == "127.0.0.1"
    assert local["applications"][0]["args"]["auth"] == "none"
    assert compiled["applications"][0]["args"].pop("tvm") is True
    assert compiled["applications"][0]["args"].pop("compile") == "on_demand"
    assert compiled == local


def test_the_one_card_graph_shares_out_a_whole_card_and_listens_on_loopback_without_keys() -> None:
    config = yaml.safe_load(LOCAL_CONFIG.with_name("serve.gpu.yaml").read_text())
    (application,) = config["applications"]
    args = AppArgs.model_validate(application["args"])
    assert (args.auth, args.catalog, args.controlnet_placement) == ("none", "hub", "colocated")
    assert config["http_options"]["host"] == "127.0.0.1"
    shares = {d["name"]: d["ray_actor_options"]["num_gpus"] for d in application["deployments"]}
    assert set(shares) == deployment_names(args) - {"ingress"}, "each replica that computes has a share"
    assert sum(shares.values()) == pytest.approx(1)
    # A config's actor options replace app.py's, and Serve's default of a CPU a replica does not fit every laptop.
    assert all(d["ray_actor_options"]["num_cpus"] == 0 for d in application["deployments"])


def test_make_and_the_launcher_start_ray_the_same_way() -> None:
    makefile = (ROOT / "Makefile").read_text()
    exported = dict(re.findall(r"^export (\w+) := (.*)$", makefile, re.MULTILINE))
    assert {name: value for name, value in exported.items() if name in ray_compat.ENVIRONMENT} == ray_compat.ENVIRONMENT
