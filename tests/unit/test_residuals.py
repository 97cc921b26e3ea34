"""Residuals: which rows they reach, how several of a row are summed, and how they cross between processes."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, ControlNetUnionModel, MultiControlNetModel

from config.catalog import ROOT, Catalog
from pipelines.control.annotators import Annotators
from pipelines.control.buffers import ResidualBuffers, spread
from pipelines.control.nets import ControlNets
from pipelines.control.residuals import PackedResiduals, Residuals
from pipelines.control.rows import Run, runs_of, take_rows
from pipelines.control.types import ControlBatch, ControlHint, HintUse
from tests.support.fake_capturer import FakeCapturer
from tests.support.pretended_cuda import PretendedCuda

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("rows", "weights", "expected"),
    [
        ([], None, []),
        ([3], None, [Run(3, 0, 1)]),
        ([0, 1, 2], None, [Run(0, 0, 3)]),
        ([0, 1, 4, 5, 7], None, [Run(0, 0, 2), Run(4, 2, 2), Run(7, 4, 1)]),
        ([2, 2], None, [Run(2, 0, 1), Run(2, 1, 1)]),
        ([0, 1, 2], [1.0, 1.0, 0.5], [Run(0, 0, 2), Run(2, 2, 1)]),
    ],
)
def test_rows_in_runs(rows: list[int], weights: list[float] | None, expected: list[Run]) -> None:
    assert list(runs_of(rows, weights)) == expected


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [1, 2], [0, 3], [2, 2, 0]])
def test_rows_are_taken_as_an_index_takes_them(rows: list[int]) -> None:
    whole = torch.randn(4, 3)
    assert torch.equal(take_rows(whole, rows), whole[rows])


def test_buffers_hold_what_was_written_last_and_zero_elsewhere() -> None:
    first, second = ([torch.randn(2, 3, side, side) for side in (4, 2)] for _ in range(2))
    buffers = ResidualBuffers([torch.empty(4, 3, side, side) for side in (4, 2)])
    addresses = [tensor.data_ptr() for tensor in buffers.tensors]
    for residuals, rows in ((first, (0, 1)), (second, (1, 3))):
        buffers.write(residuals, rows)
        for tensor, residual in zip(buffers.tensors, residuals, strict=True):
            assert torch.equal(tensor[list(rows)], residual)
            others = [row for row in range(4) if row not in rows]
            assert not tensor[others].any()
    assert [tensor.data_ptr() for tensor in buffers.tensors] == addresses


def test_residuals_of_all_rows_are_not_copied() -> None:
    residuals = [torch.randn(2, 3, 4, 4)]
    assert spread(residuals, (0, 1), 2)[0] is residuals[0]
    assert torch.equal(spread(residuals, (0, 2), 3)[0][[0, 2]], residuals[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_residuals_cross_an_edge_in_one_array(dtype: torch.dtype) -> None:
    tensors = tuple(torch.randn(2, 3, side, side).to(dtype) for side in (4, 2))
    packed = Residuals(tensors).sent_to_host().wait()
    travelled: PackedResiduals = pickle.loads(pickle.dumps(packed))
    travelled.flat.flags.writeable = False  # as Ray hands it out
    for back, sent in zip(travelled.on(CPU, dtype), tensors, strict=True):
        assert torch.equal(back, sent)


def test_a_batch_crosses_an_edge_as_numpy() -> None:
    hint = ControlHint("map", "net", None, torch.zeros(1, 3, 8, 8))
    batch = ControlBatch(((HintUse(hint.ref, 0.5),),), torch.randn(1, 4, 1, 1), torch.ones(1), torch.randn(1, 7, 8))
    travelled = pickle.loads(pickle.dumps(batch.sent_to_host().wait()))
    assert travelled.uses == batch.uses
    assert travelled.text_embeds is None
    assert torch.equal(travelled.sample, batch.sample)
    assert torch.equal(travelled.prompt_embeds, batch.prompt_embeds)


def load(name: str) -> ControlNetModel:
    return ControlNetModel.from_pretrained(ROOT / f"models/tiny/controlnet-sd15-{name}").eval()


@pytest.fixture(scope="module")
def nets(catalog: Catalog) -> ControlNets:
    return ControlNets({name: load(name) for name in ("canny", "soft")}, Annotators(catalog, "cpu"))


def asked(uses: Sequence[Sequence[HintUse]]) -> ControlBatch:
    generator, rows = torch.Generator().manual_seed(0), len(uses)
    sample = torch.randn(rows, 4, 16, 16, generator=generator)
    context = torch.randn(rows, 77, 32, generator=generator)
    return ControlBatch(tuple(tuple(row) for row in uses), sample, torch.full((rows,), 300.0), context)


def hints(*components: str) -> dict[str, ControlHint]:
    generator = torch.Generator().manual_seed(3)
    images = ((c, torch.rand(1, 3, 128, 128, generator=generator)) for c in components)
    return {f"map {i}": ControlHint(f"map {i}", c, None, image) for i, (c, image) in enumerate(images)}


def test_several_maps_of_a_row_are_summed_with_their_weights(nets: ControlNets) -> None:
    """As diffusers' MultiControlNetModel sums them."""
    maps = hints("canny", "soft", "canny")
    one, two, three = (hint.ref for hint in maps.values())
    batch = asked(
        [
            [HintUse(one)],
            [HintUse(one, 0.5), HintUse(two, 2.0)],
            [HintUse(two), HintUse(three, -0.25), HintUse(one)],
        ]
    )
    together = nets.residuals(batch, maps).tensors
    for row, uses in enumerate(batch.uses):
        oracle = MultiControlNetModel([load(use.hint.component) for use in uses])
        with torch.inference_mode():
            down, mid = oracle(
                batch.sample[row : row + 1],
                batch.timesteps[:1],
                batch.prompt_embeds[row : row + 1],
                [maps[use.hint.id].image for use in uses],
                [use.weight for use in uses],
                return_dict=False,
            )
        for ours, expected in zip(together, (*down, mid), strict=True):
            assert (ours[row] - expected[0]).norm() < 1e-5 * expected.norm()


def test_inside_a_process_residuals_never_leave_the_device() -> None:
    with PretendedCuda() as cuda:
        tensors = tuple(torch.ones(2, 3, side, side, device="cuda") for side in (4, 2))
        with cuda.counting() as traffic:
            given = Residuals(tensors).on(torch.device("cuda:0"), torch.float32)
            spread(given, (0, 2), 3)
        counts = traffic.counts()
    assert all(a is b for a, b in zip(given, tensors, strict=True))
    assert (counts["to host"], counts["to device"], counts["wait"]) == (0, 0, 0)


def test_between_processes_copies_are_queued_and_waited_for_elsewhere() -> None:
    """What the model's thread does is free of waits; `wait` is called on another one."""
    hint = ControlHint("map", "net", None, torch.zeros(1, 3, 8, 8))
    with PretendedCuda() as cuda:
        sample, timesteps, embeds = (torch.ones(shape).to("cuda") for shape in ((1, 4, 2, 2), (1,), (1, 7, 8)))
        residuals = Residuals((sample, embeds))
        with cuda.counting() as traffic:
            batch = ControlBatch(((HintUse(hint.ref),),), sample, timesteps, embeds).sent_to_host()
            packed = residuals.sent_to_host()
        assert dict(traffic.counts()) == {"fetched": 4, "kernel": 1}
        arrived = pickle.loads(pickle.dumps(batch.wait()))
        assert torch.equal(arrived.prompt_embeds, torch.ones(1, 7, 8))
        given = packed.wait()
        with cuda.counting() as traffic:
            back = given.on(torch.device("cuda:0"), torch.float32)
        assert dict(traffic.counts()) == {"sent": 1}
        assert torch.equal(back[0].cpu(), torch.ones(1, 4, 2, 2))


def test_an_array_of_the_host_is_not_kept() -> None:
    flat = np.arange(8, dtype=np.float32)
    packed = PackedResiduals(flat, ((2, 4),))
    (tensor,) = packed.on(CPU, torch.float32)
    flat[:] = 0
    assert tensor.flatten().tolist() == list(range(8))


def rows_of(batch: ControlBatch, rows: slice) -> ControlBatch:
    given = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return ControlBatch(**{name: value[rows] if value is not None else None for name, value in given.items()})


@pytest.mark.parametrize("recorded", [False, True])
def test_pictures_of_a_union_controlnet_do_not_see_each_other(catalog: Catalog, recorded: bool) -> None:
    """Its attention goes over the rows of a batch: neither rows of other pictures nor padding rows change a picture."""
    union = ControlNetUnionModel.from_pretrained(ROOT / "models/tiny/controlnet-sdxl-union")
    nets = ControlNets({"net": union}, Annotators(catalog, "cpu"), FakeCapturer() if recorded else None)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    modes = {"a": 3, "b": 1, "c": 3, "d": 1}
    maps = {name: ControlHint(name, "net", mode, noise(1, 3, 256, 256)) for name, mode in modes.items()}
    one, other = (HintUse(maps["a"].ref),), (HintUse(maps["c"].ref),)
    two, others = ((HintUse(maps[a].ref, 0.5), HintUse(maps[b].ref, 1.5)) for a, b in ("ab", "cd"))
    for uses in ((one, one, other), (two, two, others)):
        sample, timesteps = noise(3, 4, 8, 8), torch.tensor([300.0, 300.0, 700.0])
        batch = ControlBatch(uses, sample, timesteps, noise(3, 77, 96), noise(3, 48), torch.ones(3, 6))
        for _ in range(4):
            together = [part.clone() for part in nets.residuals(batch, maps).tensors]
        for rows in (slice(0, 2), slice(2, 3)):
            alone = nets.residuals(rows_of(batch, rows), maps).tensors
            for ours, expected in zip(together, alone, strict=True):
                assert (ours[rows] - expected).norm() < 1e-5 * expected.norm()
    assert bool(nets.captured) == recorded
