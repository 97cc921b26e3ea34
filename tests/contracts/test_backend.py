"""Which backend runs a request: what is asked for, what is compiled, what was measured, and what still works."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from config.catalog import Catalog, Size
from deployments.app import AppArgs, bind_compiled, bind_components
from deployments.graph import Graph
from deployments.replicas.base import Runtime
from pipelines.backends.tvm.artifacts import ArtifactCache, best_level
from pipelines.backends.tvm.compile import compile_unet
from pipelines.backends.tvm.shapes import artifact_key
from pipelines.compiling import CompileReport, WantedProgram
from pipelines.plan import CompiledSize, StagePlan
from pipelines.weights.files import read_config
from tests.support.bound import name_of, options_of, run_locally
from tests.support.graph import FakeGraph, never
from tests.support.http import check, encoded, events, photo, picture, pixels, post
from tests.support.ingress import ClientFactory

UNET = "unet-sd15"
CONTROL = {"model_name": "SD1.5-ControlNet", "controlnet_name": "canny", "controlnet_image": encoded(photo())}


@pytest.fixture(scope="module")
def sized(catalog: Catalog) -> Catalog:
    """SD1.5's size table with a compiled size and one that is not."""
    table = (Size(width=128, height=128), Size(width=256, height=256))
    models = tuple(m.model_copy(update={"tvm_sizes": table if m.unet == UNET else ()}) for m in catalog.models)
    return catalog.model_copy(update={"models": models})


@pytest.fixture(scope="module")
def compiled(sized: Catalog, handles: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """The graph with a compiled UNet at 128x128, alone, for LoRAs, and with a ControlNet."""
    folder = tmp_path_factory.mktemp("tvm")
    config = read_config(sized.component(UNET))
    for control, loras in ((False, False), (False, True), (True, False)):
        key = artifact_key(sized, UNET, 128, 128, 2, control, best_level(), loras)
        ArtifactCache(folder).make(key, lambda program, key=key: compile_unet(config, key, program))
    args, runtime = AppArgs(tvm=True), Runtime("cpu", torch_threads=1)
    bound = bind_compiled(args, sized, runtime, bind_components(args, sized, runtime), folder)
    assert {component: name_of(app) for component, app in bound.items()} == {UNET: "unet-sd15-tvm"}
    assert options_of(bound[UNET])["runtime_env"]["env_vars"]["TVM_BIND_THREADS"] == "0"
    return Graph(handles, run_locally(bound, "compiled"))


def claiming(compiled: Graph, speedup: float, **edges: Any) -> FakeGraph:
    """A graph that says how fast its compiled UNet was: a measurement on a busy machine is no test's business."""

    async def report(component: str, wanted: tuple[WantedProgram, ...]) -> CompileReport:
        told = await compiled.compile_report(component=component, wanted=wanted)
        return replace(told, sizes=tuple(replace(size, speedup=speedup) for size in told.sizes))

    return FakeGraph(compiled, compile_report=report, **edges)


def broken(handles: dict[str, Any]) -> FakeGraph:
    """A graph whose compiled UNet says it can draw, and then cannot; torch can."""
    graph = Graph(handles, {UNET: handles[UNET]})

    async def report(component: str, wanted: tuple[WantedProgram, ...]) -> CompileReport:
        return CompileReport((CompiledSize(component, 128, 128, False, 3.0),), ())

    async def denoise(stage: StagePlan, **arguments: Any) -> Any:
        if stage.backend == "tvm":
            raise RuntimeError("no such kernel")
        return await graph.denoise(stage=stage, **arguments)

    async def denoise_watched(stage: StagePlan, **arguments: Any) -> AsyncGenerator[Any, None]:
        if stage.backend == "tvm":
            raise RuntimeError("no such kernel")
        async with aclosing(graph.denoise_watched(stage=stage, **arguments)) as items:
            async for item in items:
                yield item

    return FakeGraph(graph, compile_report=report, denoise=denoise, denoise_watched=denoise_watched)


Connect = Callable[..., Any]


@pytest.fixture
def with_compiled(connect: ClientFactory, sized: Catalog) -> Connect:
    return lambda graph: connect(catalog=sized, graph=graph)


async def backend(client: httpx.AsyncClient, **fields: Any) -> str:
    reply = await post(client, **fields)
    assert reply.status_code == 200, reply.text
    return reply.headers["x-backend"]


async def test_auto_takes_tvm_where_it_can(with_compiled: Connect, compiled: Graph) -> None:
    async with with_compiled(claiming(compiled, 2.0)) as client:
        assert await backend(client) == "tvm"
        assert await backend(client, backend="TVM") == "tvm"
        assert await backend(client, **CONTROL) == "tvm"
        assert await backend(client, backend="torch") == "torch"
        assert await backend(client, width=256, height=256) == "torch"
        assert await backend(client, width=136) == "torch"
        assert await backend(client, loras={"Pixel_Art": 0.5}) == "tvm"
        assert await backend(client, **CONTROL, loras={"Pixel_Art": 0.5}) == "torch"
        assert await backend(client, loras={"Pixel_Art": 0.0}) == "tvm"


async def test_a_prompt_longer_than_what_is_compiled_runs_on_torch(
    with_compiled: Connect, compiled: Graph, caplog: pytest.LogCaptureFixture
) -> None:
    """How long a text is, only the text encoder finds out; tvm is not blamed for it."""
    long = "a cat on a mat, " * 12
    async with with_compiled(claiming(compiled, 2.0)) as client:
        plain = pixels(picture(await post(client, prompt=long, backend="torch", output_format="png")))
        reply = await post(client, prompt=long, output_format="png")
        assert reply.headers["x-backend"] == "torch"
        assert np.abs(pixels(picture(reply)) - plain).max() <= 1
        assert await backend(client) == "tvm"
        assert await backend(client, prompt=long, long_prompt="cut") == "tvm"
        message = check(await post(client, prompt=long, backend="tvm"), 400, 40302, "backend")
    assert "['auto', 'torch']" in message
    assert "failed" not in caplog.text


async def test_both_backends_draw_the_same_picture(with_compiled: Connect, compiled: Graph) -> None:
    async with with_compiled(claiming(compiled, 2.0)) as client:
        drawn = [pixels(picture(await post(client, backend=b, output_format="png"))) for b in ("tvm", "torch")]
    assert np.abs(drawn[0] - drawn[1]).max() <= 2


async def test_auto_uses_torch_where_tvm_was_not_faster(
    with_compiled: Connect, compiled: Graph, caplog: pytest.LogCaptureFixture
) -> None:
    async with with_compiled(claiming(compiled, 1.05)) as client:
        with caplog.at_level("INFO", "pipelines"):
            assert await backend(client) == "torch"
        assert "unet-sd15 at 128x128 runs on torch: tvm was only 1.05 times as fast" in caplog.text
        assert await backend(client, backend="tvm") == "tvm", "asked for by name"


async def test_auto_means_torch_where_torch_has_a_gpu(with_compiled: Connect, compiled: Graph) -> None:
    async def cuda(component: str) -> str:
        return "cuda"

    async with with_compiled(claiming(compiled, 5.0, device=cuda)) as client:
        assert await backend(client) == "torch"
        assert await backend(client, backend="tvm") == "tvm"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 136}, "Only ['128x128', '256x256'] allowed"),
        ({"width": 256, "height": 256}, "Only ['128x128'] are compiled"),
        (CONTROL | {"loras": {"Pixel_Art": 0.5}}, "compiled for this size without LoRAs"),
        ({"model_name": "SD2"}, "Only [] allowed"),
    ],
)
async def test_an_explicit_tvm_for_an_uncompiled_size_is_refused(
    with_compiled: Connect, compiled: Graph, fields: dict[str, Any], message: str
) -> None:
    async with with_compiled(claiming(compiled, 2.0)) as client:
        reply = await post(client, backend="tvm", **fields)
        check(reply, 400, 40302, "backend")
        assert message in reply.json()["message"]


async def test_models_tell_what_is_compiled(with_compiled: Connect, compiled: Graph) -> None:
    async with with_compiled(claiming(compiled, 2.0)) as client:
        models = {m["id"]: m for m in (await client.get("/v1/models")).json()["data"]}
    assert models["SD1.5"]["tvm_compiled"] == [{"size": "128x128", "speedup": 2.0, "precision": "float32"}]
    assert models["SD1.5-ControlNet"]["tvm_compiled"] == [{"size": "128x128", "speedup": 2.0, "precision": "float32"}]
    assert models["SD2"]["tvm_compiled"] == []


async def test_after_a_failure_of_tvm_auto_uses_torch(
    with_compiled: Connect, handles: dict[str, Any], client: httpx.AsyncClient
) -> None:
    failing = broken(handles)
    async with with_compiled(failing) as unlucky:
        replies = [await post(unlucky, output_format="png") for _ in range(2)]
    expected = pixels(picture(await post(client, output_format="png")))
    for reply in replies:
        assert reply.headers["x-backend"] == "torch"
        assert np.abs(pixels(picture(reply)) - expected).max() <= 1
    asked = [call["stage"].backend for call in failing.named("denoise")]
    assert asked == ["tvm", "torch", "torch"], "it is in quarantine after it failed"


async def test_a_failure_of_tvm_is_an_error_where_tvm_was_requested(
    with_compiled: Connect, handles: dict[str, Any]
) -> None:
    async with with_compiled(broken(handles)) as client:
        reply = await post(client, backend="tvm")
        check(reply, 500, 50001, "backend")
        assert "Send backend 'auto' or 'torch'" in reply.json()["message"]


async def test_a_watched_request_continues_on_torch_after_tvm_failed(
    with_compiled: Connect, handles: dict[str, Any]
) -> None:
    async with with_compiled(broken(handles)) as client:
        told = events((await post(client, stream=True)).text)
    assert ("progress", {"state": "restarted", "stage": UNET}) in told
    assert told[-1][0] == "result"


async def test_requests_do_not_wait_for_compiled_replicas_that_do_not_answer(
    with_compiled: Connect, graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.ingress.compiled.ANSWER_S", 0.05)
    async with with_compiled(FakeGraph(graph, [UNET], compile_report=never)) as client:
        assert await backend(client) == "torch"


async def test_a_replica_with_nothing_compiled_loads_nothing(sized: Catalog, tmp_path: Path) -> None:
    args, runtime = AppArgs(tvm=True, grouping="role"), Runtime("cpu", torch_threads=1)
    bound = bind_compiled(args, sized, runtime, bind_components(args, sized, runtime), tmp_path)
    assert {name_of(app) for app in bound.values()} == {"unet-tvm"}
    assert (await run_locally(bound, "nothing")[UNET].compile_report.remote(component=UNET)).sizes == ()


@pytest.fixture(scope="module")
def growing(sized: Catalog, handles: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """The graph with a compiled UNet that has no program yet, and room for one size."""
    args, runtime = AppArgs(tvm=True, compile="on_demand", compile_sizes=1), Runtime("cpu", torch_threads=1)
    bound = bind_compiled(
        args, sized, runtime, bind_components(args, sized, runtime), tmp_path_factory.mktemp("growing")
    )
    return Graph(handles, run_locally(bound, "growing"))


async def until(client: httpx.AsyncClient, key: str, expected: Any = None) -> list[dict[str, Any]]:
    """What `/v1/models` says of SD1.5 under a key, as soon as it says that, or anything."""
    while True:
        models = {m["id"]: m for m in (await client.get("/v1/models")).json()["data"]}
        if (told := models["SD1.5"][key]) and expected in (None, told):
            return list(told)
        await asyncio.sleep(0.2)


async def test_the_first_request_of_a_size_has_it_compiled(
    connect: ClientFactory, sized: Catalog, growing: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled in a process of its own while torch draws; 144 x 144 is on no table."""
    monkeypatch.setattr("pipelines.backends.tvm.compile_subprocess.NICENESS", 0)  # else it starves on a busy machine
    fields = {"width": 144, "height": 144, "output_format": "png"}
    async with connect(catalog=sized, graph=claiming(growing, 2.0), compiles_on_demand=True) as client:
        refused = await post(client, **fields, backend="tvm")
        assert "Only ['128x128', '256x256'] allowed" in check(refused, 400, 40302, "backend")
        first = await post(client, **fields)
        assert first.headers["x-backend"] == "torch"
        (pending,) = await until(client, "tvm_compiling")
        assert pending["size"] == "144x144"
        assert pending["state"] in ("waiting", "compiling", "loading")
        assert await until(client, "tvm_compiled") == [{"size": "144x144", "speedup": 2.0, "precision": "float32"}]
        later = await post(client, **fields)
        assert later.headers["x-backend"] == "tvm"
        assert np.abs(pixels(picture(first)) - pixels(picture(later))).max() <= 2
        assert await backend(client, **fields, backend="tvm") == "tvm", "by name, as it is compiled"
        assert await backend(client) == "torch"
        report = await growing.compile_report(component=UNET)
    assert report.pending == (), "128x128 would be one size too many"


async def test_a_compile_that_fails_is_told_and_torch_goes_on(
    connect: ClientFactory, sized: Catalog, handles: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    args, runtime = AppArgs(tvm=True, compile="on_demand"), Runtime("cpu", torch_threads=1)
    bound = bind_compiled(args, sized, runtime, bind_components(args, sized, runtime), tmp_path / "file" / "tvm")
    async with connect(
        catalog=sized, graph=Graph(handles, run_locally(bound, "failing")), compiles_on_demand=True
    ) as client:
        assert await backend(client) == "torch"
        await until(client, "tvm_compiling", [{"size": "128x128", "state": "failed"}])
        assert await backend(client) == "torch"
    assert "cannot be compiled" in caplog.text
    assert "Not a directory" in caplog.text


async def test_a_replica_that_lacks_what_another_has_is_not_blamed(
    connect: ClientFactory, sized: Catalog, handles: dict[str, Any], tmp_path: Path
) -> None:
    """The ingress has heard of a size from one replica, and the request comes to another."""
    args, runtime = AppArgs(tvm=True, compile="on_demand"), Runtime("cpu", torch_threads=1)
    (tmp_path / "file").touch()
    bound = bind_compiled(args, sized, runtime, bind_components(args, sized, runtime), tmp_path / "file" / "tvm")

    async def report(component: str, wanted: tuple[WantedProgram, ...]) -> CompileReport:
        return CompileReport((CompiledSize(component, 128, 128, False, 2.0),), ())

    graph = FakeGraph(Graph(handles, run_locally(bound, "late")), compile_report=report)
    async with connect(catalog=sized, graph=graph, compiles_on_demand=True) as client:
        for _ in range(2):
            assert await backend(client) == "torch"
        message = check(await post(client, backend="tvm"), 400, 40302, "backend")
    assert "128x128 is being loaded. Only ['auto', 'torch'] allowed now" in message
    assert [call["stage"].backend for call in graph.named("denoise")] == ["tvm", "torch", "tvm", "torch", "tvm"]
