"""Which backend runs a request: what is asked for, what is compiled, what was measured, and what still works."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from ray import serve

from config.catalog import Catalog, Size
from deployments.app import AppArgs, bind_compiled, bind_components
from deployments.replicas.base import Runtime
from pipelines.backends.tvm.artifacts import ArtifactCache, best_level
from pipelines.backends.tvm.compile import compile_unet
from pipelines.backends.tvm.shapes import artifact_key
from pipelines.plan import CompiledSize
from pipelines.weights.files import read_config
from tests.contracts.conftest import ClientFactory, run_locally
from tests.contracts.test_errors import check
from tests.contracts.test_generation import picture, pixels, post
from tests.contracts.test_stream import parse

UNET = "unet-sd15"


@pytest.fixture(scope="module")
def sized(catalog: Catalog) -> Catalog:
    """SD1.5's size table with a compiled size and one that is not."""
    table = (Size(width=128, height=128), Size(width=256, height=256))
    models = tuple(m.model_copy(update={"tvm_sizes": table if m.unet == UNET else ()}) for m in catalog.models)
    return catalog.model_copy(update={"models": models})


@pytest.fixture(scope="module")
def compiled(sized: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The compiled UNet's deployment, without and with a ControlNet, at 128x128."""
    folder = tmp_path_factory.mktemp("tvm")
    config = read_config(sized.component(UNET))
    for control in (False, True):
        key = artifact_key(sized, UNET, 128, 128, 2, control, best_level())
        ArtifactCache(folder).make(key, lambda program, key=key: compile_unet(config, key, program))
    args, runtime = AppArgs(tvm=True), Runtime("cpu", torch_threads=2)
    bound = bind_compiled(args, sized, runtime, bind_components(args, sized, runtime), folder)
    assert {name: app._bound_deployment.name for name, app in bound.items()} == {UNET: "unet-sd15-tvm"}
    assert bound[UNET]._bound_deployment.ray_actor_options["runtime_env"]["env_vars"]["TVM_BIND_THREADS"] == "0"
    return run_locally(bound, "compiled")[UNET]


class Claims:
    """A compiled UNet's handle that says how fast it was: a measurement on a busy machine is no test's business."""

    def __init__(self, handle: Any, speedup: float) -> None:
        async def sizes() -> tuple[CompiledSize, ...]:
            return tuple(replace(size, speedup=speedup) for size in await handle.compiled_sizes.remote())

        self.denoise, self.options = handle.denoise, handle.options
        self.compiled_sizes = SimpleNamespace(remote=sizes)


class Broken:
    """A compiled UNet that says it can draw, and then cannot."""

    asked = 0

    async def compiled_sizes(self) -> tuple[CompiledSize, ...]:
        return (CompiledSize(UNET, 128, 128, False, 3.0),)

    async def denoise(self, *_: object) -> None:
        Broken.asked += 1
        raise RuntimeError("no such kernel")

    async def denoise_watched(self, *_: object) -> Any:
        raise RuntimeError("no such kernel")
        yield


Connect = Callable[..., Any]


@pytest.fixture
def with_compiled(connect: ClientFactory, sized: Catalog) -> Connect:
    return lambda handle, **changes: connect(catalog=sized, compiled={UNET: handle}, **changes)


async def backend(client: httpx.AsyncClient, **fields: Any) -> str:
    reply = await post(client, **fields)
    assert reply.status_code == 200, reply.text
    return reply.headers["x-backend"]


async def test_auto_takes_tvm_where_it_can(with_compiled: Connect, compiled: Any) -> None:
    photo = io.BytesIO()
    Image.effect_noise((90, 70), 80).convert("RGB").save(photo, "PNG")
    control = {"model_name": "SD1.5-ControlNet", "controlnet_name": "canny"}
    control["controlnet_image"] = base64.b64encode(photo.getvalue()).decode()
    async with with_compiled(Claims(compiled, 2.0)) as client:
        assert await backend(client) == "tvm"
        assert await backend(client, backend="TVM") == "tvm"
        assert await backend(client, **control) == "tvm"
        assert await backend(client, backend="torch") == "torch"
        assert await backend(client, width=256, height=256) == "torch"
        assert await backend(client, width=136) == "torch"
        assert await backend(client, loras={"Pixel_Art": 0.5}) == "torch"
        assert await backend(client, loras={"Pixel_Art": 0.0}) == "tvm"


async def test_both_backends_draw_the_same_picture(with_compiled: Connect, compiled: Any) -> None:
    async with with_compiled(Claims(compiled, 2.0)) as client:
        drawn = [pixels(picture(await post(client, backend=b, output_format="png"))) for b in ("tvm", "torch")]
    assert np.abs(drawn[0] - drawn[1]).max() <= 2


async def test_auto_leaves_tvm_where_it_did_not_pay(
    with_compiled: Connect, compiled: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with with_compiled(Claims(compiled, 1.05)) as client:
        with caplog.at_level("INFO", "sdgraph"):
            assert await backend(client) == "torch"
        assert "unet-sd15 at 128x128 runs on torch: tvm was only 1.05 times as fast" in caplog.text
        assert await backend(client, backend="tvm") == "tvm", "asked for by name"


async def test_auto_means_torch_where_torch_has_a_gpu(
    with_compiled: Connect, compiled: Any, handles: dict[str, Any]
) -> None:
    async def cuda() -> str:
        return "cuda"

    class OnGpu:
        device = SimpleNamespace(remote=cuda)

        def __getattr__(self, name: str) -> Any:
            return getattr(handles[UNET], name)

    async with with_compiled(Claims(compiled, 5.0), handles=handles | {UNET: OnGpu()}) as client:
        assert await backend(client) == "torch"
        assert await backend(client, backend="tvm") == "tvm"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 136}, "Only ['128x128', '256x256'] allowed"),
        ({"width": 256, "height": 256}, "Only ['128x128'] are compiled"),
        ({"loras": {"Pixel_Art": 0.5}}, "no LoRAs"),
        ({"model_name": "SD2"}, "Only [] allowed"),
    ],
)
async def test_an_explicit_tvm_that_cannot_be(
    with_compiled: Connect, compiled: Any, fields: dict[str, Any], message: str
) -> None:
    async with with_compiled(Claims(compiled, 2.0)) as client:
        reply = await post(client, backend="tvm", **fields)
        check(reply, 400, 40302, "backend")
        assert message in reply.json()["message"]


async def test_models_tell_what_is_compiled(with_compiled: Connect, compiled: Any) -> None:
    async with with_compiled(Claims(compiled, 2.0)) as client:
        models = {m["id"]: m for m in (await client.get("/v1/models")).json()["data"]}
    assert models["SD1.5"]["tvm_compiled"] == [{"size": "128x128", "speedup": 2.0}]
    assert models["SD1.5-ControlNet"]["tvm_compiled"] == [{"size": "128x128", "speedup": 2.0}]
    assert models["SD2"]["tvm_compiled"] == []


@pytest.fixture(scope="module")
def broken() -> Any:
    app = serve.deployment(Broken, name="broken").bind()
    return serve.run(app, name="broken", route_prefix=None, _local_testing_mode=True)


async def test_a_failing_tvm_is_torch_for_auto(with_compiled: Connect, broken: Any, client: httpx.AsyncClient) -> None:
    Broken.asked = 0
    async with with_compiled(broken) as failing:
        replies = [await post(failing, output_format="png") for _ in range(2)]
    expected = pixels(picture(await post(client, output_format="png")))
    for reply in replies:
        assert reply.headers["x-backend"] == "torch"
        assert np.abs(pixels(picture(reply)) - expected).max() <= 1
    assert Broken.asked == 1, "it is left alone after it failed"


async def test_a_failing_tvm_is_an_error_for_who_asked_for_it(with_compiled: Connect, broken: Any) -> None:
    async with with_compiled(broken) as failing:
        reply = await post(failing, backend="tvm")
        check(reply, 500, 50001, "backend")
        assert "Send backend 'auto' or 'torch'" in reply.json()["message"]


async def test_a_watched_request_goes_on_with_torch(with_compiled: Connect, broken: Any) -> None:
    async with with_compiled(broken) as failing:
        events = parse((await post(failing, stream=True)).text)
    assert events[-1][0] == "result"


async def test_nobody_waits_for_replicas_that_do_not_answer(
    with_compiled: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.ingress.compiled.PATIENCE_S", 0.05)

    async def never() -> None:
        import asyncio

        await asyncio.sleep(3600)

    async with with_compiled(SimpleNamespace(compiled_sizes=SimpleNamespace(remote=never))) as client:
        assert await backend(client) == "torch"


async def test_a_replica_with_nothing_compiled_loads_nothing(sized: Catalog, tmp_path: Path) -> None:
    args, runtime = AppArgs(tvm=True, grouping="role"), Runtime("cpu", torch_threads=2)
    bound = bind_compiled(args, sized, runtime, bind_components(args, sized, runtime), tmp_path)
    assert {app._bound_deployment.name for app in bound.values()} == {"unet-tvm"}
    assert await run_locally(bound, "nothing")[UNET].compiled_sizes.remote() == ()
