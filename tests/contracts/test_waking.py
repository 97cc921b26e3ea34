"""Deployments that may sleep are knocked at together, when a request that will visit them is admitted.

Serve counts a call as waiting only when its arguments are there, so a VAE would start after the UNet had finished.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from deployments.ingress import wake as waking
from tests.contracts.conftest import ClientFactory
from tests.contracts.test_generation import SMALL


class Knocked:
    """A handle that writes down what is called, in order."""

    def __init__(self, name: str, inner: Any, calls: list[tuple[str, str]]) -> None:
        self.name, self.inner, self.calls = name, inner, calls

    def __getattr__(self, method: str) -> Any:
        def remote(*args: Any) -> Any:
            self.calls.append((self.name, method))
            return getattr(self.inner, method).remote(*args)

        return SimpleNamespace(remote=remote)


async def test_what_may_sleep_is_woken_at_once(
    connect: ClientFactory, handles: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []
    watched = {name: Knocked(name, handle, calls) for name, handle in handles.items()}
    async with connect(handles=watched) as client:
        assert (await client.post("/v1/image/generation", json=SMALL)).status_code == 200
        knocked = {name for name, method in calls if method == "awake"}
        assert knocked == {"text-encoder-sd15", "unet-sd15", "vae-sd15"}
        calls.clear()
        assert (await client.post("/v1/image/generation", json=SMALL)).status_code == 200
        assert [call for call in calls if call[1] == "awake"] == [], "used a moment ago"
        monkeypatch.setattr(waking, "SURELY_AWAKE_S", 0.0)
        assert (await client.post("/v1/image/generation", json=SMALL)).status_code == 200
        assert ("vae-sd15", "awake") in calls


async def test_a_knock_that_fails_is_nobodys_business(connect: ClientFactory, handles: dict[str, Any]) -> None:
    class Deaf(Knocked):
        def __getattr__(self, method: str) -> Any:
            if method == "awake":
                raise RuntimeError("no")
            return super().__getattr__(method)

    deaf = {name: Deaf(name, handle, []) for name, handle in handles.items()}
    async with connect(handles=deaf) as client:
        assert (await client.post("/v1/image/generation", json=SMALL)).status_code == 200
