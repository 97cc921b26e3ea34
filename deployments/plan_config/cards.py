"""The cards that a graph is planned for."""

from __future__ import annotations

import re
from dataclasses import dataclass

CLUSTER = "19x48,5x24"
"""The cards of the worker groups in k8s/base/rayservice.yaml, at their most."""


class PlanError(ValueError):
    """A graph that the cards do not hold; the message says what would fit."""


@dataclass(frozen=True)
class Cards:
    """Cards of one kind.

    Attributes:
        count: how many.
        gigabytes: memory of each, in 10^9 bytes.
        role: the label `sdgraph/role` of their nodes.
    """

    count: int
    gigabytes: float
    role: str


def parse_cards(text: str) -> tuple[Cards, Cards]:
    """Where denoisers and ControlNets lie, and where text encoders and VAEs do: the large cards and the small.

    Raises:
        PlanError: not `<number>x<gigabytes>`, once or twice with a comma between.
    """
    kinds = []
    for part in text.split(","):
        said = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,3})", part.strip())
        if said is None:
            raise PlanError(f"--gpus '{part}': write the number of cards and their GB, such as 2x80 or 2x80,1x24")
        kinds.append((int(said[2]), int(said[1])))
    if len(kinds) > 2 or len(kinds) != len({gigabytes for gigabytes, _ in kinds}):
        raise PlanError(f"--gpus '{text}': name one kind of card or two, each once, such as 2x80,1x24")
    (large, count), *smaller = sorted(kinds, reverse=True)
    cards = Cards(count, large, "large")
    return cards, Cards(smaller[0][1], smaller[0][0], "small") if smaller else cards
