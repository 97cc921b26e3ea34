"""The UNets: v-prediction on latents that were encoded once, conditioned by a frozen text tower."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from training.autoencoder import LATENT_CHANNELS
from training.scenes import composite
from training.text import WIDTH, ids
from training.words import COLOURS, PARTS, TRAINING, Subject, caption

# clip_sample must be off: DDIM and DDPM would clip these latents.
NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def sd_unet(context: int = WIDTH, **extra: object) -> UNet2DConditionModel:
    """A UNet over 16x16 latents, without attention at the outermost level."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 160),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=context,
        attention_head_dim=(4, 4, 5),
        **extra,
    )


@dataclass
class Pool:
    """Composites encoded once: latents [n, 32, h, w] in half precision and what each one shows."""

    latents: Tensor
    subjects: list[Subject]

    def batch(self, size: int, rng: random.Random) -> tuple[list[int], Tensor, list[Subject]]:
        """Numbers of random pictures, their latents [size, 32, h, w] and their subjects."""
        chosen = [rng.randrange(len(self.latents)) for _ in range(size)]
        return chosen, self.latents[chosen].float(), [self.subjects[i] for i in chosen]

    def first(self, count: int) -> Pool:
        """The first `count` pictures."""
        return Pool(self.latents[:count], self.subjects[:count])

    def and_also(self, other: Pool) -> Pool:
        """Both pools' pictures."""
        return Pool(torch.cat([self.latents, other.latents]), self.subjects + other.subjects)


def numbered(sprites: Tensor, subject: Subject, number: int, size: int) -> Tensor:
    """Picture `number` of a pool, `size` px wide: the same composite at any size, [3, size, size] in -1..1."""
    torch.manual_seed(number)
    return composite(sprites, subject, size, size)


@torch.no_grad()
def encode_pool(
    vae: AutoencoderKL, sprites: Tensor, size: int, count: int, path: Path, subjects: Sequence[Subject] = TRAINING
) -> Pool:
    """`count` composites of `size` px, every subject equally often and scenes twice; cached in `path`."""
    if not path.exists():
        device = next(vae.parameters()).device
        every = [s for s in subjects for _ in range(1 if s.background < len(COLOURS) else 2)]
        rng = random.Random(0)
        order: list[Subject] = []
        while len(order) < count:
            order += rng.sample(every, len(every))
        order = order[:count]
        latents = []
        for start in tqdm(range(0, count, 8), "composites", mininterval=5):
            pictures = torch.stack(
                [numbered(sprites, s, start + i, size) for i, s in enumerate(order[start : start + 8])]
            )
            pictures = pictures.to(device, memory_format=torch.channels_last)
            latents.append(vae.encode(pictures).latent_dist.mean.half().cpu())
        pairs = [(s.thing, s.background) for s in order]
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"latents": torch.cat(latents), "subjects": pairs}, path)
    saved = torch.load(path)
    return Pool(saved["latents"], [Subject(*pair) for pair in saved["subjects"]])


@torch.no_grad()
def scale_latents(vae: AutoencoderKL, latents: Tensor) -> None:
    """Fold a scale for each channel into the 1x1 convolutions around the latents, once.

    Afterwards the latents of `latents`' kind have mean 0 and variance 1 overall. A channel's deviation becomes the root
    of what it was, not 1: equalised, the detail channels would take 29/32 of the UNet's attention.
    Stable Diffusion's pipelines know one factor for all channels; this needs none.
    """
    mean = latents.float().mean((0, 2, 3))
    deviation = latents.float().std((0, 2, 3))
    divisor = deviation.sqrt() * deviation.mean().sqrt()
    divisor = divisor * ((deviation / divisor).square().mean()).sqrt()
    channels = len(mean)
    encode, decode = vae.quant_conv, vae.post_quant_conv
    encode.weight[:channels] /= divisor[:, None, None, None]
    encode.bias[:channels] = (encode.bias[:channels] - mean) / divisor
    encode.bias[channels:] -= 2 * divisor.log()
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight *= divisor[None, :, None, None]


Conditions = dict[str, Tensor]
"""What a UNet reads besides latents and time, by name; rows first."""


def conditions_of_sd(tower: CLIPTextModel, tokenizer: CLIPTokenizer) -> Callable[[list[str]], Conditions]:
    """The SD UNet reads the tower's last hidden state."""

    def encode(texts: list[str]) -> Conditions:
        device = next(tower.parameters()).device
        return {"encoder_hidden_states": tower(input_ids=ids(tokenizer, texts).to(device)).last_hidden_state}

    return encode


class CaptionBank:
    """Several captions of every training subject, encoded once by frozen towers: half of the UNet's time otherwise."""

    @torch.no_grad()
    def __init__(self, encode: Callable[[list[str]], Conditions], per_subject: int) -> None:
        """Write `per_subject` captions of each subject and encode them."""
        rng = random.Random(0)
        subjects = (*TRAINING, *PARTS)
        texts = [caption(subject, rng) for subject in subjects for _ in range(per_subject)]
        parts = [encode(texts[i : i + 64]) for i in tqdm(range(0, len(texts), 64), "captions", mininterval=5)]
        self._encoded = {name: torch.cat([part[name].half() for part in parts]) for name in parts[0]}
        self._first = {subject: index * per_subject for index, subject in enumerate(subjects)}
        self._per_subject = per_subject

    def some(self, subjects: list[Subject], rng: random.Random) -> Conditions:
        """One caption of each subject."""
        rows = [self._first[subject] + rng.randrange(self._per_subject) for subject in subjects]
        return {name: encoded[rows].float() for name, encoded in self._encoded.items()}


@dataclass(frozen=True)
class Noised:
    """A training batch: latents at random times, and what the UNet is told.

    Attributes:
        rows: which pictures of the pool, `[n]`.
        latents, noise, noisy: `[n, channels, height, width]`.
        times: `[n]`, 0..999.
        context: `[n, tokens, width]`.
        added: SDXL's added conditions, or None.
    """

    rows: list[int]
    latents: Tensor
    noise: Tensor
    times: Tensor
    noisy: Tensor
    context: Tensor
    added: Conditions | None

    @property
    def velocity(self) -> Tensor:
        """What a v-predicting UNet should answer."""
        return DDIMScheduler(**NOISE).get_velocity(self.latents, self.noise, self.times)

    def ask(self, unet: nn.Module, **more: object) -> Tensor:
        """The UNet's answer."""
        answer: Tensor = unet(self.noisy, self.times, self.context, added_cond_kwargs=self.added, **more).sample
        return answer


def noised(
    pool: Pool, bank: CaptionBank, batch: int, device: torch.device, lean: float = 1.3, before: int = 1000
) -> Noised:
    """A random batch; times below `before`, leaning towards high noise, where objects and colours are decided."""
    rng = random.Random(int(torch.randint(2**31, (1,))))
    rows, latents, subjects = pool.batch(batch, rng)
    conditions = {name: value.to(device) for name, value in bank.some(subjects, rng).items()}
    context = conditions.pop("encoder_hidden_states")
    latents = latents.to(device)
    times = ((before - 1) * (1 - torch.rand(batch) ** lean)).round().long().to(device)
    noise = torch.randn(latents.shape).to(device)
    noisy = DDIMScheduler(**NOISE).add_noise(latents, noise, times).contiguous(memory_format=torch.channels_last)
    return Noised(rows, latents, noise, times, noisy, context, conditions or None)


def take_over(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load from `state` what `model` has by the same name in the same shape."""
    own = model.state_dict()
    model.load_state_dict(own | {k: v for k, v in state.items() if k in own and v.shape == own[k].shape})


def loss_of(unet: nn.Module, pool: Pool, bank: CaptionBank, batch: int) -> Tensor:
    """Squared error of v."""
    drawn = noised(pool, bank, batch, next(unet.parameters()).device)
    return (drawn.ask(unet) - drawn.velocity).square().mean()
