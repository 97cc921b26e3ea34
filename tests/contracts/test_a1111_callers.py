"""What is global in A1111 is the caller's own here: options, progress, interrupt; passwords are keys."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.access import caller_state
from deployments.access.limits import KeyLimits
from deployments.graph import Progress, Sealed
from deployments.telemetry.stages import Timed
from pipelines.pictures.images import EncodedImage
from tests.support.graph import FakeGraph
from tests.support.http import decoded, photo
from tests.support.ingress import ClientFactory
from tests.support.keys import ALICE, BOB

TXT2IMG = "/sdapi/v1/txt2img"
SMALL = {"prompt": "a cat", "width": 128, "height": 128, "steps": 4, "seed": 7}


def basic(text: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(text.encode()).decode()}


async def test_the_key_is_a_password_too_on_every_route(connect: ClientFactory, keys_file: Path) -> None:
    async with connect(keys_file=keys_file) as client:
        for path in ("/sdapi/v1/options", "/v1/models", "/sdapi/v1/progress", "/controlnet/version"):
            for good in (ALICE, basic("me:secret"), basic(":secret"), basic("secret:"), basic("secret")):
                assert (await client.get(path, headers=good)).status_code == 200, (path, good)
            for bad in ({}, basic(""), basic("secret:wrong"), {"authorization": "Basic ?"}, {"authorization": "Basic"}):
                assert (await client.get(path, headers=bad)).status_code == 401, (path, bad)
        reply = await client.get("/sdapi/v1/options")
        assert {"error", "detail", "body", "errors"} <= set(reply.json())


async def test_without_keys_any_authorization_header_is_accepted(client: httpx.AsyncClient) -> None:
    """SillyTavern always sends one, of nothing if it has nothing."""
    for header in ({}, basic(""), basic(":"), {"authorization": "Basic "}, {"authorization": ""}):
        assert (await client.get("/sdapi/v1/options", headers=header)).status_code == 200


async def test_options_are_the_callers_own(connect: ClientFactory, keys_file: Path) -> None:
    async with connect(keys_file=keys_file) as client:

        async def options(who: dict[str, str]) -> dict[str, Any]:
            shown: dict[str, Any] = (await client.get("/sdapi/v1/options", headers=who)).json()
            return shown

        first = await options(ALICE)
        assert first["sd_model_checkpoint"].startswith("SD1.5 [")
        assert first["samples_format"] == "png"
        (title,) = [
            m["title"]
            for m in (await client.get("/sdapi/v1/sd-models", headers=ALICE)).json()
            if m["model_name"] == "SD2"
        ]
        reply = await client.post("/sdapi/v1/options", headers=ALICE, json=first | {"sd_model_checkpoint": title})
        assert (reply.status_code, reply.json()) == (200, None)
        changed = await options(ALICE)
        assert changed["sd_model_checkpoint"] == title
        assert changed["sd_checkpoint_hash"] in title
        assert await options(BOB) == first
        override = {"override_settings": {"sd_model_checkpoint": "SDXL1.0-base"}, "width": 256, "height": 256}
        infos = [
            json.loads((await client.post(TXT2IMG, headers=who, json=SMALL | more)).json()["info"])
            for who in (ALICE, BOB)
            for more in ({}, override)
        ]
        assert [i["sd_model_name"] for i in infos] == ["SD2", "SDXL1.0-base", "SD1.5", "SDXL1.0-base"]
        assert await options(ALICE) == changed, "an override holds for its request alone"
        await client.post("/sdapi/v1/options", headers=ALICE, json={"sd_model_checkpoint": None, "unheard_of": 1})
        assert await options(ALICE) == first


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sd_model_checkpoint": "SD9"}, "SD1.5"),
        ({"samples_format": "gif"}, "webp"),
        ({"sd_vae": "x"}, "Automatic"),
        ({"jpeg_quality": 0}, "1"),
        ({"randn_source": "GPU"}, "CPU"),
    ],
)
async def test_if_one_option_cannot_be_honoured_none_is_stored(
    client: httpx.AsyncClient, options: dict[str, Any], says: str
) -> None:
    before = (await client.get("/sdapi/v1/options")).json()
    reply = await client.post("/sdapi/v1/options", json={"CLIP_stop_at_last_layers": 3} | options)
    assert reply.status_code == 400
    assert says in reply.json()["detail"]
    assert (await client.get("/sdapi/v1/options")).json() == before


class Steps:
    """UNets whose steps the test allows, one by one; each picture that begins is at its first one."""

    def __init__(self) -> None:
        self.going: dict[int, asyncio.Event] = {}
        self.ended: list[int] = []
        self.graph = FakeGraph(denoise_watched=self.denoise, decode=self.decode, preview=self.preview)

    async def denoise(self, *, stage: Any, **_: Any) -> AsyncGenerator[Any, None]:
        step, self.going[stage.seed] = 0, asyncio.Event()
        try:
            while step < stage.schedule.steps:
                step += 1
                yield Progress(stage.component, step, stage.schedule.steps, latents=Sealed(b""))
                await self.going[stage.seed].wait()
                self.going[stage.seed].clear()
            yield Sealed(b"")
        finally:
            self.ended.append(stage.seed)

    async def decode(self, **_: Any) -> Any:
        return Timed(EncodedImage(photo(), "png"), ())

    async def preview(self, **_: Any) -> bytes:
        return photo(20, 20)

    def step(self, seed: int) -> None:
        self.going[seed].set()

    async def finish(self, seed: int) -> None:
        while seed not in self.ended:
            self.going[seed].set()
            await asyncio.sleep(0)


@asynccontextmanager
async def drawing(client: httpx.AsyncClient, who: dict[str, str], **fields: Any) -> AsyncIterator[asyncio.Task[Any]]:
    """A request under way."""
    task = asyncio.create_task(client.post(TXT2IMG, headers=who, json=SMALL | fields))
    try:
        yield task
    finally:
        task.cancel()


async def progress_of(client: httpx.AsyncClient, who: dict[str, str], until: Any, **query: Any) -> dict[str, Any]:
    """Progress, asked for until it is as the test waits for."""
    while True:
        told: dict[str, Any] = (await client.get("/sdapi/v1/progress", headers=who, params=query)).json()
        if until(told):
            return told
        await asyncio.sleep(0)


def idle(told: dict[str, Any]) -> bool:
    return (told["progress"], told["state"]["job_count"]) == (0.0, 0)


async def test_progress_is_of_the_callers_own_request(connect: ClientFactory, keys_file: Path) -> None:
    steps = Steps()
    async with connect(graph=steps.graph, keys_file=keys_file) as client, drawing(client, ALICE) as task:
        assert idle((await client.get("/sdapi/v1/progress", headers=BOB)).json())
        told = await progress_of(client, ALICE, lambda t: t["state"]["sampling_step"] == 1)
        assert (told["progress"], told["state"]["sampling_steps"], told["state"]["job_count"]) == (0.25, 4, 1)
        assert told["eta_relative"] > 0
        steps.step(7)
        told = await progress_of(client, ALICE, lambda t: t["current_image"])
        assert decoded(told["current_image"]).size == (20, 20)
        assert (await progress_of(client, ALICE, lambda t: True, skip_current_image=True))["current_image"] is None
        assert idle((await client.get("/sdapi/v1/progress", headers=BOB)).json())
        await steps.finish(7)
        assert (await task).status_code == 200
        assert idle((await client.get("/sdapi/v1/progress", headers=ALICE)).json())


async def test_previews_are_made_only_when_progress_is_requested_and_enabled(connect: ClientFactory) -> None:
    steps = Steps()
    async with connect(graph=steps.graph) as client:
        for options, query in (({"live_previews_enable": False}, {}), ({}, {"skip_current_image": True})):
            async with drawing(client, {}, override_settings=options) as task:
                for step in (1, 2):
                    await progress_of(client, {}, lambda t, step=step: t["state"]["sampling_step"] == step, **query)
                    steps.step(7)
                await steps.finish(7)
                await task
                steps.ended.clear()
        assert not steps.graph.named("preview")


async def test_interrupt_ends_the_callers_requests_and_nobody_elses(connect: ClientFactory, keys_file: Path) -> None:
    steps = Steps()
    async with (
        connect(graph=steps.graph, keys_file=keys_file) as client,
        drawing(client, ALICE, n_iter=3) as task,
        drawing(client, BOB, seed=20) as other,
    ):
        for who in (ALICE, BOB):
            await progress_of(client, who, lambda t: t["state"]["sampling_step"] == 1)
        await steps.finish(7)
        await progress_of(client, ALICE, lambda t: t["state"]["job_no"] == 1)
        reply = await client.post("/sdapi/v1/interrupt", headers=ALICE)
        assert (reply.status_code, reply.json()) == (200, {"requests": 1})
        body = (await task).json()
        assert json.loads(body["info"])["all_seeds"] == [7], "what was finished is sent"
        assert len(body["images"]) == 1
        assert set(steps.ended) == {7, 8, 9}
        assert not other.done()
        assert (await client.post("/sdapi/v1/interrupt", headers=ALICE)).json() == {"requests": 0}
        await steps.finish(20)
        assert len((await other).json()["images"]) == 1


async def test_an_interrupt_before_the_first_picture_returns_none(connect: ClientFactory) -> None:
    steps = Steps()
    async with connect(graph=steps.graph) as client, drawing(client, {}) as task:
        await progress_of(client, {}, lambda t: t["state"]["sampling_step"] == 1)
        await client.post("/sdapi/v1/interrupt")
        body = (await task).json()
    assert body["images"] == []
    info = json.loads(body["info"])
    assert (info["infotexts"], info["seed"], info["width"]) == ([], 7, 128)


async def test_skip_leaves_out_a_batch(connect: ClientFactory) -> None:
    steps = Steps()
    async with connect(graph=steps.graph) as client, drawing(client, {}, batch_size=2, n_iter=2) as task:
        told = await progress_of(client, {}, lambda t: t["state"]["sampling_step"] == 1)
        assert (told["state"]["job"], told["state"]["job_no"]) == ("Batch 1 out of 2", 0)
        assert (await client.post("/sdapi/v1/skip")).json() == {"requests": 1}
        told = await progress_of(client, {}, lambda t: t["state"]["job_no"] == 1)
        assert told["state"]["skipped"]
        await steps.finish(9)
        await steps.finish(10)
        assert json.loads((await task).json()["info"])["all_seeds"] == [9, 10]


async def test_one_picture_that_fails_ends_the_others(connect: ClientFactory) -> None:
    steps = Steps()

    async def decode(**_: Any) -> Any:
        raise RuntimeError("secret")

    graph = FakeGraph(denoise_watched=steps.denoise, decode=decode)
    async with connect(graph=graph) as client, drawing(client, {}, n_iter=2) as task:
        await progress_of(client, {}, lambda t: t["state"]["sampling_step"] == 1)
        await steps.finish(8)
        reply = await task
        assert reply.status_code == 500
        assert "secret" not in reply.text
        assert set(steps.ended) == {7, 8}
        assert idle((await client.get("/sdapi/v1/progress")).json())


async def test_replicas_share_options_and_progress_through_redis(
    connect: ClientFactory, keys_file: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options, progress with its picture, and an interrupt that reaches work at another replica."""
    monkeypatch.setattr(caller_state, "TELLING_S", 0.01)
    steps, shared = Steps(), {"keys_file": keys_file, "key_limits": KeyLimits(store=redis_url)}
    async with connect(graph=steps.graph, **shared) as one, connect(graph=steps.graph, **shared) as other:
        await one.post("/sdapi/v1/options", headers=ALICE, json={"sd_model_checkpoint": "SD2"})
        assert (await other.get("/sdapi/v1/options", headers=ALICE)).json()["sd_model_checkpoint"].startswith("SD2 [")
        assert (await other.get("/sdapi/v1/options", headers=BOB)).json()["sd_model_checkpoint"].startswith("SD1.5 [")
        async with drawing(one, ALICE, batch_size=2) as task, drawing(one, BOB, seed=20) as bobs:
            await progress_of(other, ALICE, lambda t: t["state"]["sampling_step"] == 1)
            steps.step(7)
            told = await progress_of(other, ALICE, lambda t: t["current_image"])
            assert decoded(told["current_image"]).size == (20, 20)
            assert (await other.post("/sdapi/v1/skip", headers=BOB)).json() == {"requests": 1}
            assert json.loads((await bobs).json()["info"])["all_seeds"] == []
            assert (await other.post("/sdapi/v1/interrupt", headers=ALICE)).json() == {"requests": 1}
            body = (await task).json()
            assert json.loads(body["info"])["all_seeds"] == []
        await progress_of(other, ALICE, idle)


async def test_without_redis_each_replica_knows_its_own_requests(connect: ClientFactory, keys_file: Path) -> None:
    async with connect(keys_file=keys_file) as one, connect(keys_file=keys_file) as other:
        await one.post("/sdapi/v1/options", headers=ALICE, json={"sd_model_checkpoint": "SD2"})
        assert (await other.get("/sdapi/v1/options", headers=ALICE)).json()["sd_model_checkpoint"].startswith("SD1.5 [")


async def test_without_a_reachable_redis_each_replica_knows_its_own_requests(
    connect: ClientFactory, keys_file: Path
) -> None:
    bounds = KeyLimits(store="redis://127.0.0.1:1")
    steps = Steps()
    async with connect(graph=steps.graph, keys_file=keys_file, key_limits=bounds) as client:
        await client.post("/sdapi/v1/options", headers=ALICE, json={"samples_format": "webp"})
        assert (await client.get("/sdapi/v1/options", headers=ALICE)).json()["samples_format"] == "webp"
        async with drawing(client, ALICE) as task:
            await progress_of(client, ALICE, lambda t: t["state"]["sampling_step"] == 1)
            assert (await client.post("/sdapi/v1/interrupt", headers=ALICE)).json() == {"requests": 1}
            assert (await task).json()["images"] == []
