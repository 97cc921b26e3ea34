"""The row budget: what is counted without arithmetic is what a real pass holds; free memory is divided by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from config.catalog import ROOT
from pipelines.engine import memory
from pipelines.engine.batching import BatchKey
from pipelines.engine.memory import USABLE, RecoveringBudget, RowBudget, free_bytes, row_bytes
from pipelines.torch_compat import PeakBytes

TINY = ROOT / "models" / "tiny"
SHAPES = {"sd15": BatchKey((4, 32, 32), (77, 32)), "sdxl": BatchKey((4, 32, 32), (77, 96))}
CPU = torch.device("cpu")


def unet(name: str) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(TINY / name, subfolder="unet").eval()


@pytest.mark.parametrize("name", SHAPES)
def test_counting_without_arithmetic_counts_what_a_pass_holds(name: str) -> None:
    model, key = unet(name), SHAPES[name]
    added: Any = None
    if name == "sdxl":
        added = {"text_embeds": torch.zeros(1, 48), "time_ids": torch.zeros(1, 6)}
    sample, context = torch.zeros(1, *key.latent_shape), torch.zeros(1, *key.context_shape)
    with torch.inference_mode(), PeakBytes() as real:
        model(sample, torch.zeros(1), context, added_cond_kwargs=added)
    assert row_bytes(model.config, torch.float32, key) == pytest.approx(real.peak, rel=0.1)


def test_the_peak_is_of_what_lives_together() -> None:
    with PeakBytes() as counted:
        one = torch.zeros(1000)
        two = one + 1
        del one
        three = two + 1
        del two, three
        torch.zeros(500)
    assert counted.peak == 2 * 4000


def test_a_unet_for_inpainting_reads_more_channels_than_its_latents_have() -> None:
    config, key = dict(unet("sd15").config), SHAPES["sd15"]
    more = row_bytes(config | {"in_channels": 9}, torch.float32, key) - row_bytes(config, torch.float32, key)
    assert 0 <= more <= 5 * 32 * 32 * 4


def test_larger_pictures_take_more_and_half_precision_half() -> None:
    config = unet("sd15").config
    small, large = BatchKey((4, 16, 16), (77, 32)), BatchKey((4, 64, 64), (77, 32))
    assert row_bytes(config, torch.float32, large) > 8 * row_bytes(config, torch.float32, small)
    half = row_bytes(config, torch.float16, large)
    assert half == pytest.approx(row_bytes(config, torch.float32, large) / 2, rel=0.15)


def test_the_budget_divides_the_free_memory() -> None:
    config, key = unet("sd15").config, SHAPES["sd15"]
    one = row_bytes(config, torch.float32, key)
    free = 5.5 * one / USABLE
    assert RowBudget(config, torch.float32, CPU, lambda _: int(free))(key) == 5
    assert RowBudget(config, torch.float32, CPU, lambda _: 0)(key) == 1


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_bytes(CPU) > 0
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert free_bytes(CPU) == 600_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(CPU) > 600_000


@pytest.mark.parametrize(
    ("share", "free"), [(1.0, 60 + 10 - 8), (0.25, 20 - 8)], ids=["of the whole card", "of a quarter"]
)
def test_a_process_plans_with_its_share_of_a_card(monkeypatch: pytest.MonkeyPatch, share: float, free: int) -> None:
    """80 bytes of which 60 are free, 10 are reserved by this process, and 8 of those are in use."""
    for name, answer in {
        "mem_get_info": (60, 80),
        "memory_reserved": 10,
        "memory_allocated": 8,
        "get_per_process_memory_fraction": share,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    assert free_bytes(torch.device("cuda")) == free


def test_a_halved_budget_doubles_after_calm_ticks_up_to_the_usual_one() -> None:
    budget = RecoveringBudget(grow_after=3)
    assert budget.limit(16) == 16
    assert budget.halve(9) == 4
    limits = []
    for _ in range(7):
        budget.had_enough(16)
        limits.append(budget.limit(16))
    assert limits == [4, 4, 8, 8, 8, 16, 16]


def test_another_shortage_begins_the_calm_anew_and_one_row_is_the_least() -> None:
    budget = RecoveringBudget(grow_after=2)
    budget.halve(2)
    budget.had_enough(16)
    assert budget.halve(1) == 1
    budget.had_enough(16)
    assert budget.limit(16) == 1
    budget.had_enough(16)
    assert budget.limit(16) == 2
