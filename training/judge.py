"""A small classifier of objects, and the colour of a background. The gates and a smoke test use them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as functional
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.data import ROOT
from training.scenes import PALETTE, composite
from training.words import BACKGROUNDS, DRAWN, NOUNS, SUBJECTS, Subject

WEIGHTS = ROOT / "models" / "judge" / "model.safetensors"
SIDE = 64


class Judge(nn.Module):
    """A classifier that says which of the first `things` objects of NOUNS a picture of 64 px shows."""

    def __init__(self, things: int = len(NOUNS)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for into, out in ((3, 24), (24, 48), (48, 96), (96, 128)):
            layers += [nn.Conv2d(into, out, 3, 2, 1), nn.BatchNorm2d(out), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(512, things))

    def forward(self, pictures: Tensor) -> Tensor:
        """Return logits [n, objects] for pictures [n, 3, height, width] in -1..1."""
        scores: Tensor = self.body(functional.interpolate(pictures, size=(SIDE, SIDE), mode="area"))
        return scores


def loss_of(judge: nn.Module, sprites: Tensor, batch: int) -> Tensor:
    """The cross-entropy of a batch of composites of random objects.

    One in five is drawn flat. With a probability of 0.6 the batch is blurred, because generated pictures are.
    """
    device = next(judge.parameters()).device
    chosen = [replace(SUBJECTS[int(i)], flat=bool(torch.rand(1) < 0.2)) for i in torch.randint(len(SUBJECTS), (batch,))]
    pictures = torch.stack([composite(sprites, subject, SIDE, SIDE) for subject in chosen])
    if torch.rand(1) < 0.6:
        pictures = functional.interpolate(pictures, size=int(torch.randint(16, 48, (1,))), mode="area")
        pictures = functional.interpolate(pictures, size=SIDE, mode="bilinear")
    return functional.cross_entropy(judge(pictures.to(device)), torch.tensor([s.thing for s in chosen], device=device))


def save(judge: Judge) -> Path:
    """Write the judge to the folder of the models in half precision, and return the path."""
    WEIGHTS.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.half() if value.is_floating_point() else value for name, value in judge.state_dict().items()}
    save_file({name: value.contiguous() for name, value in state.items()}, WEIGHTS)
    return WEIGHTS


def load() -> Judge:
    """Load the judge from the folder of the models."""
    weights = load_file(WEIGHTS)
    judge = Judge(len(weights["body.14.bias"]))
    judge.load_state_dict(weights)  # converts from half precision
    return judge.eval()


@torch.no_grad()
def accuracy(judge: nn.Module, sprites: Tensor, count: int) -> float:
    """The share of `count` composites of objects in DRAWN, at 256 px, whose object the judge names."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        grounds = len(BACKGROUNDS)
        chosen = [Subject(int(i) // grounds, int(i) % grounds) for i in torch.randint(len(DRAWN) * grounds, (count,))]
        pictures = torch.stack([composite(sprites, subject, 256, 256) for subject in chosen])
    judge.eval()
    right = judge(pictures).argmax(1) == torch.tensor([subject.thing for subject in chosen])
    return float(right.float().mean())


def background_colour(pictures: Tensor) -> Tensor:
    """The index in PALETTE of the colour nearest to the median of each picture's four corners.

    Pictures are [n, 3, height, width] in -1..1.
    """
    side = pictures.shape[-1] // 20
    edges = (slice(0, side), slice(-side, None))
    corners = torch.stack([pictures[:, :, y, x].mean((2, 3)) for y in edges for x in edges], 1)
    colour = (corners.median(1).values + 1) / 2
    distances: Tensor = (colour[:, None] - PALETTE[None]).norm(dim=-1)
    return distances.argmin(1)
