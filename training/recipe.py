"""The stages of training, in order; each one's result is a folder under build/training that the next ones read.

    python -m training.recipe [--size smoke|cpu|gpu] [--warm] [stage ...]

Every stage goes on from its checkpoint and is skipped when its result is there. `cpu` is what the weights in models/
were made with on two cores; `gpu` takes eight times as many steps; `smoke` only proves that the recipe runs.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel

from training import autoencoder, checkpoint, decoder, diffusion, export, judge, sdxl, text
from training.data import BUILD, load_sprites
from training.derived import Derived
from training.loop import Schedule, train
from training.pool import encode_pool
from training.workshop import Workshop, load

SIZES = {"smoke": 0.005, "cpu": 1.0, "gpu": 8.0}


class Models(Workshop):
    """The stages of the two base models."""

    def stages(self) -> dict[str, Callable[[], None]]:
        """Name -> stage, in order."""
        names = ("autoencoder", "text", "pool", "unet", "decoder", "judge", "sdxl_autoencoder", "sdxl_unet", "export")
        return {name: getattr(self, name) for name in names}

    def autoencoder(self) -> None:
        """The autoencoder of the SD shape, downscale 32."""
        everything = load_sprites().everything()
        vae = autoencoder.build(32, 512).to(self._device, memory_format=torch.channels_last)
        average = train(
            "autoencoder",
            vae,
            lambda model: autoencoder.loss_of(model, everything, 128, 8),
            Schedule(self._steps(1600), 5e-4, average=0.995),
            self._build / "autoencoder.checkpoint",
            self._psnr(512),
        )
        self._save(average, "autoencoder")

    def text(self) -> None:
        """The tokenizer and the text tower."""
        templates = text.style_templates()
        if (kept := self._build / "text-warm").exists():
            tokenizer, tower = self._tokenizer(), load(CLIPTextModel, kept)
            before = load(CLIPTextModel, kept).eval().requires_grad_(False).to(self._device)
        else:
            before = None
            tokenizer = text.build_tokenizer(load_sprites().names)
            tokenizer.save_pretrained(self._build / "tokenizer")
            tower = CLIPTextModel(text.config(tokenizer))
        average = train(
            "text tower",
            text.Namer(tower).to(self._device),
            lambda model: text.loss_of(model, tokenizer, templates, 48, before),
            Schedule(self._steps(600), 5e-4, average=0.98),
            self._build / "text.checkpoint",
            lambda model: f"{text.accuracy(model, tokenizer, 400):.1%} of captions understood",
        )
        self._save(average.tower, "text")

    def pool(self) -> None:
        """Composites of 512 px in latents, which are scaled on the way."""
        if not (self._build / "vae-scaled").exists():  # else kept from models/
            vae = self._vae("autoencoder")
            few = encode_pool(vae, 512, self._count(500), self._build / "pool-512.unscaled", self._processes)
            diffusion.scale_latents(vae, few.latents.to(self._device))
            self._save(vae, "vae-scaled")
        self._pool()

    def unet(self) -> None:
        """The UNet of the SD shape."""
        pool = self._pool()
        bank = self._sd_bank(pool)
        kept = self._build / "unet-warm"
        unet = load(UNet2DConditionModel, kept) if kept.exists() else diffusion.sd_unet()
        unet = unet.to(self._device, memory_format=torch.channels_last)
        balance = diffusion.balance(unet, pool, bank) if kept.exists() else None
        average = train(
            "unet",
            unet,
            lambda model: diffusion.loss_of(model, pool, bank, 32, balance),
            Schedule(self._steps(10_000), 5e-4, warmup=200, average=0.999),
            self._build / "unet.checkpoint",
            compiled=shutil.which("g++") is not None,
        )
        self._save(average, "unet")

    def decoder(self) -> None:
        """The decoder, so that it cleans what the UNet draws; the latents stay as they are."""
        pool, unet = self._pool(3000), self._unet("unet")
        empty = diffusion.conditions_of_sd(self._tower(), self._tokenizer())([""])["encoder_hidden_states"]
        latents = decoder.redrawn(unet, pool, self._sd_bank(pool), empty, self._build / "redrawn-512.pt")
        vae, known = self._vae("vae-scaled"), self._known()
        for part in (vae.decoder, vae.post_quant_conv):
            part.requires_grad_(True)
        average = train(
            "decoder",
            vae,
            lambda model: decoder.loss_of(model, latents, pool, known, 512, 6),
            Schedule(self._steps(500), 3e-4, average=0.99),
            self._build / "decoder.checkpoint",
            self._psnr(512),
        )
        self._save(average, "vae")

    def judge(self) -> None:
        """The classifier that the gates ask."""
        known = self._known()
        average = train(
            "judge",
            judge.Judge(),
            lambda model: judge.loss_of(model, known, 48),
            Schedule(self._steps(900), 2e-3, average=0.98),
            self._build / "judge.checkpoint",
            lambda model: f"{judge.accuracy(model, known, 240):.1%} of composites",
        )
        judge.save(average)

    def sdxl_autoencoder(self) -> None:
        """The autoencoder of the SDXL shape: the SD shape's with one more level."""
        everything = load_sprites().everything()
        small = self._vae("vae")
        large = sdxl.larger_autoencoder(small).to(self._device, memory_format=torch.channels_last)
        large.requires_grad_(False)
        for part in sdxl.outer_levels(large):
            part.requires_grad_(True)
        average = train(
            "SDXL autoencoder",
            large,
            lambda model: sdxl.loss_of(model, small, everything, 256, 3),
            Schedule(self._steps(350), 1e-3, average=0.98),
            self._build / "sdxl-vae.checkpoint",
            self._psnr(1024),
        )
        self._save(average, "sdxl-vae")

    def sdxl_unet(self) -> None:
        """The SDXL shape's text encoders and its UNet, further trained on the same latents."""
        tower, tokenizer = self._tower(), self._tokenizer()
        first, second = sdxl.text_encoders(tower, tokenizer)
        sd = self._unet("unet")
        typical = text.ids(tokenizer, text.captions(512)).to(self._device)
        unet = sdxl.unet(sd, tower, typical).to(self._device, memory_format=torch.channels_last)
        self._save(first, "sdxl-text")
        self._save(second, "sdxl-text-2")
        pool = self._pool(8000)
        bank = self._sdxl_bank(pool)
        average = train(
            "SDXL unet",
            unet,
            lambda model: diffusion.loss_of(model, pool, bank, 32),
            Schedule(self._steps(400), 2e-4, average=0.99),
            self._build / "sdxl-unet.checkpoint",
        )
        self._save(average, "sdxl-unet")

    def export(self) -> None:
        """Write models/sd15 and models/sdxl."""
        tokenizer = self._tokenizer()
        sd = (self._tower(), self._unet("unet"), self._vae("vae"))
        export.write_sd(tokenizer, *sd)
        export.write_sdxl(tokenizer, self._sdxl_texts(), self._unet("sdxl-unet"), self._vae("sdxl-vae"))

    def keep(self) -> None:
        """Go on from training/checkpoints where that has a part, and from models/ for the rest.

        What is taken over counts as done; the UNets are trained further.
        """
        kept = {
            "tokenizer": "sd15/tokenizer",
            "text-warm": "sd15/text_encoder",
            "vae-scaled": "sd15/vae",
            "unet-warm": "sd15/unet",
            "sdxl-vae": "sdxl/vae",
        }
        if checkpoint.FOLDER.exists():
            checkpoint.restore(self._build)
        for name, part in kept.items():
            if not (self._build / name).exists():
                shutil.copytree(export.MODELS / part, self._build / name)
        for stage in ("autoencoder", "sdxl_autoencoder"):
            (self._build / f"{stage}.done").touch()


def main() -> None:
    """Run the stages that are asked for, all that are not done by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--warm", action="store_true", help="begin with training/checkpoints and models/")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("stage", nargs="*", help="only these, even if they are done")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    build = BUILD / options.size
    scale = SIZES[options.size]
    models, derived = Models(scale, build), Derived(scale, build)
    stages = models.stages() | derived.stages()
    if unknown := [name for name in options.stage if name not in stages]:
        parser.error(f"there is no stage {unknown}; the stages are {list(stages)}")
    build.mkdir(parents=True, exist_ok=True)
    if options.warm and not any(build.iterdir()):
        models.keep()
    for name, stage in stages.items():
        done = build / f"{name}.done"
        if name in options.stage or (not options.stage and not done.exists()):
            stage()
            done.touch()


if __name__ == "__main__":
    main()
