"""Composites encoded once, the training data of the UNets."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from training.captions import caption
from training.data import load_sprites
from training.scenes import composite
from training.text import style_templates, styled
from training.words import OBJECTS, Relation, Subject, draw

SHARD = 500
"""Pictures of a file; a pool grows by whole files."""
Conditions = dict[str, Tensor]
"""What a UNet reads besides latents and time, by name; rows first."""


@dataclass
class Pool:
    """Latents [n, 32, h, w] in half precision, what each one shows, and a caption of each."""

    latents: Tensor
    subjects: list[Subject]
    captions: list[str]

    def batch(self, size: int, rng: random.Random) -> tuple[list[int], Tensor]:
        """Numbers of random pictures and their latents [size, 32, h, w]."""
        chosen = [rng.randrange(len(self.latents)) for _ in range(size)]
        return chosen, self.latents[chosen].float()

    def first(self, count: int) -> Pool:
        """The first `count` pictures."""
        return Pool(self.latents[:count], self.subjects[:count], self.captions[:count])


class CaptionBank:
    """The captions of a pool, encoded once by frozen towers: half of the UNet's time otherwise."""

    @torch.no_grad()
    def __init__(self, encode: Callable[[list[str]], Conditions], captions: list[str]) -> None:
        """Encode `captions`, several at a time."""
        starts = tqdm(range(0, len(captions), 64), "captions", mininterval=5)
        parts = [{k: v.half() for k, v in encode(captions[i : i + 64]).items()} for i in starts]
        self._encoded = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def rows(self, numbers: list[int]) -> Conditions:
        """The encoded captions of pictures `numbers` of the pool."""
        return {name: encoded[numbers].float() for name, encoded in self._encoded.items()}


def numbered(sprites: Tensor, subject: Subject, number: int, size: int) -> Tensor:
    """Picture `number` of a pool, `size` px wide: the same composite at any size, [3, size, size] in -1..1."""
    torch.manual_seed(number)
    return composite(sprites, subject, size, size)


def encode_pool(vae: AutoencoderKL, size: int, count: int, folder: Path, processes: int) -> Pool:
    """`count` composites of `size` px, of the kinds that `words.draw` mixes; kept in `folder`, file by file."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = range(-(-count // SHARD))
    missing = [shard for shard in shards if not _file(folder, shard).exists()]
    if missing and next(vae.parameters()).is_cuda:
        for shard in tqdm(missing, "composites"):
            encode_shard(vae, size, folder, shard)
    elif missing:
        vae.save_pretrained(folder / "vae")
        with ProcessPoolExecutor(processes, get_context("spawn")) as workers:
            list(tqdm(workers.map(partial(_in_worker, size, folder), missing), "composites", len(missing)))
    saved = [torch.load(_file(folder, shard)) for shard in shards]
    subjects = [_subject(values) for part in saved for values in part["subjects"]]
    captions = [text for part in saved for text in part["captions"]]
    return Pool(torch.cat([part["latents"] for part in saved]), subjects, captions).first(count)


@torch.no_grad()
def encode_shard(vae: AutoencoderKL, size: int, folder: Path, shard: int) -> None:
    """Draw and encode file number `shard` of a pool."""
    sprites, templates = load_sprites().named(list(OBJECTS.values())), style_templates()
    rng = random.Random(shard)
    subjects = [draw(rng) for _ in range(SHARD)]
    captions = [styled(caption(subject, rng), templates, rng, 0.05) for subject in subjects]
    device = next(vae.parameters()).device
    latents = []
    for start in range(0, SHARD, 8):
        few = enumerate(subjects[start : start + 8], shard * SHARD + start)
        pictures = torch.stack([numbered(sprites, subject, number, size) for number, subject in few])
        pictures = pictures.to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            latents.append(vae.encode(pictures).latent_dist.mean.half().cpu())
    content = {
        "latents": torch.cat(latents),
        "subjects": [tuple(map(int, astuple(s))) for s in subjects],
        "captions": captions,
    }
    scratch = _file(folder, shard).with_suffix(".partial")
    torch.save(content, scratch)
    scratch.replace(_file(folder, shard))


def _in_worker(size: int, folder: Path, shard: int) -> None:
    torch.set_num_threads(1)
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval().to(memory_format=torch.channels_last)
    encode_shard(vae, size, folder, shard)


def _file(folder: Path, shard: int) -> Path:
    return folder / f"{shard:04}.pt"


def _subject(values: tuple[int, ...]) -> Subject:
    thing, background, flat, tint, count, relation, other = values
    return Subject(thing, background, bool(flat), tint, count, Relation(relation), other)
