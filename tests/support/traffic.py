"""What is asked of a device, counted with file and line; `tests/support/pretended_cuda.py` takes the notes."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from config.catalog import ROOT

Kind = Literal["kernel", "to device", "to host", "sent", "fetched", "wait", "driver call"]

SKIPPED = {__file__, str(Path(__file__).with_name("pretended_cuda.py"))}
"""Files whose lines say nothing about who asked."""
OWN_LAYERS = {f"Adapted{kind}.forward" for kind in ("Linear", "Conv2d", "LayerNorm", "GroupNorm")}
"""A network's layers in classes of this project; what they add of adapters is in functions of other names."""


NETWORKS = ("diffusers/models/", "transformers/models/", "pipelines/backends/halves.py:")
"""Where forward passes of networks are written."""


class Event(NamedTuple):
    """Something that was asked of the device."""

    kind: Kind
    operation: str
    site: str
    """Innermost line outside torch, such as `diffusers/schedulers/scheduling_ddim.py:453`."""
    by: str
    """Innermost line of this project that led there."""

    @property
    def of_a_model(self) -> bool:
        """Whether it belongs to the forward pass of a network, not to what surrounds it."""
        return self.site.startswith(NETWORKS)


@dataclass
class Traffic:
    """What was asked of the device while it counted."""

    events: list[Event] = field(default_factory=list)

    def counts(self) -> Counter[Kind]:
        """How many of each kind, forward passes of networks left out."""
        return Counter(event.kind for event in self.events if not event.of_a_model)

    def told(self, *kinds: Kind) -> str:
        """The lines that events of these kinds come from, the most frequent first, for messages."""
        lines = Counter(
            f"{e.kind} {e.operation} {e.site}" + (f" < {e.by}" if e.by != e.site else "")
            for e in self.events
            if e.kind in kinds and not e.of_a_model
        )
        return "\n".join(f"{count:5d} {line}" for line, count in lines.most_common())


counting: list[Traffic] = []
"""Who counts at the moment, innermost last."""


def note(kind: Kind, operation: str) -> None:
    if counting:
        site, by = _lines()
        counting[-1].events.append(Event(kind, operation, site, by))


def _lines() -> tuple[str, str]:
    """The innermost line outside torch, and the innermost one of this project."""
    site, frame = "", sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/site-packages/torch/" not in name and name not in SKIPPED and frame.f_code.co_qualname not in OWN_LAYERS:
            short = name.rpartition("/site-packages/")[2].removeprefix(f"{ROOT}/")
            line = f"{short}:{frame.f_lineno}"
            site = site or line
            if name.startswith(str(ROOT)):
                return site, line
        frame = frame.f_back  # type: ignore[assignment]
    return site, site
