"""Prompts for a subject: a grammar of templates with synonyms and short forms."""

from __future__ import annotations

import random
from dataclasses import replace

from training.words import BACKGROUNDS, COLOURS, NOTHING, NOUNS, RIDDEN, SCENES, TINTS, Relation, Subject

SOLID = (
    "{a} on a {c} background",
    "{a} on a {c} background",
    "{a}, {c} background",
    "{a} in front of a {c} wall",
    "{a} on {c}",
    "{a} against a plain {c} background",
)
# What people and style presets wrap around a prompt; it must not hide the prompt.
BEFORE = (
    *("", "", "", "", "a picture of ", "a photo of ", "a photo of ", "3d icon of ", "a drawing of ", "a 3d render of "),
    *("an illustration of ", "cute ", "an image of "),
)
AFTER = ("", "", "", "", "", ", highly detailed", ", sharp focus", ", studio light", ", 3d render", ", digital art")
FLAT = ("flat icon of {}", "a flat illustration of {}", "{}, flat style", "{}, flat design", "flat emoji of {}")
PLURALS = {"butterfly": "butterflies", "cactus": "cacti", "fish": "fish", "octopus": "octopuses", "bus": "buses"}
NUMBERS = {2: "two", 3: "three"}
RELATIONS = {
    Relation.ON: ("on", "on top of"),
    Relation.LEFT: ("to the left of", "left of"),
    Relation.RIGHT: ("to the right of", "right of"),
    Relation.BESIDE: ("beside", "next to", "and"),
}


def with_article(noun: str) -> str:
    """`a cat`, `an apple`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _things(subject: Subject, bare: bool = False) -> str:
    """`a blue apple`, or `blue apple`; `two cats`."""
    noun = NOUNS[subject.thing]
    if subject.count > 1:
        noun = PLURALS.get(noun, noun + "s")
    if subject.tint != NOTHING:
        noun = f"{TINTS[subject.tint]} {noun}"
    if subject.count > 1:
        return f"{NUMBERS[subject.count]} {noun}"
    return noun if bare else with_article(noun)


def spoken(subject: Subject, rng: random.Random) -> tuple[str, Subject]:
    """A random prompt for `subject`, and the parts of it that the prompt mentions.

    Usually all of it, sometimes the things or the background alone, in one of ten nothing.
    """
    nothing = Subject(NOTHING, NOTHING)
    share = rng.random()
    if share < 0.10:
        return "", nothing
    if subject.thing == NOTHING or (share < 0.14 and subject.background != NOTHING):
        place = BACKGROUNDS[subject.background]
        text = f"a {place} background" if place in COLOURS else rng.choice(SCENES[place])
        return rng.choice(BEFORE) + text + rng.choice(AFTER), Subject(NOTHING, subject.background)
    said = subject
    text = _things(subject, bare=rng.random() < 0.25)
    if subject.relation != Relation.NONE:
        relation = subject.relation
        if relation != Relation.ON and rng.random() < 0.4:
            relation = Relation.BESIDE
        said = replace(said, relation=relation)
        words = rng.choice(RELATIONS[relation])
        mount = NOUNS[subject.other]
        if relation == Relation.ON and mount in RIDDEN and rng.random() < 0.6:
            words = "riding"
        text = f"{text} {words} {with_article(mount)}"
    if subject.background != NOTHING and share < 0.22:
        said = replace(said, background=NOTHING)
    elif subject.background != NOTHING:
        place = BACKGROUNDS[subject.background]
        template = rng.choice(SOLID) if place in COLOURS else f"{{a}} {rng.choice(SCENES[place])}"
        text = template.format(a=text, c=place)
    if subject.flat:
        return rng.choice(FLAT).format(text), said
    return rng.choice(BEFORE) + text + rng.choice(AFTER), said


def caption(subject: Subject, rng: random.Random) -> str:
    """One way to ask for `subject`."""
    return spoken(subject, rng)[0]


def prompt(subject: Subject) -> str:
    """The plain way to ask for `subject`, which the gates use."""
    text = _things(subject)
    if subject.relation != Relation.NONE:
        mount = NOUNS[subject.other]
        riding = subject.relation == Relation.ON and mount in RIDDEN
        text = f"{text} {'riding' if riding else RELATIONS[subject.relation][0]} {with_article(mount)}"
    place = BACKGROUNDS[subject.background]
    text = f"{text} on a {place} background" if place in COLOURS else f"{text} {SCENES[place][0]}"
    return f"flat icon of {text}" if subject.flat else text
