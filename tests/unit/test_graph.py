"""The typed edges of the graph: a wrong call is a type error, and each edge fits the replica method it calls."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from config.catalog import ROOT
from deployments.graph import Call, ControlNetEdge, Graph
from deployments.replicas.controlnet import ControlNetDeployment
from deployments.replicas.denoiser import DenoiserDeployment
from deployments.replicas.text_encoder import TextEncoderDeployment
from deployments.replicas.upscaler import UpscalerDeployment
from deployments.replicas.vae import VAEDeployment

# --- what mypy sees ---

COMPOSE = Path("deployments", "ingress", "compose.py")
# Name -> what is replaced in compose.py, by what, and what mypy says of that line.
MUTANTS = {
    "a_wrong_keyword": (
        "graph.encode(plan=plan, image=photo, mask=mask)",
        "graph.encode(plan=plan, picture=photo, mask=mask)",
        'Unexpected keyword argument "picture" for "encode" of "Graph"',
    ),
    "a_missing_keyword": (
        "graph.preview(plan=plan, latents=item.latents, file_format=shown)",
        "graph.preview(latents=item.latents, file_format=shown)",
        'Missing named argument "plan" for "preview" of "Graph"',
    ),
    "a_wrong_type": (
        "graph.encode_text(component=plan.text_encoder, stage=stage)",
        "graph.encode_text(component=plan.text_encoder, stage=plan)",
        'incompatible type "GenerationPlan"; expected "StagePlan"',
    ),
    "the_result_of_another_edge": (
        "stage=stage, conditioning=conditioning, latents",
        "stage=stage, conditioning=latents, latents",
        '"conditioning" to "denoise" of "Graph" has incompatible type "Call[Timed[Latents]]',
    ),
    "a_result_that_was_awaited": (
        "stage=stage, conditioning=conditioning, latents",
        "stage=stage, conditioning=await conditioning, latents",
        '"conditioning" to "denoise" of "Graph" has incompatible type "Timed[Conditioning]"',
    ),
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, str]]]:
    """File name -> line and text of each error, of one run over compose.py and a mutated copy for each mutant."""
    copy = tmp_path_factory.mktemp("mutants")
    for name in ("config", "pipelines", "deployments"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "pyproject.toml", copy)
    if (ROOT / ".mypy_cache").exists():
        shutil.copytree(ROOT / ".mypy_cache", copy / ".mypy_cache")
    source = (copy / COMPOSE).read_text()
    files = [COMPOSE]
    for name, (right, wrong, _) in MUTANTS.items():
        assert source.count(right) == 1, f"compose.py no longer says: {right}"
        files.append(COMPOSE.with_name(f"{name}.py"))
        (copy / files[-1]).write_text(source.replace(right, wrong))
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--no-pretty", *map(str, files)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert not done.stderr, done.stderr
    found: dict[str, list[tuple[int, str]]] = {path.stem: [] for path in files}
    for path, line, text in re.findall(r"^(\S+?):(\d+): error: (.*)$", done.stdout, re.MULTILINE):
        found.setdefault(Path(path).stem, []).append((int(line), text))
    return found


def test_mypy_finds_nothing_in_the_composition_as_it_is(errors: dict[str, list[tuple[int, str]]]) -> None:
    assert errors.keys() == {"compose", *MUTANTS}, "an error in another file"
    assert errors["compose"] == []


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mypy_finds_a_wrong_call_on_the_graph(errors: dict[str, list[tuple[int, str]]], mutant: str) -> None:
    right, _, message = MUTANTS[mutant]
    source = (ROOT / COMPOSE).read_text()
    ((line, text),) = errors[mutant]
    assert line == source[: source.index(right)].count("\n") + 1
    assert message in text


# --- what the source says ---


def test_only_the_graph_says_remote() -> None:
    saying = set()
    for path in (ROOT / "deployments").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "remote":
                saying.add(path.relative_to(ROOT).as_posix())
    assert saying == {"deployments/graph.py"}


def test_everything_is_bound_by_keyword() -> None:
    tree = ast.parse((ROOT / "deployments" / "app.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    binds = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "bind"]
    assert len(binds) >= 5
    assert [ast.unparse(call) for call in binds if call.args] == []


# --- what the replicas take ---

# Edge -> the deployments that answer it. ControlNets may live in a denoiser's replica.
EDGES: dict[str, tuple[type, ...]] = {
    "encode_text": (TextEncoderDeployment,),
    "encode": (VAEDeployment,),
    "enlarge": (VAEDeployment,),
    "pixels": (VAEDeployment,),
    "upscale": (UpscalerDeployment,),
    "encode_pixels": (VAEDeployment,),
    "upscale_file": (UpscalerDeployment,),
    "prepare": (ControlNetDeployment, DenoiserDeployment),
    "annotate": (ControlNetDeployment, DenoiserDeployment),
    "denoise": (DenoiserDeployment,),
    "denoise_watched": (DenoiserDeployment,),
    "decode": (VAEDeployment,),
    "preview": (VAEDeployment,),
    "compile_report": (DenoiserDeployment,),
    "device": (DenoiserDeployment,),
    "residuals": (ControlNetDeployment,),
    "ping": (TextEncoderDeployment, ControlNetDeployment, DenoiserDeployment, VAEDeployment, UpscalerDeployment),
}
PLAN = SimpleNamespace(vae="c", text_encoder="c", stages=(), component="c", backend="torch")
"""As much of a plan, and of its stages, as finds the deployment."""


class Handle:
    """A handle that looks at a call instead of sending it."""

    deployment_name = "of the test"

    def __init__(self, replica: type) -> None:
        self._replica = replica
        self.method: Any = None
        """The replica's method that was called."""
        self.given: dict[str, Any] = {}

    def options(self, *, stream: bool) -> Handle:
        return self

    def __getattr__(self, name: str) -> Any:
        self.method = getattr(self._replica, name)
        return self

    def remote(self, *args: Any, **given: Any) -> Handle:
        assert not args
        inspect.signature(self.method).bind(None, **given)  # raises TypeError
        self.given = given
        return self

    def cancel(self) -> None:
        pass

    async def __aiter__(self) -> Any:
        yield None


def carried(annotation: str) -> str:
    """What travels of an edge's type: the result of a call instead of the call."""

    class Unwrap(ast.NodeTransformer):
        def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
            self.generic_visit(node)
            return node.slice if ast.unparse(node.value) == "Call" else node

    return ast.unparse(Unwrap().visit(ast.parse(annotation, mode="eval")))


async def call(edge: str, handle: Handle) -> Any:
    """Call an edge, with something for each of its parameters; returns its signature."""
    if edge == "ping":
        (ping,) = Graph({"c": handle}).ping(PLAN).values()  # type: ignore[arg-type]
        ping()
        return inspect.signature(ping)
    graph: Any = ControlNetEdge(handle) if edge == "residuals" else Graph({"c": handle}, {"c": handle})
    signature = inspect.signature(getattr(graph, edge))
    arguments: dict[str, Any] = {name: Call(None) for name in signature.parameters}  # type: ignore[arg-type]
    arguments |= {"plan": PLAN, "stage": PLAN, "component": "c", "hints": {}}
    called = getattr(graph, edge)(**{name: arguments[name] for name in signature.parameters})
    if inspect.isasyncgen(called):
        await anext(called)
        await called.aclose()
    return signature


@pytest.mark.parametrize(("edge", "replica"), [(edge, replica) for edge, of in EDGES.items() for replica in of])
def test_an_edge_fits_the_method_it_calls(edge: str, replica: type) -> None:
    """The names of its arguments, their types and the type of the result, whose annotations are compared as text."""
    handle = Handle(replica)
    ours = asyncio.run(call(edge, handle))
    theirs = inspect.signature(handle.method)
    for name in handle.given:
        assert theirs.parameters[name].annotation == carried(ours.parameters[name].annotation), name
    assert theirs.return_annotation == carried(ours.return_annotation)


def test_every_edge_is_looked_at() -> None:
    tree = ast.parse((ROOT / "deployments" / "graph.py").read_text())
    functions = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)]
    remote = {
        f.name for f in functions for node in ast.walk(f) if isinstance(node, ast.Attribute) and node.attr == "remote"
    }
    assert {name if name != "__call__" else "ping" for name in remote} == EDGES.keys()
