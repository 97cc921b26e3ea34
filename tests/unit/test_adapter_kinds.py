"""Adapters of every kind on a small model: on a GPU, in rows that do not stand together, and beside each other."""

from __future__ import annotations

import math

import pytest
import torch

from pipelines.adapters.layers import Mixture
from pipelines.adapters.reading import AdapterFile
from pipelines.adapters.rows import RowAdapters
from tests.support.pretended_cuda import PretendedCuda
from tests.unit.test_lora_slots import Model

TOKENS = {  # of a linear layer, 16 x 16
    "LoRA": {"down": (4, 16), "up": (16, 4)},
    "LoRA with biases": {"down": (4, 16), "up": (16, 4), "up_bias": (16,), "diff_b": (16,)},
    "DoRA": {"down": (4, 16), "up": (16, 4), "magnitude": (16,)},
    "DoRA of inputs": {"down": (4, 16), "up": (16, 4), "dora_scale": (1, 16)},
    "LoHa": {"hada_w1_a": (16, 9), "hada_w1_b": (9, 16), "hada_w2_a": (16, 9), "hada_w2_b": (9, 16)},
    "LoKr": {"lokr_w1": (4, 4), "lokr_w2": (4, 4)},
    "GLoRA": {"a1": (16, 2), "a2": (2, 16), "b1": (16, 2), "b2": (2, 16)},
    "OFT": {"oft_blocks": (4, 4, 4), "rescale": (16, 1)},
    "BOFT": {"oft_blocks": (2, 4, 4, 4)},
    "IA3": {"weight": (16,), "on_input": ()},
    "difference": {"diff": (16, 16)},
}
CONVOLUTION = {  # 4 -> 8, 3 x 3
    "LoRA": {"down": (2, 4, 3, 3), "up": (8, 2, 1, 1)},
    "DoRA": {"down": (2, 4, 3, 3), "up": (8, 2, 1, 1), "dora_scale": (8, 1, 1, 1)},
    "LoHa": {"hada_w1_a": (8, 9), "hada_w1_b": (9, 36), "hada_w2_a": (8, 9), "hada_w2_b": (9, 36)},
    "LoKr": {"lokr_w1": (2, 2), "lokr_w2": (4, 2, 3, 3)},
    "OFT": {"oft_blocks": (2, 4, 4)},
    "IA3": {"weight": (1, 8, 1, 1), "on_input": ()},
}


def file(kind: str) -> AdapterFile:
    generator = torch.Generator().manual_seed(sorted(TOKENS).index(kind))

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.2 if shape else torch.tensor(0.0)

    layers = {"tokens": {key: random(shape) for key, shape in TOKENS[kind].items()}}
    if kind in CONVOLUTION:
        layers["conv"] = {key: random(shape) for key, shape in CONVOLUTION[kind].items()}
    for parameters in layers.values():
        for key in {"dora_scale", "magnitude", "rescale"} & set(parameters):
            parameters[key] += 1
    return AdapterFile(kind, layers, {})


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def drawn(model: Model, rows: torch.Tensor, kinds: list[tuple[str, ...]], device: str) -> torch.Tensor:
    """What the model makes of rows with adapters of these kinds, on the CPU."""
    adapters = RowAdapters(model)
    here = torch.device(device)
    fitted = {kind: adapters.fit(file(kind), here, torch.float32) for own in kinds for kind in own}
    mixtures: list[Mixture] = [tuple((fitted[kind], 0.7) for kind in own) for own in kinds]
    with torch.inference_mode(), adapters.active(mixtures):
        output: torch.Tensor = model(rows.to(here)).to("cpu")
    return output


@pytest.mark.parametrize("kind", TOKENS)
def test_a_row_is_the_same_alone_and_among_others(model: Model, kind: str) -> None:
    """Rows of one mixture that stand together and apart, between rows of every other kind."""
    rows = torch.randn(1, 4, 8, 8).expand(4 + len(TOKENS), -1, -1, -1).contiguous()
    alone = drawn(model, rows[:1], [(kind,)], "cpu")
    others = [(other,) for other in TOKENS if other != kind]
    crowd = [(kind,), (kind,), *others, (), (kind, "difference"), (kind,)]
    together = drawn(model, rows, crowd, "cpu")
    for place in (0, 1, len(crowd) - 1):
        torch.testing.assert_close(together[place], alone[0], rtol=1e-5, atol=2e-6)
    assert (alone - drawn(model, rows[:1], [()], "cpu")).abs().max() > 1e-3
    assert math.isfinite(float(together.sum()))


@pytest.mark.parametrize("kind", TOKENS)
def test_a_kind_on_a_gpu(kind: str, model: Model) -> None:
    """On a device that is not there, which refuses what CUDA refuses: equal to the CPU."""
    rows = torch.randn(4, 4, 8, 8)
    mixtures: list[tuple[str, ...]] = [(kind,), (), (kind,), ("LoRA", kind) if kind != "LoRA" else ("DoRA", kind)]
    wanted = drawn(model, rows, mixtures, "cpu")
    with PretendedCuda():
        torch.testing.assert_close(drawn(model.to("cuda"), rows, mixtures, "cuda"), wanted, rtol=1e-6, atol=1e-6)
