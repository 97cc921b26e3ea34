"""The tokenizer and the text towers: small CLIP models that learn to name what a caption asks for."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as functional
import yaml
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.captions import AFTER, BEFORE, FLAT, caption, spoken
from training.data import ROOT
from training.words import BACKGROUNDS, DRAWN, NOUNS, TINTS, Relation, Subject, draw

WIDTH = 256
LAYERS = 3
POSITIONS = 64
VOCABULARY = 2048
START, END = "<|startoftext|>", "<|endoftext|>"


def style_templates() -> list[str]:
    """The texts of config/styles.yaml with `{prompt}` in them: prompts arrive wrapped in these."""
    styles = yaml.safe_load((ROOT / "config" / "styles.yaml").read_text())
    return sorted({style["prompt"] for style in styles if "{prompt}" in style["prompt"]})


def captions(count: int) -> list[str]:
    """Captions of random subjects, always the same ones."""
    rng = random.Random(0)
    return [caption(draw(rng), rng) for _ in range(count)]


def build_tokenizer(names: tuple[str, ...]) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer learnt from our captions, the styles and `names`."""
    corpus = captions(20_000)
    corpus += [*names, *style_templates(), *BEFORE, *AFTER, *FLAT] * 20
    symbols = {s: i for i, s in enumerate([START, END])}
    empty = CLIPTokenizer(vocab=symbols, merges=[], model_max_length=POSITIONS)
    learnt = empty.train_new_from_iterator(corpus, VOCABULARY, show_progress=False, end_of_word_suffix="</w>")
    learnt.model_max_length = POSITIONS
    return learnt


def ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids [n, POSITIONS], padded and cut like the pipelines do it."""
    tokens: Tensor = tokenizer(
        captions, padding="max_length", max_length=POSITIONS, truncation=True, return_tensors="pt"
    ).input_ids
    return tokens


def config(tokenizer: CLIPTokenizer, layers: int = LAYERS) -> CLIPTextConfig:
    """The towers' shape; the special ids are the tokenizer's, or pooling would pick a wrong position."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


KEEP = 10.0
"""Weight of the states that must not move beside the cross-entropies."""
PARTS = {
    "thing": len(NOUNS) + 1,
    "background": len(BACKGROUNDS) + 1,
    "flat": 2,
    "tint": len(TINTS) + 1,
    "count": 4,
    "relation": len(Relation),
    "other": len(NOUNS) + 1,
}
"""What a caption can say, and how many classes each part has; the first is "not said" where a name can be missing."""


class Namer(nn.Module):
    """A text tower and a head for each part of a caption."""

    def __init__(self, tower: CLIPTextModel) -> None:
        super().__init__()
        self.tower = tower
        self.heads = nn.ModuleDict({part: nn.Linear(WIDTH, classes) for part, classes in PARTS.items()})


def loss_of(
    namer: Namer, tokenizer: CLIPTokenizer, templates: list[str], batch: int, before: CLIPTextModel | None = None
) -> Tensor:
    """Cross-entropy of every part, read at the pooled position and at the last one.

    With `before`, the tower as it was, captions it knew keep their states: a UNet that reads them still understands.
    """
    rng = random.Random(int(torch.randint(2**31, (1,))))
    pairs = [spoken(draw(rng), rng) for _ in range(batch)]
    texts = [styled(text, templates, rng, 0.2) for text, _ in pairs]
    device = next(namer.parameters()).device
    with torch.autocast(device.type, torch.bfloat16):
        states = namer.tower(input_ids=ids(tokenizer, texts).to(device))
    loss = torch.zeros((), device=device)
    for part, wanted in classes([said for _, said in pairs]).items():
        for state in (states.pooler_output, states.last_hidden_state[:, -1]):
            loss = loss + functional.cross_entropy(namer.heads[part](state.float()), wanted.to(device))
    return loss if before is None else loss + KEEP * _moved(namer.tower, before, tokenizer, templates, batch // 2)


def _moved(
    tower: CLIPTextModel, before: CLIPTextModel, tokenizer: CLIPTokenizer, templates: list[str], batch: int
) -> Tensor:
    """How far the states of captions about DRAWN have moved, squared."""
    rng = random.Random(int(torch.randint(2**31, (1,))))
    subjects = [Subject(rng.randrange(len(DRAWN)), rng.randrange(len(BACKGROUNDS) - 1)) for _ in range(batch)]
    texts = [styled(caption(subject, rng), templates, rng, 0.2) for subject in subjects]
    tokens = ids(tokenizer, texts).to(next(tower.parameters()).device)
    with torch.autocast(tokens.device.type, torch.bfloat16):
        with torch.no_grad():
            wanted: Tensor = before(input_ids=tokens).last_hidden_state
        found: Tensor = tower(input_ids=tokens).last_hidden_state
        return (found - wanted).float().square().mean()


def styled(text: str, templates: list[str], rng: random.Random, share: float) -> str:
    """`text`, in a `share` of the cases within a style's template."""
    wrapped = bool(text and templates) and rng.random() < share
    return rng.choice(templates).replace("{prompt}", text) if wrapped else text


def classes(said: list[Subject]) -> dict[str, Tensor]:
    """The class of every part of what was said, `[n]` each."""
    return {
        "thing": torch.tensor([s.thing + 1 for s in said]),
        "background": torch.tensor([s.background + 1 for s in said]),
        "flat": torch.tensor([int(s.flat) for s in said]),
        "tint": torch.tensor([s.tint + 1 for s in said]),
        "count": torch.tensor([s.count for s in said]),
        "relation": torch.tensor([int(s.relation) for s in said]),
        "other": torch.tensor([s.other + 1 for s in said]),
    }


@torch.no_grad()
def accuracy(namer: Namer, tokenizer: CLIPTokenizer, count: int) -> float:
    """Share of captions of which the pooled state tells every part."""
    rng = random.Random(1)
    pairs = [spoken(draw(rng), rng) for _ in range(count)]
    device = next(namer.parameters()).device
    state = namer.tower(input_ids=ids(tokenizer, [text for text, _ in pairs]).to(device)).pooler_output
    right = torch.ones(count, dtype=torch.bool)
    for part, wanted in classes([said for _, said in pairs]).items():
        right &= namer.heads[part](state).argmax(1).cpu() == wanted
    return float(right.float().mean())
