"""What is compiled while the server serves: what is asked for, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from config.precision import WantedPrecision
from pipelines.plan import CompiledSize, StagePlan

CompileMode = Literal["ahead", "on_demand", "tables"]
"""`ahead`: `make compile` alone. `on_demand`: a size by its first request too. `tables`: the models' tables of sizes,
from the start on, as well."""
CompilingState = Literal["waiting", "compiling", "loading", "failed"]


@dataclass(frozen=True)
class Compiling:
    """Where programs are, and how they come there."""

    folder: Path
    mode: CompileMode = "ahead"
    most_sizes: int = 0
    """Sizes that a UNet may have compiled while it serves, those that it had before included."""
    precision: WantedPrecision = "float32"
    """Of the programs that are loaded and compiled."""


@dataclass(frozen=True)
class WantedProgram:
    """A program that a UNet should have."""

    width: int
    height: int
    """Width and height are in pixels."""
    control: bool
    """Whether ControlNets may steer it."""
    rows: int
    """Of a picture: two with guidance, one without. More pictures are so many runs, which cost a CPU no more."""
    loras: bool = False
    """Whether requests may bring LoRAs; those that bring none have a program without room for them."""

    @classmethod
    def of(cls, stage: StagePlan) -> WantedProgram:
        """What a stage needs."""
        rows = 2 if stage.guided else 1
        return cls(stage.width, stage.height, bool(stage.controls), rows, bool(stage.loras))

    def is_of(self, size: CompiledSize) -> bool:
        """Whether what runs this size runs the program's rows."""
        same = (size.width, size.height, size.control) == (self.width, self.height, self.control)
        return same and (size.loras or not self.loras)

    @property
    def without_loras(self) -> WantedProgram:
        """The same for requests that bring none."""
        return replace(self, loras=False)


@dataclass(frozen=True)
class CompilingSize:
    """A size that is not ready yet."""

    component: str
    """The UNet."""
    width: int
    height: int
    control: bool
    state: CompilingState

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class RefusedSize:
    """A size that is compiled, but not in a form that this replica runs."""

    component: str
    """The UNet."""
    width: int
    height: int
    control: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class CompileReport:
    """What a replica can run by now, and what it works on."""

    sizes: tuple[CompiledSize, ...]
    pending: tuple[CompilingSize, ...]
    refused: tuple[RefusedSize, ...] = ()
