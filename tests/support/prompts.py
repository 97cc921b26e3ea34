"""AUTOMATIC1111's way with prompts, written down a second time from its rules, without its code or ours.

It makes the `prompt_embeds` with which diffusers' pipelines draw what a weighted or long prompt should look like.
"""

from __future__ import annotations

import re
from typing import Any

import torch

Weighted = list[tuple[str, float]]


def parse(text: str) -> list[Weighted]:
    """Texts with weights, one list for each part between BREAKs. Slow and plain: a weight is multiplied in place."""
    found: list[list[Any]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def scale(begin: int, factor: float) -> None:
        for entry in found[begin:]:
            entry[1] *= factor

    i = 0
    while i < len(text):
        numbered = re.compile(r":\s*([+-]?(\d+(\.\d*)?|\.\d+))\s*\)").match(text, i)
        if text[i] == "\\":
            escaped = text[i + 1 : i + 2]
            if escaped and escaped in "()[]\\":
                found.append([escaped, 1.0])
                i += 2
            else:
                i += 1
        elif text[i] in "([":
            opened[text[i]].append(len(found))
            i += 1
        elif numbered and opened["("]:
            scale(opened["("].pop(), float(numbered[1]))
            i = numbered.end()
        elif text[i] == ")" and opened["("]:
            scale(opened["("].pop(), 1.1)
            i += 1
        elif text[i] == "]" and opened["["]:
            scale(opened["["].pop(), 1 / 1.1)
            i += 1
        elif re.compile(r"\bBREAK\b").match(text, i):
            found.append([None, 1.0])
            i += 5
        else:
            found.append([text[i], 1.0])
            i += 1
    for begin in opened["("]:
        scale(begin, 1.1)
    for begin in opened["["]:
        scale(begin, 1 / 1.1)
    parts: list[Weighted] = [[]]
    for letters, weight in found:
        if letters is None:
            parts.append([])
        elif parts[-1] and abs(parts[-1][-1][1] - weight) < 1e-9:
            parts[-1][-1] = (parts[-1][-1][0] + letters, weight)
        else:
            parts[-1].append((letters, weight))
    return parts if len(parts) == 1 or "".join(text for text, _ in parts[-1]).strip() else parts[:-1]


def chunks(tokenizer: Any, parts: list[Weighted]) -> list[tuple[list[int], list[float]]]:
    """Ids and weights of each pass of a text encoder, start, end and padding included."""
    room = tokenizer.model_max_length - 2
    comma = tokenizer.convert_tokens_to_ids(",</w>")
    finished: list[list[tuple[int, float]]] = []
    for part in parts:
        pairs = [(i, w) for text, w in part for i in tokenizer(text, add_special_tokens=False).input_ids]
        current: list[tuple[int, float]] = []
        for pair in pairs:
            if len(current) == room:
                moved: list[tuple[int, float]] = []
                commas = [place for place, (i, _) in enumerate(current) if i == comma and room - place <= 20]
                if commas and pair[0] != comma:
                    current, moved = current[: commas[-1] + 1], current[commas[-1] + 1 :]
                finished.append(current)
                current = moved
            current.append(pair)
        finished.append(current)
    framed = []
    for chunk in finished:
        padding = room - len(chunk)
        ids = [tokenizer.bos_token_id, *(i for i, _ in chunk), tokenizer.eos_token_id]
        framed.append((ids + [tokenizer.pad_token_id] * padding, [1.0, *(w for _, w in chunk), 1.0] + [1.0] * padding))
    return framed


def embeds(
    pipe: Any,
    prompt: str,
    negative: str | None,
    *,
    weighted: bool = True,
    emphasis: str = "Original",
    prompt_2: str | None = None,
    clip_skip: int | None = None,
) -> dict[str, torch.Tensor]:
    """Keyword arguments of a StableDiffusion[XL]Pipeline; `clip_skip` is diffusers' own."""
    two = hasattr(pipe, "text_encoder_2")
    names = ["", "_2"] if two else [""]
    towers = [(getattr(pipe, f"tokenizer{n}"), getattr(pipe, f"text_encoder{n}")) for n in names]
    texts = {"": [prompt, prompt_2 or prompt][: len(towers)], "negative_": [negative or ""] * len(towers)}
    read = {
        side: [
            chunks(tokenizer, parse(text) if weighted else [[(text, 1.0)]])
            for (tokenizer, _), text in zip(towers, given, strict=True)
        ]
        for side, given in texts.items()
    }
    most = max(len(found) for side in read.values() for found in side)
    arguments = {}
    for side, found in read.items():
        wide = []
        for (tokenizer, tower), own in zip(towers, found, strict=True):
            filled = own + chunks(tokenizer, [[]]) * (most - len(own))
            states = []
            for place, (ids, weights) in enumerate(filled):
                with torch.no_grad():
                    output = tower(torch.tensor([ids]), output_hidden_states=True)
                skip = (clip_skip or 0) + (2 if two else 1)
                state = output.hidden_states[-skip]
                if not two:
                    state = tower.final_layer_norm(state)
                scaled = state * torch.tensor(weights)[None, :, None]
                if emphasis == "Original":
                    scaled *= state.mean() / scaled.mean()
                states.append(state if emphasis == "Ignore" else scaled)
                if place == 0 and two:
                    arguments[f"{side}pooled_prompt_embeds"] = output[0]  # the second tower's stays
            wide.append(torch.cat(states, dim=1))
        arguments[f"{side}prompt_embeds"] = torch.cat(wide, dim=-1)
    if two and negative is None:
        for name in ("negative_prompt_embeds", "negative_pooled_prompt_embeds"):
            arguments[name] = torch.zeros_like(arguments[name])
    return arguments
