"""What the embedded models know: objects, background colours, drawn scenes, and how prompts speak of them."""

from __future__ import annotations

import random
from dataclasses import dataclass

# The word in a prompt -> the sprite's name.
OBJECTS = {
    "apple": "red apple",
    "banana": "banana",
    "butterfly": "butterfly",
    "cactus": "cactus",
    "car": "automobile",
    "cat": "cat face",
    "dog": "dog face",
    "donut": "doughnut",
    "fish": "tropical fish",
    "frog": "frog",
    "house": "house",
    "mushroom": "mushroom",
    "octopus": "octopus",
    "panda": "panda",
    "penguin": "penguin",
    "pizza": "pizza",
    "rocket": "rocket",
    "sailboat": "sailboat",
    "snowman": "snowman",
    "strawberry": "strawberry",
    "sunflower": "sunflower",
    "tiger": "tiger face",
    "tree": "evergreen tree",
    "turtle": "turtle",
}
# 24 named colours (sRGB), far enough apart to be told from each other.
COLOURS = {
    "red": (214, 32, 38),
    "orange": (250, 140, 20),
    "yellow": (252, 222, 45),
    "green": (40, 155, 60),
    "blue": (35, 90, 220),
    "purple": (128, 50, 175),
    "pink": (250, 150, 190),
    "brown": (125, 75, 40),
    "black": (18, 18, 20),
    "white": (248, 248, 248),
    "gray": (128, 128, 128),
    "cyan": (60, 215, 235),
    "navy": (18, 28, 90),
    "teal": (0, 125, 125),
    "beige": (235, 220, 185),
    "lime": (165, 230, 50),
    "maroon": (100, 10, 35),
    "olive": (115, 125, 30),
    "magenta": (225, 35, 155),
    "lavender": (190, 170, 240),
    "mint": (165, 240, 200),
    "coral": (255, 115, 95),
    "sky blue": (140, 195, 250),
    "gold": (200, 165, 60),
}
# Drawn scenes and the words for them.
SCENES = {
    "grass": ("on grass", "in a field", "on a green meadow"),
    "beach": ("on the beach", "at the beach", "on sand"),
    "snow": ("in the snow", "in winter", "on a snowy hill"),
    "night": ("at night", "under a starry sky", "under the stars"),
    "underwater": ("underwater", "under the sea", "in the ocean"),
}
BACKGROUNDS = (*COLOURS, *SCENES)
SOLID = (
    "{a} on a {c} background",
    "{a} on a {c} background",
    "{o}, {c} background",
    "{a} in front of a {c} wall",
    "{a} on {c}",
    "{a} against a plain {c} background",
)
# What people and style presets wrap around a prompt; it must not hide the prompt.
BEFORE = (
    "",
    "",
    "",
    "",
    "a picture of ",
    "a photo of ",
    "3d icon of ",
    "a drawing of ",
    "an illustration of ",
    "cute ",
)
AFTER = ("", "", "", "", "", ", highly detailed", ", sharp focus", ", studio light", ", 3d render", ", digital art")


@dataclass(frozen=True)
class Subject:
    """One composite's content: indices into OBJECTS and BACKGROUNDS; NOTHING for a part that has no name."""

    thing: int
    background: int

    @property
    def held_out(self) -> bool:
        """5 % of the pairs of object and colour are never trained on; the gates ask for them."""
        named = self.thing >= 0 and 0 <= self.background < len(COLOURS)
        return named and (self.thing * 7 + self.background * 11) % 20 == 3


NOTHING = -1
SUBJECTS = tuple(Subject(o, b) for o in range(len(OBJECTS)) for b in range(len(BACKGROUNDS)))
TRAINING = tuple(s for s in SUBJECTS if not s.held_out)
# A background alone, and an object on a colour without a name: what keeps one from depending on the other.
PARTS = (
    *(Subject(NOTHING, background) for background in range(len(BACKGROUNDS))),
    *(Subject(thing, NOTHING) for thing in range(len(OBJECTS))),
)
HELD_OUT = tuple(s for s in SUBJECTS if s.held_out)


def with_article(noun: str) -> str:
    """`a cat`, `an apple`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def caption(subject: Subject, rng: random.Random) -> str:
    """One way to ask for `subject`: usually all of it, sometimes the object or the background alone, 10 % nothing."""
    noun = tuple(OBJECTS)[subject.thing]
    place = BACKGROUNDS[subject.background]
    draw = rng.random()
    if draw < 0.10:
        return ""
    if subject.background == NOTHING or (draw < 0.18 and subject.thing != NOTHING):
        text = rng.choice((noun, with_article(noun)))
    elif subject.thing == NOTHING or draw < 0.22:
        text = f"a {place} background" if place in COLOURS else rng.choice(SCENES[place])
    elif place in COLOURS:
        text = rng.choice(SOLID).format(a=with_article(noun), o=noun, c=place)
    else:
        text = f"{rng.choice((noun, with_article(noun)))} {rng.choice(SCENES[place])}"
    return rng.choice(BEFORE) + text + rng.choice(AFTER)


def prompt(subject: Subject) -> str:
    """The plain way to ask for `subject`, which the gates use."""
    noun, place = with_article(tuple(OBJECTS)[subject.thing]), BACKGROUNDS[subject.background]
    return f"{noun} on a {place} background" if place in COLOURS else f"{noun} {SCENES[place][0]}"
