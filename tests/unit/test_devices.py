"""Every tensor is on the right device, and a tick asks no more of a device than it did.

On a device that is not there (`tests/support/pretended_cuda.py`): no GPU is needed, and none of its numbers is a time.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from config.catalog import Catalog, ComponentSpec
from pipelines.assembly import load_controlnets, load_engine, load_text_encoders, load_vae
from pipelines.control.nets import ColocatedControl
from pipelines.control_plan import ControlParams
from pipelines.plan import GenerationParams
from pipelines.planning import make_plan
from pipelines.sampling.latents import Latents
from pipelines.sampling.samplers import SAMPLERS
from pipelines.text.conditioning import Conditioning
from pipelines.text2image import Text2Image
from pipelines.weights.files import read_config
from tests.support import published
from tests.support.http import photo
from tests.support.pretended_cuda import PretendedCuda
from tests.support.traffic import Traffic

OF_DIFFUSION_MODELS = [name for name, spec in SAMPLERS.items() if not spec.edm]
SIDE = {"SD1.5": 128, "SD1.5-ControlNet": 128, "SD2": 128}


@pytest.fixture
def cuda() -> Iterator[PretendedCuda]:
    with PretendedCuda() as device:
        yield device


def request(model_name: str, **fields: Any) -> GenerationParams:
    side = SIDE.get(model_name, 256)
    common = {"prompt": "a fox", "width": side, "height": side, "steps": 3, "seed": 1, "sampler": "Euler a"}
    return GenerationParams(model_name=model_name, **common | fields)


IMAGE = {"image": photo(), "strength": 0.6}
MAPS = (
    ControlParams(name="canny", image=photo(), weight=0.5, end=0.5),
    ControlParams(name="depth", image=photo(50, 60), preprocess=False),
    ControlParams(name="depth", image=photo(60, 50), preprocess=False, guess=True),
)
STEERED = {"controlnet_image": photo(), "controlnet_preprocess": False}
LORAS = {"loras": {"Pixel_Art": 0.7}}
BOTH_LORAS = {"loras": {"Pixel_Art": 0.7, "Add_Detail": -0.4}}
WALKS: dict[str, Sequence[GenerationParams]] = {
    "every sampler in one batch": [
        request("SD1.5", sampler=name, seed=seed) for seed, name in enumerate(OF_DIFFUSION_MODELS)
    ],
    "every sampler, from a picture": [
        request("SD1.5", sampler=name, seed=seed, **IMAGE) for seed, name in enumerate(OF_DIFFUSION_MODELS)
    ],
    "SD2": [request("SD2", cfg_scale=1.0), request("SD2", negative_prompt="fog", seed=2)],
    "SDXL and its refiner": [
        request("SDXL1.0-base", enable_refiner=True, steps=6),
        request("SDXL1.0-base", enable_refiner=True, steps=7, sampler="DPM SDE", seed=2, **IMAGE),
    ],
    "SSD": [request("SSD", sampler="Heun")],
    "turbo": [request("SDXL-turbo", cfg_scale=0.0, steps=2, sampler="LCM")],
    "masks, and UNets for inpainting": [
        request("SD1.5", mask_image=photo(), **IMAGE),
        request("SD1.5-inpainting", seed=2),
        request("SDXL-inpainting", mask_image=photo(), enable_refiner=True, steps=6, **IMAGE),
    ],
    "LoRAs and ControlNets of SD1.5 in one batch": [
        request("SD1.5", **BOTH_LORAS),
        request("SD1.5", cfg_scale=1.0),
        request("SD1.5-ControlNet", controlnet_name="canny", controlnet_image=photo()),
        request("SD1.5-ControlNet", controlnet_name="softedge", **STEERED, **LORAS),
        request("SD1.5", controlnets=MAPS),
    ],
    "LoRAs and ControlNets of SDXL in one batch": [
        request("SDXL-ControlNet", controlnet_name="depth", **STEERED),
        request("SDXL1.0-base", **LORAS),
        request("SDXL-ControlNet", controlnet_name="canny", cfg_scale=1.0, **STEERED),
        request("SDXL1.0-base", controlnets=MAPS),
    ],
}


REFUSED: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "operands on two devices": lambda cpu, cuda: cpu + cuda,
    "a product of two devices": lambda cpu, cuda: cuda @ cpu,
    "a scalar of the CPU where it is not pointwise": lambda cpu, cuda: torch.stack([cuda[0, 0], cpu[0, 0]]),
    "parts of two devices": lambda cpu, cuda: torch.cat([cpu, cuda]),
    "a row index on the CPU": lambda cpu, cuda: cuda.index_add(0, torch.tensor([0]), cuda[:1]),
    "an index on the GPU into a tensor on the CPU": lambda cpu, cuda: cpu[torch.tensor([0], device="cuda")],
    "numpy": lambda cpu, cuda: cuda.numpy(),
    "an array of numpy": lambda cpu, cuda: np.asarray(cuda),
    "pickling": lambda cpu, cuda: pickle.dumps(cuda),
    "noise of the device": lambda cpu, cuda: torch.randn(2, device="cuda"),
    "noise like a tensor of the device": lambda cpu, cuda: torch.randn_like(cuda),
    "noise into a tensor of the device": lambda cpu, cuda: cuda.normal_(),
}


@pytest.mark.parametrize("inference", [False, True], ids=["grad", "inference"])
@pytest.mark.parametrize("what", REFUSED)
def test_the_simulated_device_refuses_mixed_devices(cuda: PretendedCuda, what: str, inference: bool) -> None:
    with torch.inference_mode(inference):
        cpu = torch.ones(2, 2)
        with pytest.raises((RuntimeError, TypeError)):
            REFUSED[what](cpu, cpu.to("cuda"))


COUNTED: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], Any], dict[str, int]]] = {
    "an operation": (lambda cpu, cuda: cuda + 1, {"kernel": 1}),
    "one in place": (lambda cpu, cuda: cuda.mul_(2), {"kernel": 1}),
    "with a scalar of the CPU": (lambda cpu, cuda: cuda * cpu[0, 0], {"kernel": 1}),
    "views": (lambda cpu, cuda: cuda[:1].reshape(2).view(2, 1).transpose(0, 1).expand(3, 2).chunk(2), {}),
    "a new tensor": (lambda cpu, cuda: torch.zeros(2, device="cuda"), {"kernel": 1}),
    "a new tensor from the host": (lambda cpu, cuda: torch.tensor([1, 2], device=cuda.device), {"to device": 1}),
    "another format": (lambda cpu, cuda: cuda.to(torch.float16), {"kernel": 1}),
    "the same format": (lambda cpu, cuda: cuda.to("cuda", torch.float32), {}),
    "to the device": (lambda cpu, cuda: cpu.to(cuda), {"to device": 1}),
    "from pinned memory": (lambda cpu, cuda: cpu.pin_memory().to("cuda", non_blocking=True), {"sent": 1}),
    "from pinned memory, waited for": (lambda cpu, cuda: cuda.copy_(cpu.pin_memory()), {"to device": 1}),
    "into a tensor of the device, unawaited": (
        lambda cpu, cuda: cuda.copy_(torch.ones(2, 2, pin_memory=True), non_blocking=True),
        {"sent": 1},
    ),
    "to the host": (lambda cpu, cuda: cuda.cpu(), {"to host": 1}),
    "into a tensor of the device": (lambda cpu, cuda: cuda.copy_(cpu), {"to device": 1}),
    "into a tensor of the host": (lambda cpu, cuda: cpu.copy_(cuda), {"to host": 1}),
    "a list as an index": (lambda cpu, cuda: cuda[[1, 0]], {"to device": 1, "kernel": 1}),
    "a scalar of the device as an index": (lambda cpu, cuda: cpu[torch.zeros((), device="cuda").long()], {"wait": 1}),
    "from a part of pinned memory": (lambda cpu, cuda: cuda[0].copy_(cpu.pin_memory()[1], True), {"sent": 1}),
    "from other memory, without a wait": (lambda cpu, cuda: cpu.to("cuda", non_blocking=True), {"to device": 1}),
    "into pinned memory": (
        lambda cpu, cuda: torch.empty(2, 2, pin_memory=True).copy_(cuda, non_blocking=True),
        {"fetched": 1},
    ),
    "an event that is waited for": (lambda cpu, cuda: torch.cuda.Event().synchronize(), {"wait": 1}),
    "a value": (lambda cpu, cuda: float(cuda[0, 0]), {"wait": 1}),
    "a condition": (lambda cpu, cuda: bool((cuda > 0).all()), {"wait": 1, "kernel": 2}),
    "positions": (lambda cpu, cuda: cuda.nonzero(), {"wait": 1}),
}


@pytest.mark.parametrize("inference", [False, True], ids=["grad", "inference"])
@pytest.mark.parametrize("what", COUNTED)
def test_the_device_counts(cuda: PretendedCuda, what: str, inference: bool) -> None:
    work, expected = COUNTED[what]
    with torch.inference_mode(inference):
        cpu = torch.ones(2, 2)
        on_device = cpu.to("cuda")
        with cuda.counting() as traffic:
            work(cpu, on_device)
    counts = dict(traffic.counts())
    if what == "a scalar of the device as an index":
        counts.pop("kernel")  # making the scalar
    assert counts == expected
    assert all(event.site.startswith("tests/unit/test_devices.py:") for event in traffic.events)


def test_what_is_on_the_device_is_another_memory(cuda: PretendedCuda) -> None:
    cpu = torch.zeros(2)
    there = cpu.to("cuda")
    view, back = there[:1], there.cpu()
    there.add_(1)
    assert (cpu.tolist(), back.tolist(), view.tolist()) == ([0, 0], [0, 0], [1])
    module = torch.nn.Linear(2, 2).to("cuda")
    with torch.inference_mode():
        assert module.weight.device == module(there).device == torch.device("cuda:0")


def test_what_comes_by_itself_is_there_when_it_was_waited_for(cuda: PretendedCuda) -> None:
    there = torch.ones(2).to("cuda")
    first, second = (torch.empty(2, pin_memory=True).copy_(there * n, non_blocking=True) for n in (1, 2))
    event = torch.cuda.Event()
    event.record()
    later = torch.empty(2, pin_memory=True).copy_(there, non_blocking=True)
    assert not event.query()
    assert first.isnan().all()
    event.synchronize()
    assert event.query()
    assert (first.tolist(), second.tolist()) == ([1, 1], [2, 2])
    assert later.isnan().all()


def test_a_bundle_of_the_device_travels_as_numpy(cuda: PretendedCuda) -> None:
    travelled = pickle.loads(pickle.dumps(Conditioning(torch.ones(1, 2, 2, device="cuda"))))
    assert travelled.prompt_embeds.device.type == "cpu"
    assert torch.equal(travelled.prompt_embeds, torch.ones(1, 2, 2))


@pytest.mark.parametrize("walk", WALKS)
def test_pictures_are_the_cpus(inpainting_catalog: Catalog, walk: str) -> None:
    expected = [np.asarray(p.image) for p in Text2Image(inpainting_catalog).generate_many(WALKS[walk])]
    with PretendedCuda():
        drawn = [np.asarray(p.image) for p in Text2Image(inpainting_catalog, device="cuda").generate_many(WALKS[walk])]
    for params, ours, theirs in zip(WALKS[walk], drawn, expected, strict=True):
        assert theirs.std() > 1, "a flat picture proves nothing"
        assert np.abs(ours.astype(int) - theirs).max() <= 1, params  # where a tensor lies changes a product's last bit


def test_pictures_leave_the_vae_without_a_wait(catalog: Catalog) -> None:
    """Queued by one thread, waited for by another."""
    with PretendedCuda() as cuda:
        vae = load_vae(catalog, "vae-sd15", "cuda")
        with cuda.counting() as queueing:
            encoding = vae.begin_encoding(Image.effect_noise((128, 128), 60).convert("RGB"), seed=1)
        latents = encoding.result()
        with cuda.counting() as more:
            decoding, preview = vae.begin_decoding(latents), vae.begin_preview(latents)
        queueing.events += more.events
        for kind in ("wait", "to host", "to device"):
            assert not queueing.counts()[kind], queueing.told(kind)
        assert (decoding.result().size, preview.result().size) == ((128, 128), (128, 128))
    assert latents.values.device.type == "cpu"


class Budget(NamedTuple):
    """What four ticks may ask of the device outside the networks, from the fourth tick of a job on."""

    kernels: int
    to_device: int = 0
    """Copies from pageable memory: the host waits for each."""
    to_host: int = 0
    waits: int = 0
    """Where the host must see a result, after everything that is queued."""


A_TICK = Budget(4 * 5)
"""Whatever the samplers, however many jobs: inputs and outputs side by side, both formats, one product."""
DEFAULT = "DPM++ 2M SDE Heun Karras"
TWO_MAPS = tuple(ControlParams(name=name, image=photo(), weight=0.5, preprocess=False) for name in ("canny", "depth"))
TWO_MODES = {"model_name": "SDXL1.0-base", "controlnets": TWO_MAPS}
CANNY = {"model_name": "SDXL-ControlNet", "controlnet_name": "canny", "controlnet_image": photo()}
MASKED = {"image": photo(), "mask_image": photo(), "strength": 0.9}
"""Of the ticker only their presence counts: latents and mask are its own."""
# The numbers of what is added to a tick may only go down.
OF_A_TICK: dict[str, tuple[list[dict[str, Any]], Budget]] = {
    "one row": ([{"sampler": "Euler", "cfg_scale": 1.0}], A_TICK),
    "eight pictures": ([{"sampler": DEFAULT}] * 8, A_TICK),
    "every sampler in one tick": ([{"sampler": name} for name in OF_DIFFUSION_MODELS], A_TICK),
    "a LoRA on 66 layers": ([{"sampler": "Euler"} | LORAS], Budget(812)),
    "four rows of two LoRAs": ([{"sampler": "Euler"} | LORAS, {"sampler": "Euler"} | BOTH_LORAS], Budget(812)),
    "a ControlNet": ([{"sampler": "Euler"} | CANNY], Budget(32)),
    "two modes of a union ControlNet": ([{"sampler": "Euler"} | TWO_MODES], Budget(64)),
    "a mask": ([{"sampler": DEFAULT} | MASKED], Budget(4 * 6)),
    "masks of every sampler, and a job without": (
        [{"sampler": name} | MASKED for name in OF_DIFFUSION_MODELS] + [{"sampler": DEFAULT}],
        Budget(4 * 7),
    ),
}


def published_scheduler(spec: ComponentSpec, *parts: str) -> Any:
    """The tiny model's configurations, but for its scheduler's, which clips: the hub's does not."""
    return published.SCHEDULERS["SDXL"] if parts else read_config(spec)


class Ticker:
    """SDXL in half precision on the device, its ControlNet in the same process."""

    def __init__(self, catalog: Catalog, unet: str = "unet-sdxl-base") -> None:
        data = catalog.model_dump()
        for component in data["components"]:
            component["dtype"] = "float16"
        self._catalog = Catalog.model_validate(data)
        with PretendedCuda():
            self._nets = load_controlnets(self._catalog, ["controlnet-sdxl-union"], "cuda")
            control = ColocatedControl(self._nets)
            with patch("pipelines.assembly.read_config", published_scheduler):
                self._engine = load_engine(self._catalog, unet, "cuda", max_rows=64, control=control)
            self._texts = load_text_encoders(self._catalog, "text-encoder-sdxl", "cuda")

    def four_ticks(self, jobs: Sequence[dict[str, Any]]) -> Traffic:
        """What they asked of the device, after three ticks that are not counted."""
        with PretendedCuda() as cuda:
            for number, fields in enumerate(jobs):
                self._add(str(number), request(**{"model_name": "SDXL1.0-base", "steps": 20, "seed": number} | fields))
            try:
                for _ in range(3):
                    self._tick()
                with cuda.counting() as traffic:
                    for _ in range(4):
                        self._tick()
            finally:
                self._engine.clear()
        return traffic

    def _add(self, name: str, params: GenerationParams) -> None:
        stage = make_plan(params, self._catalog).stages[0]
        hints = self._nets.prepare([control.image for control in params.controls], stage)
        begin = None
        if stage.inpaint is not None:
            shape = (1, 4, params.height // 32, params.width // 32)
            mask = torch.zeros(1, 1, *shape[2:])
            mask[..., 1:] = 1
            begin = Latents(torch.ones(shape), mask=mask, masked=torch.ones(shape) if stage.reads_mask else None)
        self._engine.add(self._engine.prepare(name, stage, self._texts.encode(stage), begin, hints))

    def _tick(self) -> None:
        report = self._engine.tick()
        if report.failed:
            raise report.failed[0][1]


@pytest.fixture(scope="module")
def ticker(catalog: Catalog) -> Ticker:
    return Ticker(catalog)


def test_a_unet_for_inpainting_reads_its_mask_for_nothing(inpainting_catalog: Catalog) -> None:
    ticker = Ticker(inpainting_catalog, "unet-sdxl-inpainting")
    jobs = [{"model_name": "SDXL-inpainting", "sampler": name} | MASKED for name in ("Euler a", "Heun", DEFAULT)]
    assert_within(ticker.four_ticks(jobs), A_TICK)


def assert_within(traffic: Traffic, budget: Budget) -> None:
    counts = traffic.counts()
    spent = Budget(counts["kernel"], counts["to device"], counts["to host"], counts["wait"])
    over = [name for name, most in budget._asdict().items() if getattr(spent, name) > most]
    assert not over, f"{spent} is over {budget}:\n{traffic.told('kernel', 'to device', 'to host', 'wait')}"


@pytest.mark.parametrize("sampler", OF_DIFFUSION_MODELS)
def test_a_sampler_keeps_to_its_budget(ticker: Ticker, sampler: str) -> None:
    assert_within(ticker.four_ticks([{"sampler": sampler}]), A_TICK)


def test_a_lora_is_loaded_by_one_copy_that_nothing_waits_for(catalog: Catalog) -> None:
    with PretendedCuda() as cuda:
        engine = load_engine(catalog, "unet-sdxl-base", "cuda")
        stage = make_plan(request("SDXL1.0-base", **LORAS), catalog).stages[0]
        with cuda.counting() as traffic:
            engine.loras.mixture(stage)
    assert traffic.counts() == {"sent": 1}


@pytest.mark.parametrize("case", OF_A_TICK)
def test_a_shared_or_an_adapted_tick_keeps_to_its_budget(ticker: Ticker, case: str) -> None:
    jobs, budget = OF_A_TICK[case]
    assert_within(ticker.four_ticks(jobs), budget)
