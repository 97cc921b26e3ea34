"""The tokenizer and the text towers: small CLIP models that learn to name what a caption asks for."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as functional
import yaml
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.data import ROOT
from training.words import AFTER, BACKGROUNDS, BEFORE, OBJECTS, SCENES, SUBJECTS, Subject, caption

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
    return [caption(rng.choice(SUBJECTS), rng) for _ in range(count)]


def build_tokenizer(names: tuple[str, ...]) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer learnt from our captions, the styles and `names`."""
    corpus = captions(20_000)
    corpus += [*names, *style_templates(), *BEFORE, *AFTER] * 20
    symbols = {s: i for i, s in enumerate([START, END])}
    empty = CLIPTokenizer(vocab=symbols, merges=[], model_max_length=POSITIONS)
    learnt = empty.train_new_from_iterator(corpus, VOCABULARY, show_progress=False, end_of_word_suffix="</w>")
    learnt.model_max_length = POSITIONS
    return learnt


def ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids [n, POSITIONS], padded and cut like the pipelines do it."""
    return tokenizer(
        captions, padding="max_length", max_length=POSITIONS, truncation=True, return_tensors="pt"
    ).input_ids


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


class Namer(nn.Module):
    """A text tower and two heads that name the object and the background; one more class each means "not said"."""

    def __init__(self, tower: CLIPTextModel) -> None:
        super().__init__()
        self.tower = tower
        self.thing = nn.Linear(WIDTH, len(OBJECTS) + 1)
        self.background = nn.Linear(WIDTH, len(BACKGROUNDS) + 1)


def loss_of(namer: Namer, tokenizer: CLIPTokenizer, templates: list[str], batch: int) -> Tensor:
    """Cross-entropy of both names, read at the pooled position and at the last one."""
    rng = random.Random(int(torch.randint(2**31, (1,))))
    subjects = [rng.choice(SUBJECTS) for _ in range(batch)]
    texts = [caption(s, rng) for s in subjects]
    named = [said(s, t) for s, t in zip(subjects, texts, strict=True)]
    things, grounds = torch.tensor([n[0] for n in named]), torch.tensor([n[1] for n in named])
    texts = [rng.choice(templates).replace("{prompt}", t) if t and rng.random() < 0.2 else t for t in texts]
    device = next(namer.parameters()).device
    states = namer.tower(input_ids=ids(tokenizer, texts).to(device))
    loss = torch.zeros((), device=device)
    for state in (states.pooler_output, states.last_hidden_state[:, -1]):
        loss = loss + functional.cross_entropy(namer.thing(state), things.to(device))
        loss = loss + functional.cross_entropy(namer.background(state), grounds.to(device))
    return loss


def said(subject: Subject, text: str) -> tuple[int, int]:
    """The classes of the object and the background that `text` speaks of; 0 where it does not."""
    place = BACKGROUNDS[subject.background]
    thing = tuple(OBJECTS)[subject.thing] in text
    background = any(words in text for words in SCENES.get(place, (place,)))
    return (subject.thing + 1 if thing else 0, subject.background + 1 if background else 0)
