"""UNets of the published configurations with random weights, engines over them, and jobs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from benchmarks.gpu.facts import Facts
from config.catalog import ARCHITECTURES, ROOT, Catalog
from pipelines.acceleration import Acceleration
from pipelines.adapters.layers import Mixture
from pipelines.adapters.reading import AdapterFile
from pipelines.adapters.store import LoraStore
from pipelines.backends.base import StepBatch
from pipelines.backends.torch_backend import TorchDenoiser
from pipelines.control.annotators import Annotators
from pipelines.control.nets import ColocatedControl, ControlNets
from pipelines.control.types import ControlHint
from pipelines.control_plan import ControlUse
from pipelines.engine.batching import BatchKey
from pipelines.engine.curve import trial_batch
from pipelines.engine.engine import StepEngine
from pipelines.families import FAMILIES
from pipelines.plan import LoraUse, ScheduleSlice, StagePlan, TextPlan
from pipelines.recordings import Capturer
from pipelines.sampling.latents import LatentSpace
from pipelines.text.conditioning import Conditioning

SPACE = LatentSpace(channels=4, downscale=8, scale=0.18)
STEPS = 200
"""Of a job: more than any measurement takes."""
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
    "num_train_timesteps": 1000,
}
"""As the hub's SD1.5 and SDXL have it."""


@dataclass(frozen=True)
class Case:
    """One model at one size of picture."""

    facts: Facts
    name: str
    """`sd15` or `sdxl`."""

    @cached_property
    def config(self) -> dict[str, Any]:
        """The UNet's; of the tests' tiny model in a rehearsal."""
        folder = ROOT / "models" / "tiny" if self.facts.dry else ARCHITECTURES
        config: dict[str, Any] = json.loads((folder / self.name / "unet" / "config.json").read_text())
        return config

    @property
    def side(self) -> int:
        """Pixels."""
        return 128 if self.facts.dry else {"sd15": 512, "sdxl": 1024}[self.name]

    @property
    def pooled(self) -> int:
        """Width of SDXL's pooled embeddings; 0 for SD."""
        if self.name == "sd15":
            return 0
        return int(self.config["projection_class_embeddings_input_dim"]) - 6 * int(
            self.config["addition_time_embed_dim"]
        )

    def unet(self) -> UNet2DConditionModel:
        """A new one, with the same weights each time."""
        torch.manual_seed(0)
        with self.facts.device:
            unet = UNet2DConditionModel.from_config(self.config)
        return unet.to(self.facts.dtype).eval().requires_grad_(False)

    def batch(self, denoiser: TorchDenoiser, rows: int) -> StepBatch:
        """Rows as jobs bring them."""
        latents, context = (4, self.side // 8, self.side // 8), (77, self.config["cross_attention_dim"])
        return trial_batch(denoiser, BatchKey(latents, context), self.pooled, rows)

    def engine(self, denoiser: TorchDenoiser) -> StepEngine:
        """Without a catalog: jobs are given their LoRAs."""
        family = FAMILIES["sdxl" if self.pooled else "sd"]
        return StepEngine(denoiser, family, SCHEDULER, SPACE, LoraStore(_no_files), max_rows=16)

    def fill(
        self, engine: StepEngine, samplers: Sequence[str], loras: Mixture = (), hints: Sequence[ControlHint] = ()
    ) -> None:
        """Replace the engine's jobs: one for each sampler, guided; all with these LoRAs, each with its hint."""
        engine.clear()
        text = TextPlan(encoders=(0,), prompts=("",), negative_prompts=("",))
        for number, sampler in enumerate(samplers):
            stage = StagePlan(
                component="unet",
                backend="torch",
                sampler=sampler,
                schedule=ScheduleSlice(steps=STEPS if sampler != "LCM" else 50),
                guidance_scale=5.0,
                text=text,
                width=self.side,
                height=self.side,
                seed=number,
            )
            generator = torch.Generator().manual_seed(number)
            embeds = torch.randn(2, 77, self.config["cross_attention_dim"], generator=generator)
            pooled = torch.randn(2, self.pooled, generator=generator) if self.pooled else None
            own = hints[number : number + 1]
            steered = tuple(ControlUse(name="canny", component=h.component, mode=h.mode, preprocess=False) for h in own)
            stage = stage.model_copy(update={"controls": steered})
            job = engine.prepare(str(number), stage, Conditioning(embeds, pooled), None, own)
            job.loras = loras
            engine.add(job)

    def lora(self, unet: UNet2DConditionModel, denoiser: TorchDenoiser, rank: int, attention_only: bool) -> Mixture:
        """One LoRA of small random numbers, in use."""
        generator = torch.Generator().manual_seed(1)
        layers = {}
        for name, module in unet.named_modules():
            if attention_only and not name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
                continue
            if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                continue
            weight = module.weight
            ones = [1] * (weight.ndim - 2)
            layers[name] = {
                "down": torch.randn(rank, *weight.shape[1:], generator=generator) * 0.01,
                "up": torch.randn(weight.shape[0], rank, *ones, generator=generator) * 0.01,
                "alpha": torch.tensor(float(rank)),
            }
        file = AdapterFile("random", layers, {})
        return ((denoiser.adapters.fit(file, denoiser.device, denoiser.dtype), 0.7),)

    def control(self, unet: UNet2DConditionModel, capturer: Capturer | None) -> ColocatedControl:
        """A ControlNet made of the UNet, beside it."""
        annotators = Annotators(Catalog.load("tiny"), self.facts.device.type)
        net = ControlNetModel.from_unet(unet).to(self.facts.device, self.facts.dtype)
        return ColocatedControl(ControlNets({"net": net}, annotators, capturer))

    def hints(self, count: int) -> list[ControlHint]:
        """Control maps of noise."""
        return [
            ControlHint(f"{self.name}-{number}", "net", None, torch.rand(1, 3, self.side, self.side))
            for number in range(count)
        ]


def denoiser_of(
    unet: UNet2DConditionModel, capturer: Capturer | None = None, acceleration: Acceleration | None = None
) -> TorchDenoiser:
    """The UNet as the graph runs it."""
    return TorchDenoiser(unet, capturer=capturer, acceleration=acceleration)


def _no_files(use: LoraUse, base: str) -> Any:
    raise LookupError(f"LoRA {use.name}: there are no files here")
