"""A denoiser's side of the ControlNet deployment, whose replicas may die under a tick."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
import torch
from ray.exceptions import ActorDiedError

from deployments.graph import Call, ControlNetEdge
from deployments.replicas.remote_control import RemoteControl
from pipelines.control.types import ControlBatch, ControlHint, HintUse
from tests.support.graph import FakeResponse


class DyingEdge(ControlNetEdge):
    """An edge whose replica dies so many times, and whose successor has no maps."""

    def __init__(self, deaths: int) -> None:
        super().__init__(None)
        self.deaths = deaths
        self.sent: list[int] = []

    def residuals(self, **arguments: Any) -> Call[Any]:
        return Call(FakeResponse(self._residuals, arguments))

    async def _residuals(self, batch: Any, hints: dict[str, Any]) -> str | None:
        self.sent.append(len(hints))
        if self.deaths:
            self.deaths -= 1
            raise ActorDiedError
        return "residuals" if hints else None


HINT = ControlHint("map", "net", None, torch.zeros(1, 3, 8, 8))
BATCH = ControlBatch(((HintUse(HINT.ref),),), torch.zeros(1, 4, 1, 1), torch.zeros(1), torch.zeros(1, 77, 8))


async def test_a_controlnet_that_dies_is_asked_again_and_given_the_maps() -> None:
    edge = DyingEdge(deaths=1)
    pending = RemoteControl(edge).start(BATCH, {"map": HINT})
    assert await asyncio.to_thread(lambda: cast(str, pending.result())) == "residuals"
    assert edge.sent == [0, 0, 1], "died; its successor has not got the map; it has"


async def test_a_controlnet_that_dies_twice_is_reported_as_a_dead_replica() -> None:
    pending = RemoteControl(DyingEdge(deaths=2)).start(BATCH, {"map": HINT})
    with pytest.raises(ActorDiedError):
        await asyncio.to_thread(pending.result)
