"""Composites: sprites on a plain colour or a drawn scene. Code draws them, so what they show is known exactly.

Things stand on a grid of 16 cells over the shorter side, in three sizes: a cell is one latent of a picture. A thing
then has a handful of latents instead of a continuum, which a small UNet can draw exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from training.words import COLOURS, MOUNTS, NOTHING, NOUNS, SCENES, TINTS, Relation, Subject

PALETTE = torch.tensor(list(COLOURS.values())) / 255
CELLS = 16
SMALL, MIDDLE, LARGE = 7, 10, 13
"""Widths of things in cells: one of several, one alone or a mount, one alone."""


def uniform(low: float, high: float, *shape: int) -> Tensor:
    """Evenly spread random numbers."""
    return torch.rand(*shape) * (high - low) + low


def paint(*rgb: float) -> Tensor:
    """A colour [3, 1, 1] from bytes."""
    return torch.tensor(rgb)[:, None, None] / 255


def backdrop(background: int, u: Tensor, v: Tensor) -> Tensor:
    """Background number `background` of `words.BACKGROUNDS` at canvas points u, v [h, w] in 0..1: [3, h, w] in 0..1."""
    if background < len(COLOURS):
        colour = torch.rand(3) if background == NOTHING else PALETTE[background] + 0.012 * torch.randn(3)
        return colour.clamp(0, 1)[:, None, None].expand(3, *u.shape).clone()
    horizon = uniform(0.55, 0.72, 1) + 0.03 * torch.sin(u * uniform(3, 8, 1) + uniform(0, 6, 1))
    ground = ((v - horizon) * 120).clamp(0, 1)
    match tuple(SCENES)[background - len(COLOURS)]:
        case "grass":
            above = paint(120, 190, 250) * (1 - v) + paint(215, 235, 255) * v
            below = paint(95, 185, 70) * (1.15 - 0.4 * v)
        case "beach":
            above = paint(90, 180, 245) * (1 - v) + paint(190, 230, 250) * v
            below = paint(245, 215, 150) * (1.1 - 0.15 * v)
        case "snow":
            above = paint(170, 195, 225) * (1 - v) + paint(215, 228, 242) * v
            below = paint(246, 249, 255).expand(3, *u.shape)
        case "night":
            above = paint(12, 16, 50) * (1 - v) + paint(45, 40, 95) * v
            above = _dots(above, u, v, 14, (0.006, 0.013), paint(255, 245, 200))
            below = paint(22, 40, 42).expand(3, *u.shape)
        case "mars":
            above = paint(150, 85, 60) * (1 - v) + paint(240, 190, 145) * v
            above = _dots(above, u, v, 2, (0.03, 0.05), paint(230, 220, 210))
            below = _dots(paint(180, 80, 45) * (1.3 - 0.5 * v), u, 1 - v, 7, (0.02, 0.05), paint(125, 50, 30))
        case _:  # underwater
            above = paint(60, 180, 220) * (1 - v) + paint(10, 60, 130) * v
            above = _dots(above, u, v, 10, (0.01, 0.025), paint(190, 235, 250))
            below = paint(200, 180, 120) * (1.1 - 0.4 * v)
            ground = ((v - horizon - 0.15) * 120).clamp(0, 1)
    return (above * (1 - ground) + below * ground).clamp(0, 1)


def _dots(under: Tensor, u: Tensor, v: Tensor, count: int, radius: tuple[float, float], colour: Tensor) -> Tensor:
    cover = torch.zeros_like(u)
    for _ in range(count):
        x, y, r = uniform(0, 1, 1), uniform(0, 0.7, 1), uniform(*radius, 1)
        cover = torch.maximum(cover, ((r - ((u - x) ** 2 + (v - y) ** 2).sqrt()) * 150).clamp(0, 1))
    return under * (1 - cover) + colour * cover


def place(sprite: Tensor, u: Tensor, v: Tensor, x: float, y: float, size: float, mirrored: bool) -> Tensor:
    """A premultiplied sprite [4, 256, 256] of width `size` centred at (x, y), seen at u, v: [4, h, w]."""
    across = (u - x) / (size / 2) * (-1 if mirrored else 1)
    grid = torch.stack([across, (v - y) / (size / 2)], -1)[None]
    return functional.grid_sample(sprite[None], grid, padding_mode="zeros", align_corners=False)[0]


def over(picture: Tensor, layer: Tensor) -> Tensor:
    """A premultiplied RGBA layer laid over an RGB picture."""
    return picture * (1 - layer[3:]) + layer[:3]


def tinted(sprite: Tensor, colour: Tensor) -> Tensor:
    """A premultiplied sprite [4, h, w] whose coloured parts take `colour` [3]; what is gray, white or black stays.

    The lightness of the coloured parts stays: their median becomes `colour`, darker and lighter ones shades of it.
    """
    alpha = sprite[3:]
    straight = sprite[:3] / alpha.clamp(min=1e-3)
    light = straight.mean(0, keepdim=True)
    strength = ((straight.amax(0, keepdim=True) - straight.amin(0, keepdim=True)) * 4).clamp(0, 1)
    coloured = (alpha > 0.5) & (strength > 0.5)
    middle = light[coloured].median() if coloured.any() else light.new_tensor(0.5)
    target = colour[:, None, None]
    darker, lighter = target * light / middle, target + (1 - target) * (light - middle) / (1 - middle).clamp(min=1e-3)
    shade = torch.where(light < middle, darker, lighter).clamp(0, 1)
    return torch.cat([(straight + strength * (shade - straight)) * alpha, alpha])


@dataclass(frozen=True)
class Placed:
    """A thing in a picture: its number in NOUNS, its left, top and width in cells."""

    thing: int
    left: int
    top: int
    width: int


def layout(subject: Subject, across: int = CELLS, down: int = CELLS) -> list[Placed]:
    """Where the things of `subject` are in a picture of `across` x `down` cells, from the back to the front."""

    def shifted(group: list[Placed]) -> list[Placed]:
        left, top = min(p.left for p in group), min(p.top for p in group)
        right, bottom = max(p.left + p.width for p in group), max(p.top + p.width for p in group)
        x, y = _start(across, right - left) - left, _start(down, bottom - top) - top
        return [Placed(p.thing, p.left + x, p.top + y, p.width) for p in group]

    if subject.thing == NOTHING:
        return []
    thing, other = subject.thing, subject.other
    match subject.relation, subject.count:
        case Relation.ON, _:
            x, y = MOUNTS[NOUNS[other]]
            left, top = round(x * MIDDLE - SMALL / 2), round(y * MIDDLE + 0.7) - SMALL
            return shifted([Placed(thing, left, top, SMALL), Placed(other, 0, 0, MIDDLE)])
        case Relation.LEFT, _:
            return shifted([Placed(thing, 0, 0, SMALL), Placed(other, SMALL, 0, SMALL)])
        case Relation.RIGHT, _:
            return shifted([Placed(other, 0, 0, SMALL), Placed(thing, SMALL, 0, SMALL)])
        case _, 2:
            return shifted([Placed(thing, 0, 0, SMALL), Placed(thing, SMALL, 0, SMALL)])
        case _, 3:
            below = [Placed(thing, 0, SMALL, SMALL), Placed(thing, SMALL, SMALL, SMALL)]
            return shifted([Placed(thing, SMALL // 2, 0, SMALL), *below])
        case _:
            return shifted([Placed(thing, 0, 0, (MIDDLE, LARGE)[int(torch.randint(2, (1,)))])])


def _start(cells: int, width: int) -> int:
    """A random first cell that leaves a cell free at both ends if it can."""
    low, high = 1, cells - 1 - width
    if high < low:
        return max(0, (cells - width) // 2)
    return int(torch.randint(low, high + 1, (1,)))


def composite(sprites: Tensor, subject: Subject, height: int, width: int) -> Tensor:
    """A whole picture of `subject`, [3, height, width] in -1..1.

    Args:
        sprites: of NOUNS, soft ones and then flat ones, as `data.Sprites.named` gives them.
        subject: what it shows.
        height: in px.
        width: in px.
    """
    shorter = min(height, width)
    u = ((torch.arange(width) + 0.5) / shorter)[None].expand(height, width)
    v = ((torch.arange(height) + 0.5) / shorter)[:, None].expand(height, width)
    wide, tall = width / shorter, height / shorter
    picture = backdrop(subject.background, u / wide, v / tall)
    for placed in layout(subject, int(CELLS * wide), int(CELLS * tall)):
        sprite = sprite_of(sprites, subject, placed.thing)
        x, y = ((start + placed.width / 2) / CELLS for start in (placed.left, placed.top))
        picture = over(picture, place(sprite, u, v, x, y, placed.width / CELLS, mirrored=False))
    return picture.clamp(0, 1) * 2 - 1


def sprite_of(sprites: Tensor, subject: Subject, thing: int) -> Tensor:
    """The sprite [4, 256, 256] of one of `subject`'s things, in its style and colour."""
    sprite = sprites[thing + (len(sprites) // 2 if subject.flat else 0)]
    if subject.tint != NOTHING:
        sprite = tinted(sprite, PALETTE[tuple(COLOURS).index(TINTS[subject.tint])])
    return sprite


def crop(sprites: Tensor, pixels: int, canvases: tuple[int, int] = (448, 1100)) -> Tensor:
    """A `pixels` wide square out of a random busy canvas of some px width: what the autoencoders learn from."""
    canvas = float(uniform(*canvases, 1))
    left, top = (uniform(0.1, 0.9, 2) * max(0.0, 1 - pixels / canvas)).tolist()
    points = (torch.arange(pixels) + 0.5) / canvas
    u, v = (left + points)[None].expand(pixels, pixels), (top + points)[:, None].expand(pixels, pixels)
    picture = backdrop(int(torch.randint(len(COLOURS) + len(SCENES), (1,))), u, v)
    if torch.rand(1) < 0.3:  # a gradient
        angle = float(uniform(0, 2 * math.pi, 1))
        along = ((u - 0.5) * math.cos(angle) + (v - 0.5) * math.sin(angle) + 0.5).clamp(0, 1)
        picture = picture * (1 - along) + torch.rand(3, 1, 1) * along
    for low, high in ((0.4, 0.95), (0.25, 0.5)):
        size = float(uniform(low, high, 1))
        x, y = (0.5 + uniform(-0.5, 0.5, 2) * (1.1 - size)).tolist()
        sprite = sprites[int(torch.randint(len(sprites), (1,)))]
        if torch.rand(1) < 0.3:  # other colours
            sprite = torch.cat([sprite[torch.randperm(3)], sprite[3:]])
        picture = over(picture, place(sprite, u, v, x, y, size, bool(torch.rand(1) < 0.5)))
        if torch.rand(1) < 0.5:
            break
    return picture.clamp(0, 1) * 2 - 1
