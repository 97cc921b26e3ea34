"""What an ingress asks of others, and what it says while they do not answer: Serve's controller, a library's volume."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from config.catalog import Catalog
from deployments import ray_compat
from deployments.ingress import library as watching
from deployments.ingress.library import LibraryWatch
from deployments.ray_compat import DeploymentStates
from pipelines.errors import SilentLibraryError
from pipelines.library.library import Library
from tests.support.library import LORA, extended, put


async def test_a_controller_that_does_not_answer_leaves_what_it_said_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_compat, "CONTROLLER_TIMEOUT_S", 0.02)
    answers, said = threading.Event(), {"vae": "HEALTHY", "unet": "UPDATING: a replica starts"}

    def states() -> Mapping[str, str]:
        assert answers.wait(60)
        return dict(said)

    monkeypatch.setattr(ray_compat, "_states", states)
    ask = DeploymentStates()
    assert await ask() == (False, {}), "it never said anything"
    monkeypatch.setattr(ray_compat, "CONTROLLER_TIMEOUT_S", 60)
    answers.set()
    assert await ask() == (False, said)
    said["unet"] = "HEALTHY"
    assert await ask() == (True, said)
    monkeypatch.setattr(ray_compat, "CONTROLLER_TIMEOUT_S", 0.02)
    answers.clear()
    while (told := await ask())[1] == said:
        assert told[0]
    ready, states_now = told
    assert ready, "replicas serve without it"
    assert states_now["vae"].startswith("HEALTHY (Serve's controller has not answered for ")
    monkeypatch.setattr(ray_compat, "CONTROLLER_TIMEOUT_S", 60)
    answers.set()
    await ask()  # what was asked before
    assert await ask() == (True, said)


async def test_a_controller_that_dies_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Mapping[str, str] | Exception] = [{"vae": "HEALTHY"}, RuntimeError("died"), {"vae": "UNHEALTHY"}]

    def states() -> Mapping[str, str]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(ray_compat, "_states", states)
    ask = DeploymentStates()
    assert [await ask() for _ in range(3)] == [
        (True, {"vae": "HEALTHY"}),
        (True, {"vae": "HEALTHY"}),
        (False, {"vae": "UNHEALTHY"}),
    ]


async def test_a_library_whose_volume_hangs_is_served_as_it_was_known(
    catalog: Catalog, tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "FOLDERS_TIMEOUT_S", 0.02)
    monkeypatch.setattr(watching, "RESCAN_S", 0.0)
    folder, answers, asked = tmp_path / "library", threading.Event(), list[Library]()
    put(tiny_models / "lora-detail-sd15" / LORA, folder / "One.safetensors")
    built, read = extended(catalog, [folder], tmp_path / "digests.json"), Library.read

    def slowly(self: Library) -> Catalog:
        asked.append(self)
        assert answers.wait(60)
        return read(self)

    monkeypatch.setattr(Library, "read", slowly)
    watch = LibraryWatch(built)
    assert watch.catalog is built, "a process that starts now serves without what it cannot see"
    assert await watch.changed() is False
    for _ in range(3):
        with pytest.raises(SilentLibraryError, match="do not answer"):
            await watch.refresh()
    assert len(asked) <= 1, "nothing piles up behind it"
    monkeypatch.setattr(watching, "FOLDERS_TIMEOUT_S", 60)
    answers.set()
    while "One" not in {lora.name for lora in watch.catalog.loras} or watch._silent:
        await asyncio.sleep(0)
        await watch.changed()
    await watch.refresh()
