"""LoRAs in slots: equal to the merged weights, whoever else is in the batch, and what does not fit goes by hooks."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from pipelines.adapters.layers import Adapter, Mixture
from pipelines.adapters.reading import AdapterFile
from pipelines.adapters.rows import RowAdapters, SlotKey

CPU = torch.device("cpu")


class Model(nn.Module):
    """A layer of each kind that takes adapters, as a UNet calls them: `[rows, 4, 8, 8]` -> `[rows, 3]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.strided = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.pointwise = nn.Conv2d(8, 16, 1)
        self.tokens = nn.Linear(16, 16)
        self.vector = nn.Linear(16, 3, bias=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        hidden = self.pointwise(self.strided(torch.tanh(self.conv(rows))))
        hidden = self.tokens(hidden.flatten(2).transpose(1, 2))
        output: torch.Tensor = self.vector(torch.tanh(hidden).mean(1))
        return output


EVERYWHERE = ("conv", "strided", "pointwise", "tokens", "vector")


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def adapter(model: Model, name: str, rank: int, layers: tuple[str, ...] = EVERYWHERE, size: float = 0.3) -> AdapterFile:
    generator = torch.Generator().manual_seed(ord(name[0]) + rank)
    made = {}
    for layer in layers:
        out, *inner = model.get_submodule(layer).weight.shape
        down = torch.randn(rank, *inner, generator=generator) * size
        up = torch.randn(out, rank, *[1] * (len(inner) - 1), generator=generator) * size
        made[layer] = {"down": down, "up": up, "alpha": torch.tensor(rank * 0.5)}
    return AdapterFile(name, made, {})


def merged(model: Model, rows: torch.Tensor, mixtures: list[Mixture], raw: Mapping[str, AdapterFile]) -> torch.Tensor:
    """Each row by a model of its own, whose weights are changed."""
    outputs = []
    for row, mixture in zip(rows, mixtures, strict=True):
        copy = Model().eval()
        state = dict(model.state_dict())
        for used, weight in mixture:
            for layer, pair in raw[used.name].layers.items():
                change = torch.einsum("or,r...->o...", pair["up"].flatten(1), pair["down"]) * 0.5 * weight
                state[f"{layer}.weight"] = state[f"{layer}.weight"] + change
        copy.load_state_dict(state)
        outputs.append(copy(row[None])[0])
    return torch.stack(outputs)


def fit(adapters: RowAdapters, made: AdapterFile) -> Adapter:
    return adapters.fit(made, CPU, torch.float32)


@pytest.mark.parametrize("buckets", [(32, 64, 128), (8, 16), (4,), ()], ids=str)
@pytest.mark.parametrize("padded", [None, 8])
def test_rows_equal_the_merged_weights(model: Model, buckets: tuple[int, ...], padded: int | None) -> None:
    """With plenty of slots, few, too few and none; in passes over the ranks in use, and over buckets, padded."""
    adapters = RowAdapters(model, buckets)
    raw = {a.name: a for a in (adapter(model, n, r) for n, r in (("a", 2), ("b", 4), ("c", 7)))}
    raw["d"] = adapter(model, "d", 3, ("tokens", "conv"))
    fitted = {name: fit(adapters, made) for name, made in raw.items()}
    chance = random.Random(0)
    for _ in range(30):
        count = chance.randint(1, 8)
        mixtures: list[Mixture] = [
            tuple((fitted[n], chance.uniform(-1, 1)) for n in chance.sample("abcd", chance.choice([0, 0, 1, 1, 2, 4])))
            for _ in range(count)
        ]
        rows = torch.randn(padded or count, 4, 8, 8)
        with torch.inference_mode():
            with adapters.active(mixtures, padded):
                output = model(rows)[:count]
            wanted = merged(model, rows[:count], mixtures, raw)
        torch.testing.assert_close(output, wanted, rtol=1e-5, atol=2e-6)


def test_outside_of_a_pass_the_model_is_untouched(model: Model) -> None:
    rows = torch.randn(2, 4, 8, 8)
    names = list(model.state_dict())
    with torch.inference_mode():
        before = model(rows)
        adapters = RowAdapters(model)
        fitted = fit(adapters, adapter(model, "a", 4))
        with adapters.active([((fitted, 1.0),), ()]):
            assert not torch.equal(model(rows)[0], before[0])
        with adapters.active([(), ()]) as key:
            assert torch.equal(model(rows), before)
        assert torch.equal(model(rows), before)
    assert key == SlotKey(0, 0)
    assert list(model.state_dict()) == names


def test_a_key_says_what_a_graph_reads(model: Model) -> None:
    """Equal for other weights, rows and adapters of the same layers; another for more ranks, layers or slots."""
    adapters = RowAdapters(model, (8, 16))
    small, other = fit(adapters, adapter(model, "a", 3)), fit(adapters, adapter(model, "b", 4))
    few, large = fit(adapters, adapter(model, "c", 1, ("tokens",))), fit(adapters, adapter(model, "d", 12))
    too_large = fit(adapters, adapter(model, "e", 17))

    def key(*mixtures: Mixture) -> SlotKey | None:
        with adapters.active(mixtures, padded=4) as found:
            return found

    first = key(((small, 1.0),))
    assert first is not None
    assert first.ranks == 8
    assert key(((small, 0.5),), ((other, 2.0), (small, 1.0))) == first
    assert key(((few, 1.0),)) != first
    assert key(((small, 1.0),)) == first
    assert key() == SlotKey(0, 0)
    grown = key(((large, 1.0),))
    assert grown is not None
    assert grown.ranks == 16
    assert key(((small, 1.0),)) != first, "the slots have moved"
    assert key(((too_large, 1.0),)) is None
    assert key(((small, 1.0),), ((too_large, 1.0),)) is None


def test_what_a_graph_reads_stays_where_it_is(model: Model) -> None:
    """The same key means the same addresses: of the weights and of every module's factors."""
    adapters = RowAdapters(model, (8,))
    fitted = [fit(adapters, adapter(model, str(i), 3)) for i in range(9)]
    seen: dict[SlotKey, set[tuple[int, ...]]] = {}
    chance = random.Random(1)
    for _ in range(40):
        mixtures: list[Mixture] = [((chance.choice(fitted), 1.0),) for _ in range(chance.randint(1, 2))]
        with adapters.active(mixtures, padded=2) as key:
            assert key is not None
            modules = [model.get_submodule(name) for name in EVERYWHERE]
            factors = [factor for module in modules for factor in module.factors]
            weights = modules[0].current.weights
            seen.setdefault(key, set()).add(tuple(t.data_ptr() for t in (*factors, weights)))
    assert len(seen) == 1
    assert all(len(addresses) == 1 for addresses in seen.values())


def test_an_adapter_that_overflows_reaches_no_neighbour(model: Model) -> None:
    """Zero times infinity is not a number: such an adapter must not share its products."""
    model = model.half()
    adapters = RowAdapters(model)
    sound = adapters.fit(adapter(model, "a", 2), CPU, torch.float16)
    # Finite in half precision, as is what it adds; its product with A is not.
    loud = AdapterFile("b", {"tokens": {"down": torch.full((2, 16), 6e4), "up": torch.full((16, 2), 1e-6)}}, {})
    mad = AdapterFile("c", {"tokens": {"down": torch.full((2, 16), 3e38), "up": torch.full((16, 2), 3e38)}}, {})
    rows = torch.randn(3, 4, 8, 8).half() * 8
    with torch.inference_mode():
        plain = model(rows)
        with adapters.active([(), ((sound, 1.0),), ()]):
            alone = model(rows)
        for made in (loud, mad):
            with adapters.active([(), ((sound, 1.0),), ((adapters.fit(made, CPU, torch.float16), 1.0),)]):
                together = model(rows)
            torch.testing.assert_close(together[0], plain[0], rtol=0, atol=2e-3)
            torch.testing.assert_close(together[1], alone[1], rtol=0, atol=2e-3)


def test_an_adapter_that_is_gone_leaves_its_slots(model: Model) -> None:
    adapters = RowAdapters(model, (8,))
    first = fit(adapters, adapter(model, "a", 8))
    with adapters.active([((first, 1.0),)], padded=1) as key:
        assert key is not None
    with adapters.active([()], padded=1):
        pass
    del first
    second, third = fit(adapters, adapter(model, "b", 4)), fit(adapters, adapter(model, "c", 4))
    with adapters.active([((second, 1.0), (third, 1.0))], padded=1) as key:
        assert key is not None
        assert key.ranks == 8


def test_a_compiled_block_takes_adapters(model: Model) -> None:
    """`torch.compile` takes no notice of hooks that come after it, so everything is there before."""
    adapters = RowAdapters(model)
    raw = {"a": adapter(model, "a", 4), "b": adapter(model, "b", 130, size=0.05)}
    fitted, large = fit(adapters, raw["a"]), fit(adapters, raw["b"])
    compiled = torch.compile(model, backend="eager")
    rows = torch.randn(2, 4, 8, 8)
    everyone: list[list[Mixture]] = [
        [(), ()],
        [((fitted, 1.0),), ()],
        [(), ((large, 1.0),)],
        [(), ((fitted, -0.5),)],
        [(), ()],
    ]
    with torch.inference_mode():
        for mixtures in everyone:
            with adapters.active(mixtures):
                output = compiled(rows)
            torch.testing.assert_close(output, merged(model, rows, mixtures, raw), rtol=1e-5, atol=5e-6)


def test_no_memory_for_more_slots_leaves_those_there_are(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = RowAdapters(model, (4, 8))
    raw = {"a": adapter(model, "a", 4), "b": adapter(model, "b", 4)}
    first, second = fit(adapters, raw["a"]), fit(adapters, raw["b"])
    rows = torch.randn(1, 4, 8, 8)
    with torch.inference_mode():
        with adapters.active([((first, 1.0),)]):
            before = model(rows)

        def full(*_: object, **__: object) -> torch.Tensor:
            raise torch.OutOfMemoryError("no memory")

        with monkeypatch.context() as patched:
            patched.setattr(torch, "zeros", full)
            with pytest.raises(torch.OutOfMemoryError), adapters.active([((first, 1.0), (second, 1.0))]):
                pass
        with adapters.active([((first, 1.0),)]):
            assert torch.equal(model(rows), before)
