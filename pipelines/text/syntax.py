"""Prompts as people write them: weights in brackets, BREAK, and LoRA tags. Pure text: the ingress reads it too.

The rules are AUTOMATIC1111's (`modules/prompt_parser.py`, `modules/extra_networks.py`), whose prompts people exchange:
`(x)` is 1.1 times as strong, `[x]` 1.1 times weaker, `(x:1.3)` 1.3 times as strong, nested ones multiply; a backslash
makes the next bracket text; a bracket that nothing opened is text, and one that nothing closes reaches to the end.
Two things differ: BREAK also works inside brackets, and what is not a number after a colon is text, not an exception.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipelines.errors import InvalidValueError
from pipelines.plan import PromptSyntax

STRONGER = 1.1
"""Factor of round brackets without a number; square ones divide by it."""
MAX_WEIGHT = 100
"""Weights lie between this and its negative, nested ones multiplied out."""
LORA_TAG_FORM = "<lora:name>, <lora:name:weight> or <lora:name:text encoder weight:UNet weight>"

# Each alternative looks at a character a bounded number of times, so reading takes linear time.
_SYMBOL = re.compile(r"\\[()\[\]\\]|\\|[()\[\]]|:\s*([+-]?[.\d]+)\s*\)|[^\\()\[\]:]+|:")
_BREAK = re.compile(r"\bBREAK\b")
_LORA_TAG = re.compile(r"<lora:([^<>]*)>", re.IGNORECASE)

Bracket = Literal["(", "["]


@dataclass(frozen=True)
class Fragment:
    """A run of text of one weight."""

    text: str
    weight: float


Section = tuple[Fragment, ...]
"""What lies between two BREAKs."""


@dataclass(frozen=True)
class LoraTag:
    """A LoRA asked for inside a prompt."""

    name: str
    text_encoder: float
    unet: float


@dataclass
class _Open:
    """A bracket, and the factor that its end gave it."""

    kind: Bracket
    factor: float


@dataclass(frozen=True)
class _Close:
    """The end of the innermost open bracket of its kind."""

    kind: Bracket


_Event = _Open | _Close | str | None
"""None is a BREAK."""


def read_sections(text: str, syntax: PromptSyntax) -> tuple[Section, ...]:
    """The text between BREAKs, each as runs of one weight; at least one section.

    A BREAK at the end adds nothing; one at the beginning, or after another, leaves an empty section.
    """
    if syntax == "plain":
        return ((Fragment(text, 1.0),),)
    sections: list[list[Fragment]] = [[]]
    products: dict[Bracket, list[float]] = {"(": [1.0], "[": [1.0]}
    for event in _events(text):
        match event:
            case _Open(kind, factor):
                products[kind].append(products[kind][-1] * factor)
            case _Close(kind):
                products[kind].pop()
            case str():
                sections[-1].append(Fragment(event, products["("][-1] * products["["][-1]))
            case None:
                sections.append([])
    read = [_joined(section) for section in sections]
    if len(read) > 1 and not any(fragment.text.strip() for fragment in read[-1]):
        read.pop()
    return tuple(read)


def check_weights(text: str, param: str) -> None:
    """Raise InvalidValueError where a weight of weighted text is out of range; `param` names the request's field."""
    for section in read_sections(text, "weighted"):
        for fragment in section:
            if not (math.isfinite(fragment.weight) and abs(fragment.weight) <= MAX_WEIGHT):
                shown = fragment.text.strip()[:40]
                raise InvalidValueError(
                    f"{param}: the weight {fragment.weight:g} of '{shown}' is out of range: "
                    f"{-MAX_WEIGHT} to {MAX_WEIGHT}, nested brackets multiplied",
                    param,
                )


def take_lora_tags(text: str, param: str) -> tuple[str, tuple[LoraTag, ...]]:
    """The text without its LoRA tags, and the tags in order.

    Raises:
        InvalidValueError: a tag without a name, or with a weight that is not a number.
    """
    tags = tuple(_lora_tag(match.group(1), param) for match in _LORA_TAG.finditer(text))
    return _LORA_TAG.sub("", text), tags


def _lora_tag(inside: str, param: str) -> LoraTag:
    """Read `name:weights`, which A1111 also lets write as `te=` and `unet=`; the UNet's weight follows the text's."""
    name, *given = (part.strip() for part in inside.split(":"))
    named = dict(part.split("=", 1) for part in given if "=" in part)
    positional = [part for part in given if "=" not in part]
    weights = [_number(part) for part in positional]
    text_encoder = _number(named.pop("te")) if "te" in named else weights[0] if weights else 1.0
    unet = _number(named.pop("unet")) if "unet" in named else weights[1] if len(weights) > 1 else text_encoder
    finite = all(weight is not None and math.isfinite(weight) for weight in (*weights, text_encoder, unet))
    if not (name and finite) or named or len(weights) > 2 or text_encoder is None or unet is None:
        raise InvalidValueError(f"{param}: '<lora:{inside[:80]}>' cannot be read; write {LORA_TAG_FORM}", param)
    return LoraTag(name, text_encoder, unet)


def _events(text: str) -> list[_Event]:
    """Brackets and text in order. A bracket's factor stands at its end, so it is filled in when that is met."""
    events: list[_Event] = []
    opened: dict[Bracket, list[_Open]] = {"(": [], "[": []}

    def begin(kind: Bracket, factor: float) -> None:
        opened[kind].append(_Open(kind, factor))
        events.append(opened[kind][-1])

    def end(kind: Bracket, factor: float | None = None) -> None:
        bracket = opened[kind].pop()
        bracket.factor = bracket.factor if factor is None else factor
        events.append(_Close(kind))

    for match in _SYMBOL.finditer(text):
        symbol, number = match.group(0), match.group(1)
        if symbol.startswith("\\"):
            events.append(symbol[1:])
        elif symbol == "(":
            begin("(", STRONGER)
        elif symbol == "[":
            begin("[", 1 / STRONGER)
        elif number is not None and opened["("]:
            factor = _number(number)
            if factor is None:
                events.append(symbol[:-1])
            end("(", factor)
        elif symbol == ")" and opened["("]:
            end("(")
        elif symbol == "]" and opened["["]:
            end("[")
        else:
            events += _between_breaks(symbol)
    return events


def _between_breaks(text: str) -> Iterator[str | None]:
    """Text with its BREAKs, and without the spaces around them."""
    parts = _BREAK.split(text)
    for index, part in enumerate(parts):
        if index:
            yield None
            part = part.lstrip()
        yield part if index == len(parts) - 1 else part.rstrip()


def _joined(section: list[Fragment]) -> Section:
    """Runs of one weight, each as one text: the tokenizer then sees whole words."""
    runs = itertools.groupby(section, lambda fragment: fragment.weight)
    joined = (Fragment("".join(fragment.text for fragment in run), weight) for weight, run in runs)
    return tuple(fragment for fragment in joined if fragment.text)


def _number(text: str) -> float | None:
    """The number that a text is; None where it is none. More digits than a float holds are infinity."""
    try:
        return float(text)
    except ValueError:
        return None
