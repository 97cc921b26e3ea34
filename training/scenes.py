"""Composites: a sprite on a plain colour or a drawn scene. Code draws them, so what they show is known exactly."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as functional
from torch import Tensor

from training.words import COLOURS, NOTHING, SCENES, Subject

PALETTE = torch.tensor(list(COLOURS.values())) / 255


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


def composite(sprites: Tensor, subject: Subject, height: int, width: int) -> Tensor:
    """A whole picture of `subject`, [3, height, width] in -1..1; an object takes 55 to 85 % of the shorter side."""
    shorter = min(height, width)
    u = ((torch.arange(width) + 0.5) / shorter)[None].expand(height, width)
    v = ((torch.arange(height) + 0.5) / shorter)[:, None].expand(height, width)
    wide, tall = width / shorter, height / shorter
    picture = backdrop(subject.background, u / wide, v / tall)
    if subject.thing == NOTHING:
        return picture * 2 - 1
    size = float(uniform(0.55, 0.85, 1))
    x = wide / 2 + float(uniform(-0.5, 0.5, 1)) * (wide - 0.05 - size)
    y = tall / 2 + float(uniform(-0.5, 0.5, 1)) * (tall - 0.05 - size)
    picture = over(picture, place(sprites[subject.thing], u, v, x, y, size, bool(torch.rand(1) < 0.5)))
    return picture.clamp(0, 1) * 2 - 1


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
