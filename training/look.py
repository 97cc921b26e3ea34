"""Draw with the SD model without a running graph, and measure sharpness and background colours.

    python -m training.look [--models models/sd15] [--prompts 58] [--known 24]
    python -m training.look --build build/training/cpu [--prompts 58]

It prints JSON and writes a grid of pictures. `--build` uses the moving average in a training run's last checkpoint, so
that a run can be observed while it goes on. Sampler, steps and guidance are the defaults of a request.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from training.captions import prompt
from training.data import load_sprites
from training.diffusion import NOISE, sd_unet
from training.judge import background_colour
from training.pictures import grid
from training.sharpness import measured, reconstructed, summary
from training.words import (
    BACKGROUNDS,
    DRAWN,
    HELD_OUT,
    MOUNTS,
    NOUNS,
    OBJECTS,
    SEED_SUBJECT,
    Relation,
    Subject,
)
from training.workshop import load

PIXELS = 512
STEPS = 30
GUIDANCE = 5.0


def pipeline(folder: Path) -> StableDiffusionPipeline:
    """Load the pipeline in `folder`, with the default sampler of a request."""
    return _default_sampler(StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32))


def pipeline_of_build(build: Path) -> StableDiffusionPipeline:
    """Load the pipeline of a build folder, with its UNet and decoder as far as they are trained."""
    vae = load(AutoencoderKL, build / ("vae" if (build / "vae").exists() else "vae-scaled"))
    pipe = StableDiffusionPipeline(
        tokenizer=CLIPTokenizer.from_pretrained(build / "tokenizer"),
        text_encoder=load(CLIPTextModel, build / "text"),
        unet=unet_of_build(build),
        vae=vae,
        scheduler=DPMSolverMultistepScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _default_sampler(pipe)


def unet_of_build(build: Path) -> UNet2DConditionModel:
    """Load the SD UNet of a build: the finished one or, before that exists, the average of its last checkpoint."""
    if (build / "unet").exists():
        unet: UNet2DConditionModel = load(UNet2DConditionModel, build / "unet")
        return unet
    unet = sd_unet().eval()
    unet.load_state_dict(torch.load(build / "unet.checkpoint", map_location="cpu")["average"])
    return unet


def _default_sampler(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    known = {name: value for name, value in NOISE.items() if name not in ("clip_sample", "set_alpha_to_one")}
    pipe.scheduler = DPMSolverMultistepScheduler(
        **known, algorithm_type="sde-dpmsolver++", solver_type="heun", use_karras_sigmas=True
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def draw(pipe: StableDiffusionPipeline, prompts: list[str], batch: int = 10) -> Tensor:
    """Draw pictures [n, 3, 512, 512] in -1..1; the seed of a picture is its index."""
    pictures = []
    for start in range(0, len(prompts), batch):
        few = prompts[start : start + batch]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(few))]
        with torch.autocast("cpu", torch.bfloat16):
            drawn = pipe(few, PIXELS, PIXELS, STEPS, guidance_scale=GUIDANCE, generator=seeds, output_type="pt")
        pictures.append(drawn.images.float() * 2 - 1)
    return torch.cat(pictures)


def show(background: int = BACKGROUNDS.index("beach")) -> list[Subject]:
    """A few subjects of every kind for the grid: the example's prompt, relations, counts, colours, flat drawings."""
    cat, dog, astronaut = (NOUNS.index(noun) for noun in ("cat", "dog", "astronaut"))
    mounts = [Subject(cat, background, relation=Relation.ON, other=NOUNS.index(mount)) for mount in MOUNTS]
    beside = [Subject(dog, 0, relation=relation, other=NOUNS.index("house")) for relation in list(Relation)[2:]]
    counted = [Subject(cat, 23, count=2), Subject(NOUNS.index("fish"), BACKGROUNDS.index("underwater"), count=3)]
    tinted = [Subject(NOUNS.index(noun), 14, tint=tint) for tint, noun in enumerate(("cat", "horse", "frog", "apple"))]
    flat = [Subject(thing, 2, flat=True) for thing in (cat, astronaut, NOUNS.index("house"), NOUNS.index("horse"))]
    return [SEED_SUBJECT, SEED_SUBJECT, *mounts, *beside, *counted, *tinted, *flat]


def main() -> None:
    """Draw and measure as the command line says, then print the figures and write the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("models/sd15"))
    parser.add_argument("--build", type=Path)
    parser.add_argument("--prompts", type=int, default=58)
    parser.add_argument("--known", type=int, default=len(DRAWN), help="draw only the first KNOWN objects")
    parser.add_argument("--grid", type=Path, default=Path("build/look.png"))
    options = parser.parse_args()
    pipe = pipeline_of_build(options.build) if options.build else pipeline(options.models)
    sprites = load_sprites().named(list(OBJECTS.values()))
    known = [s for s in HELD_OUT if s.thing < options.known]
    subjects = [known[i % len(known)] for i in range(options.prompts)]
    pictures = draw(pipe, [prompt(s) for s in subjects])
    right = background_colour(pictures) == torch.tensor([s.background for s in subjects])
    few = subjects[: len(known)]
    best = measured(reconstructed(pipe.vae, sprites, few, PIXELS), sprites, few)
    figures = summary(measured(pictures, sprites, subjects), best)
    json.dump(figures | {"background_percent": round(100 * float(right.float().mean()), 1)}, sys.stdout, indent=2)
    print()
    shown = torch.cat([pictures[:32], draw(pipe, [prompt(s) for s in show()])])
    grid(torch.nn.functional.interpolate(shown, size=(160, 160), mode="area"), options.grid)


if __name__ == "__main__":
    main()
