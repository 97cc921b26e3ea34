"""How a replica's process is set up: the device by what Ray gave it, the memory by its share of the card."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from deployments.replicas import base
from deployments.replicas.base import Runtime


@pytest.mark.parametrize(
    ("wanted", "share", "visible", "device", "fraction"),
    [
        ("auto", 0.0, True, "cpu", None),  # Ray leaves GPUs visible to actors that asked for none
        ("auto", 0.25, True, "cuda", 0.25),
        ("auto", 1.0, True, "cuda", None),
        ("auto", 2.0, True, "cuda", None),
        ("auto", 0.5, False, "cpu", None),  # a torch without CUDA, or a card that only Ray believes in
        ("cpu", 0.5, True, "cpu", None),
        ("cuda", 0.0, True, "cuda", None),  # an operator's word
        ("cuda", 0.5, True, "cuda", 0.5),
    ],
)
def test_the_device_is_what_ray_gave_and_the_memory_its_share(
    monkeypatch: pytest.MonkeyPatch,
    wanted: Literal["auto", "cpu", "cuda"],
    share: float,
    visible: bool,
    device: str,
    fraction: float | None,
) -> None:
    fractions: list[float] = []
    monkeypatch.setattr(base, "gpu_share", lambda: share)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    assert Runtime(device=wanted, torch_threads=1).apply() == device
    assert fractions == ([] if fraction is None else [fraction])


def test_outside_ray_no_process_was_given_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Runtime(torch_threads=1).apply() == "cpu"
