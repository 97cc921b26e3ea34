"""Waiting for a chain of calls: what Serve would wait for for ever is noticed."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest
from ray.exceptions import ActorUnavailableError

from deployments.ingress import pending as chain
from deployments.ingress import wake as waking
from deployments.ingress.pending import last_of_chain
from tests.contracts.conftest import ClientFactory
from tests.contracts.test_errors import Unused, check
from tests.contracts.test_generation import SMALL


async def fine() -> bool:
    return True


async def unwell() -> bool:
    return False


async def after(seconds: float, value: Any) -> Any:
    await asyncio.sleep(seconds)
    if isinstance(value, Exception):
        raise value
    return value


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "PATIENCE_S", 0.05)


async def test_a_chain_that_takes_its_time_is_waited_for() -> None:
    assert await last_of_chain(after(0.3, "picture"), [after(0.1, "latents"), None], unwell) == "picture"


@pytest.mark.parametrize(("well", "long_s"), [(unwell, 60.0), (fine, 0.1)])
async def test_an_argument_that_failed_is_noticed_while_the_last_call_hangs(
    well: Any, long_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the graph was not well, or after long."""
    monkeypatch.setattr(chain, "LONG_S", long_s)
    lost = ActorUnavailableError("its node is gone", b"0" * 16)
    begin = time.monotonic()
    with pytest.raises(ActorUnavailableError):
        await last_of_chain(after(60, "never"), [after(0.1, "conditioning"), after(0.1, lost)], well)
    assert time.monotonic() - begin < 10


async def test_nothing_is_fetched_while_all_is_well() -> None:
    fetched = False

    async def latents() -> None:
        nonlocal fetched
        fetched = True

    call = latents()
    assert await last_of_chain(after(0.3, "picture"), [call], fine) == "picture"
    assert not fetched
    await call


async def test_leaving_cancels_every_call() -> None:
    cancelled = []

    async def call(name: str) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(name)
            raise

    waiting = asyncio.create_task(last_of_chain(call("last"), [call("first")], unwell))
    await asyncio.sleep(0.3)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await asyncio.sleep(0)
    assert sorted(cancelled) == ["first", "last"]


async def test_what_cannot_start_is_not_waited_for(
    connect: ClientFactory, handles: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replica's constructor raises again and again; Serve's status says so."""

    class Asleep(Unused):
        deployment_name = "vae-sd15"

        @property
        def decode(self) -> Any:
            class Call:
                @staticmethod
                def remote(*_: Any) -> Any:
                    return after(60, "never")

            return Call

    async def failing() -> tuple[bool, dict[str, str]]:
        return False, {"vae-sd15": "UPDATING: A replica failed to start with exception. Retrying. Error: no weights"}

    monkeypatch.setattr("tests.contracts.conftest.ready", failing)
    monkeypatch.setattr(waking, "FAILING_S", 0.2)
    deaf = dict.fromkeys(handles, Unused()) | {"vae-sd15": Asleep()}
    async with connect(handles=deaf) as client:
        reply: httpx.Response = await client.post("/v1/image/generation", json=SMALL)
    assert "'vae-sd15'" in check(reply, 503, 42903, None)
    assert reply.headers["retry-after"] == "60"
