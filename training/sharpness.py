"""How sharply a picture draws what was asked: its object beside the most alike of all true composites.

A classifier sees a tiger in an orange block. This measure lays the asked sprite over the asked colour at every place,
in many sizes and mirrored, takes the placement that differs least from the picture, and compares there, in the object
and a narrow border around it:

- `pixels`: PSNR in dB, of pictures of 256 px.
- `edges`: the energy of the composite's gradients over that of the difference of gradients, in dB, of pictures of 128
  px. A patch without edges gets 0 dB whatever its colour, edges in wrong places get less: blur does not pay.

The autoencoder's own reconstruction of a true composite is what could be reached at best.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from diffusers import AutoencoderKL
from torch import Tensor

from training.pool import numbered
from training.scenes import PALETTE, place, sprite_of
from training.words import Subject

SIDE = 256
"""Pixels of the pictures that are compared."""
COARSE = 64
SIZES = tuple(0.36 * 1.07**step for step in range(15))
"""Widths of the object that are tried, in shares of the picture's: 36 to 93 %."""
BORDER = 0.02
"""Width of the border that counts as the object's region, in shares of the picture's width."""


@dataclass(frozen=True)
class Sharpness:
    """The best match of one picture: both figures in dB, and where it was found, in shares of the picture's width."""

    pixels: float
    edges: float
    x: float
    y: float
    size: float
    mirrored: bool


def sharpness(picture: Tensor, sprite: Tensor, colour: Tensor) -> Sharpness:
    """Compare a picture with the composites of one sprite.

    Args:
        picture: [3, h, w] in -1..1, square.
        sprite: premultiplied, [4, 256, 256] in 0..1.
        colour: what is behind it, [3] in 0..1.
    """
    whole = functional.interpolate((picture[None] + 1) / 2, size=(SIDE, SIDE), mode="area")[0].clamp(0, 1)
    best = None
    for x, y, size, mirrored in _candidates(whole, sprite, colour, 3):
        found = _refined(whole, sprite, colour, x, y, size, mirrored)
        if best is None or found[0] < best[0]:
            best = found
    assert best is not None
    _, x, y, size, mirrored = best
    fine = _composite(sprite, colour, x, y, size, mirrored, 2 * SIDE)
    drawn, region = functional.avg_pool2d(fine[0], 2), functional.avg_pool2d(fine[1][None], 2)[0]
    halved = (functional.avg_pool2d(t, 2) for t in (whole, drawn, region[None]))
    return Sharpness(_psnr(whole, drawn, region), _edges(*halved), x, y, size, mirrored)


def _composite(
    sprite: Tensor, colour: Tensor, x: float, y: float, size: float, mirrored: bool, side: int
) -> tuple[Tensor, Tensor]:
    """The sprite on its colour [3, side, side], and its region [side, side] of zeros and ones."""
    points = (torch.arange(side) + 0.5) / side
    sampled = functional.avg_pool2d(sprite[None], max(1, int(256 / (side * size))))[0]  # no aliases when it gets small
    layer = place(sampled, points[None].expand(side, side), points[:, None].expand(side, side), x, y, size, mirrored)
    reach = 2 * max(1, round(BORDER * side)) + 1
    region = functional.max_pool2d((layer[3:] > 0.5).float()[None], reach, 1, reach // 2)[0, 0]
    return layer[:3] + colour[:, None, None] * (1 - layer[3:]), region


def _candidates(whole: Tensor, sprite: Tensor, colour: Tensor, count: int) -> list[tuple[float, float, float, bool]]:
    """The `count` best of all places for every size and both directions, by mean squared error at COARSE pixels.

    The sum over a region m of (picture - composite)^2 at every place is three correlations, which the Fourier transform
    gives at once.
    """
    small = functional.interpolate(whole[None], size=(COARSE, COARSE), mode="area")[0]
    transformed, squared = (torch.fft.rfft2(t, s=(2 * COARSE, 2 * COARSE)) for t in (small, small.square().sum(0)))
    found = []
    for size in SIZES:
        for mirrored in (False, True):
            drawn, region = _composite(sprite, colour, 0.5, 0.5, size, mirrored, COARSE)
            kernel, mask = (torch.fft.rfft2(t, s=(2 * COARSE, 2 * COARSE)).conj() for t in ((drawn * region), region))
            constant = (drawn.square().sum(0) * region).sum()
            spectrum = mask * squared - 2 * (kernel * transformed).sum(0)
            error = (torch.fft.irfft2(spectrum, s=(2 * COARSE, 2 * COARSE)) + constant) / (3 * region.sum())
            low = round(min(0.0, size / 2 - 0.5) * COARSE)  # the object stays within the picture
            shifts = torch.arange(low, -low + 1)
            places = error[shifts % (2 * COARSE)][:, shifts % (2 * COARSE)]
            least = int(places.argmin())
            dy, dx = (float(shifts[i]) / COARSE for i in divmod(least, len(shifts)))
            found.append((float(places.flatten()[least]), 0.5 + dx, 0.5 + dy, size, mirrored))
    return [candidate[1:] for candidate in sorted(found)[:count]]


def _refined(
    whole: Tensor, sprite: Tensor, colour: Tensor, x: float, y: float, size: float, mirrored: bool
) -> tuple[float, float, float, float, bool]:
    """The error and the place of the best match nearby: place and size in ever smaller steps."""

    def error(x: float, y: float, size: float) -> float:
        drawn, region = _composite(sprite, colour, x, y, size, mirrored, SIDE)
        return float(((whole - drawn).square().mean(0) * region).sum() / region.sum())

    here, least = (x, y, size), error(x, y, size)
    step = 1.0 / COARSE
    while step > 0.3 / SIDE:
        moves = [(step, 0, 0), (-step, 0, 0), (0, step, 0), (0, -step, 0), (0, 0, step), (0, 0, -step)]
        tried = [(here[0] + x, here[1] + y, here[2] + size) for x, y, size in moves]
        tried = [place for place in tried if SIZES[0] <= place[2] <= SIZES[-1]]
        errors = [error(*place_and_size) for place_and_size in tried]
        if min(errors) < least:
            least = min(errors)
            here = tried[errors.index(least)]
        else:
            step /= 2
    return least, *here, mirrored


def _psnr(picture: Tensor, drawn: Tensor, region: Tensor) -> float:
    error = ((picture - drawn).square().mean(0) * region).sum() / region.sum()
    return -10 * math.log10(max(float(error), 1e-6))


def _edges(picture: Tensor, drawn: Tensor, region: Tensor) -> float:
    signal = noise = 1e-6
    for along in (1, 2):
        counts = region[0].narrow(along - 1, 0, region.shape[along] - 1)
        wanted, got = drawn.diff(dim=along), picture.diff(dim=along)
        signal += float((wanted.square().mean(0) * counts).sum())
        noise += float(((wanted - got).square().mean(0) * counts).sum())
    return 10 * math.log10(signal / noise)


@torch.no_grad()
def reconstructed(vae: AutoencoderKL, sprites: Tensor, subjects: list[Subject], pixels: int) -> Tensor:
    """True composites of `subjects`, `pixels` wide, through the autoencoder: the best a UNet could do."""
    again = []
    for number, subject in enumerate(subjects):
        picture = numbered(sprites, subject, 20_000_000 + number, pixels)[None]
        again.append(vae.decode(vae.encode(picture).latent_dist.mean).sample[0].clamp(-1, 1))
    return torch.stack(again)


def measured(pictures: Tensor, sprites: Tensor, subjects: list[Subject]) -> list[Sharpness]:
    """The sharpness of each picture of one thing on a named colour."""
    pairs = zip(pictures, subjects, strict=True)
    return [sharpness(p, sprite_of(sprites, s, s.thing), PALETTE[s.background]) for p, s in pairs]


def summary(drawn: list[Sharpness], best: list[Sharpness]) -> dict[str, float]:
    """Means in dB, and the share of pictures within 3 dB of the mean reconstruction's pixels."""
    reached = statistics.mean(s.pixels for s in best)
    return {
        "pixels_db": round(statistics.mean(s.pixels for s in drawn), 2),
        "edges_db": round(statistics.mean(s.edges for s in drawn), 2),
        "reconstruction_pixels_db": round(reached, 2),
        "reconstruction_edges_db": round(statistics.mean(s.edges for s in best), 2),
        "within_3_db_percent": round(100 * statistics.mean(s.pixels > reached - 3 for s in drawn), 1),
    }
