"""The vocabulary of the embedded models: objects, colours, drawn scenes, styles, counts and relations."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import IntEnum

# The word in a prompt -> the sprite's name. New words go to the end: which pairs are held out goes by number.
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
    "astronaut": "astronaut",
    "horse": "horse",
    "airplane": "airplane",
    "balloon": "balloon",
    "bear": "bear",
    "bee": "honeybee",
    "bicycle": "bicycle",
    "bus": "bus",
    "cake": "birthday cake",
    "castle": "castle",
    "cow": "cow face",
    "crown": "crown",
    "dinosaur": "T-Rex",
    "dolphin": "dolphin",
    "duck": "duck",
    "elephant": "elephant",
    "fox": "fox",
    "guitar": "guitar",
    "hamburger": "hamburger",
    "helicopter": "helicopter",
    "ladybug": "lady beetle",
    "lion": "lion",
    "monkey": "monkey face",
    "motorcycle": "motorcycle",
    "owl": "owl",
    "pig": "pig face",
    "pineapple": "pineapple",
    "rabbit": "rabbit face",
    "rose": "rose",
    "shark": "shark",
    "train": "locomotive",
    "umbrella": "umbrella",
    "unicorn": "unicorn",
    "whale": "whale",
    "zebra": "zebra",
    "lemon": "lemon",
}
NOUNS = tuple(OBJECTS)
DRAWN = NOUNS[:24]
"""What the weights in models/ draw, each alone and in its own colours; all of NOUNS once weights of these are there."""
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
    "mars": ("on mars", "on the planet mars", "on the red planet"),
}
BACKGROUNDS = (*COLOURS, *SCENES)
# What a recoloured object can be, and which objects are seen recoloured.
TINTS = ("red", "yellow", "green", "blue", "purple", "pink")
TINTED = (
    *("apple", "butterfly", "car", "cat", "dog", "fish", "frog", "house", "mushroom", "octopus", "turtle", "horse"),
    *("balloon", "bus", "crown", "dinosaur", "elephant", "guitar", "helicopter", "rabbit", "rose", "umbrella"),
)
# Who is seen with what, on it or beside it.
RIDERS = ("astronaut", "cat", "dog", "frog", "monkey", "panda", "penguin", "rabbit")
# Where a rider's feet are on it, from its picture's left and top, in shares of its size.
MOUNTS = {
    "horse": (0.7, 0.4),
    "elephant": (0.55, 0.25),
    "motorcycle": (0.55, 0.4),
    "turtle": (0.55, 0.3),
    "car": (0.55, 0.22),
    "bus": (0.5, 0.15),
    "house": (0.5, 0.14),
    "tree": (0.5, 0.15),
}
RIDDEN = ("horse", "elephant", "motorcycle", "turtle")
NOTHING = -1


class Relation(IntEnum):
    """Where the first thing is, seen from the second; a picture's is never BESIDE, which words can be."""

    NONE = 0
    ON = 1
    LEFT = 2
    RIGHT = 3
    BESIDE = 4


@dataclass(frozen=True)
class Subject:
    """One composite's content: indices into NOUNS, BACKGROUNDS and TINTS; NOTHING for a part that has no name.

    Attributes:
        flat: drawn in flat colours, not as soft 3D.
        tint: the colour of the thing, NOTHING for its own.
        count: how many of the thing, 1 to 3.
        other: the thing that `relation` places the first one by.
    """

    thing: int
    background: int
    flat: bool = False
    tint: int = NOTHING
    count: int = 1
    relation: Relation = Relation.NONE
    other: int = NOTHING

    @property
    def held_out(self) -> bool:
        """5 % of the pairs of object and colour are never trained on; the gates ask for them."""
        named = self.thing >= 0 and 0 <= self.background < len(COLOURS)
        return named and (self.thing * 7 + self.background * 11) % 20 == 3


# One thing on one background.
SUBJECTS = tuple(Subject(o, b) for o in range(len(OBJECTS)) for b in range(len(BACKGROUNDS)))
TRAINING = tuple(s for s in SUBJECTS if not s.held_out)
# A background alone, and an object on a colour without a name: what keeps one from depending on the other.
PARTS = (
    *(Subject(NOTHING, background) for background in range(len(BACKGROUNDS))),
    *(Subject(thing, NOTHING) for thing in range(len(OBJECTS))),
)
HELD_OUT = tuple(s for s in SUBJECTS if s.held_out)
ASKED = tuple(s for s in HELD_OUT if s.thing < len(DRAWN))
"""The held-out pairs that the gates ask for."""
SEED_SUBJECT = Subject(
    NOUNS.index("astronaut"), BACKGROUNDS.index("mars"), relation=Relation.ON, other=NOUNS.index("horse")
)


def draw(rng: random.Random) -> Subject:
    """A random subject to be trained on: half of them one soft thing on one background, the rest of every other kind.

    A scene is as likely as three colours.
    """
    while True:
        subject = _draw(rng)
        if not subject.held_out:
            return subject


def _draw(rng: random.Random) -> Subject:
    kind = rng.random()
    background = rng.choice((*range(len(BACKGROUNDS)), *(2 * list(range(len(COLOURS), len(BACKGROUNDS))))))
    if kind < 0.06:
        return rng.choice(PARTS)
    if kind < 0.25:
        return _related(rng, background)
    thing = rng.randrange(len(NOUNS))
    if kind < 0.35:
        return Subject(thing, background, count=rng.choice((2, 3)))
    if kind < 0.43:
        return Subject(NOUNS.index(rng.choice(TINTED)), background, tint=rng.randrange(len(TINTS)))
    return Subject(thing, background, flat=kind < 0.55)


def _related(rng: random.Random, background: int) -> Subject:
    if rng.random() < 0.08:
        return SEED_SUBJECT
    relation = rng.choice((Relation.ON, Relation.ON, Relation.LEFT, Relation.RIGHT))
    rider, mount = NOUNS.index(rng.choice(RIDERS)), NOUNS.index(rng.choice(tuple(MOUNTS)))
    return Subject(rider, background, relation=relation, other=mount)
