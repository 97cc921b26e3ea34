"""The stages of what is made out of the base models: ControlNets, the LoRA, the refiner, SSD, turbo."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from training import canny, diffusion, export, pixels, sdxl, smaller
from training.loop import Schedule, train
from training.pool import CaptionBank, Conditions, Pool
from training.workshop import Workshop, load

STEERED = 2000
"""Pictures whose edges a ControlNet learns."""


class Derived(Workshop):
    """Reads what the base models' stages left in the build folder."""

    def stages(self) -> dict[str, Callable[[], None]]:
        """Name -> stage, in order."""
        names = ("canny", "pixel_art", "sdxl_canny", "sdxl_pixel_art", "ssd", "turbo", "refiner", "export_derived")
        return {name: getattr(self, name) for name in names}

    def canny(self) -> None:
        """The canny ControlNet of the SD shape."""
        unet, pool = self._unet("unet"), self._pool(STEERED)
        schedule = Schedule(self._steps(450), 1e-3, average=0.99)
        self._steer("canny", canny.controlnet(unet, 32), unet, pool, self._sd_bank(pool), 512, 12, schedule)

    def sdxl_canny(self) -> None:
        """The canny ControlNet of the SDXL shape, from the SD shape's."""
        unet, pool = self._unet("sdxl-unet"), self._pool(STEERED)
        net = canny.larger(load(ControlNetModel, self._build / "canny"), unet)
        schedule = Schedule(self._steps(150), 5e-4, average=0.97)
        self._steer("sdxl-canny", net, unet, pool, self._sdxl_bank(pool), 1024, 4, schedule)

    def pixel_art(self) -> None:
        """The LoRA of the SD shape."""
        unet, pool = pixels.adapt(self._unet("unet")), self._pool(1500)
        self._pixelate("pixel-art", unet, pool, self._sd_bank(pool), Schedule(self._steps(300), 2e-3, average=0.98))

    def sdxl_pixel_art(self) -> None:
        """The LoRA of the SDXL shape, from the SD shape's."""
        unet = pixels.adapt(self._unet("sdxl-unet"))
        other = pixels.adapt(self._unet("unet"))
        other.load_state_dict(torch.load(self._build / "pixel-art.lora"), strict=False)
        pixels.start_from(unet, other)
        pool = self._pool(1500)
        schedule = Schedule(self._steps(60), 5e-4, average=0.95)
        self._pixelate("sdxl-pixel-art", unet, pool, self._sdxl_bank(pool), schedule)

    def refiner(self) -> None:
        """The refiner, from SSD."""
        _, second = self._sdxl_texts()
        pool = self._pool(5000)
        bank = CaptionBank(smaller.conditions_of_refiner(second, self._tokenizer()), pool.captions)
        average = train(
            "refiner",
            smaller.refiner(self._unet("ssd")).requires_grad_(True).to(self._device, memory_format=torch.channels_last),
            lambda model: smaller.refiner_loss(model, pool, bank, 32),
            Schedule(self._steps(350), 4e-4, average=0.99),
            self._build / "refiner.checkpoint",
        )
        self._save(average, "refiner")

    def ssd(self) -> None:
        """SSD: the SDXL UNet without its depths, taught by it."""
        teacher, pool = self._unet("sdxl-unet"), self._pool(8000)
        bank = self._sdxl_bank(pool)
        average = train(
            "SSD",
            smaller.ssd(teacher).requires_grad_(True).to(self._device, memory_format=torch.channels_last),
            lambda model: smaller.distilled(model, teacher, pool, bank, 32),
            Schedule(self._steps(1200), 8e-4, average=0.995),
            self._build / "ssd.checkpoint",
        )
        self._save(average, "ssd")

    @torch.no_grad()
    def _empty(self) -> Conditions:
        empty: Conditions = sdxl.conditions_of_sdxl(*self._sdxl_texts(), self._tokenizer())([""])
        return empty

    def turbo(self) -> None:
        """Turbo: SSD's shape, four steps without guidance."""
        teacher, pool = self._unet("sdxl-unet"), self._pool(8000)
        bank = self._sdxl_bank(pool)
        student = load(UNet2DConditionModel, self._build / "ssd")
        empty = self._empty()
        average = train(
            "turbo",
            student.to(self._device, memory_format=torch.channels_last),
            lambda model: smaller.guided(model, teacher, pool, bank, empty, 24),
            Schedule(self._steps(350), 3e-4, average=0.99),
            self._build / "turbo.checkpoint",
        )
        self._save(average, "turbo")

    def export_derived(self) -> None:
        """Write what the other stages made to models/."""
        for name, folder in (("refiner", "sdxl-refiner"), ("ssd", "ssd"), ("turbo", "sdxl-turbo")):
            export.write_unet(self._unet(name), folder)
        for name, folder in (("canny", "controlnet-canny-sd15"), ("sdxl-canny", "controlnet-canny-sdxl")):
            export.write_controlnet(load(ControlNetModel, self._build / name), folder)
        for name, folder in (("pixel-art", "lora-pixel-art-sd15"), ("sdxl-pixel-art", "lora-pixel-art-sdxl")):
            export.write_lora(torch.load(self._build / f"{name}.lora"), folder)

    def _steer(
        self,
        name: str,
        net: ControlNetModel,
        unet: nn.Module,
        pool: Pool,
        bank: CaptionBank,
        pixels_wide: int,
        batch: int,
        schedule: Schedule,
    ) -> None:
        maps = canny.edge_maps(self._known(), pool, pixels_wide, self._build / f"edges-{pixels_wide}")
        average = train(
            name,
            net.to(self._device, memory_format=torch.channels_last),
            lambda model: canny.loss_of(model, unet, pool, bank, maps, batch),
            schedule,
            self._build / f"{name}.checkpoint",
        )
        self._save(average, name)

    def _pixelate(
        self, name: str, unet: UNet2DConditionModel, pool: Pool, bank: CaptionBank, schedule: Schedule
    ) -> None:
        pool = pixels.pixelated(self._vae("vae-scaled"), self._known(), pool, self._build / "squares-512")
        average = train(
            name,
            unet,
            lambda model: diffusion.loss_of(model, pool, bank, 32),
            schedule,
            self._build / f"{name}.checkpoint",
        )
        weights: dict[str, Tensor] = {k: v for k, v in average.state_dict().items() if "lora" in k}
        torch.save(weights, self._build / f"{name}.lora")
