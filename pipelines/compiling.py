"""Types that describe compiling while the server serves: wanted programs, and how far each one is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from config.precision import WantedPrecision
from pipelines.plan import CompiledSize, StagePlan

CompileMode = Literal["ahead", "on_demand", "tables"]
"""`ahead`: only `make compile` compiles. `on_demand`: the first request of a size has it compiled too. `tables`: the
server also compiles the sizes in its models' tables, beginning when it starts."""
CompilingState = Literal["waiting", "compiling", "loading", "failed"]


@dataclass(frozen=True)
class Compiling:
    """Where compiled programs are kept, and when they are compiled."""

    folder: Path
    mode: CompileMode = "ahead"
    most_sizes: int = 0
    """The largest number of sizes for which a UNet has programs; those compiled before the start count."""
    precision: WantedPrecision = "float32"
    """Precision of the programs that are loaded and compiled."""


@dataclass(frozen=True)
class WantedProgram:
    """A program that a UNet should have."""

    width: int
    height: int
    """Width and height are in pixels."""
    control: bool
    """Whether ControlNets may steer it."""
    rows: int
    """Rows of one picture: two with guidance, one without. Several pictures run one after the other, which takes
    a CPU no longer than one larger batch."""
    loras: bool = False
    """Whether the program applies LoRAs. Requests without LoRAs use a program that applies none."""

    @classmethod
    def of(cls, stage: StagePlan) -> WantedProgram:
        """The program that a stage needs."""
        rows = 2 if stage.guided else 1
        return cls(stage.width, stage.height, bool(stage.controls), rows, bool(stage.loras))

    def is_of(self, size: CompiledSize) -> bool:
        """Whether a UNet with this size compiled can do what the program is wanted for."""
        same = (size.width, size.height, size.control) == (self.width, self.height, self.control)
        return same and (size.loras or not self.loras)

    @property
    def without_loras(self) -> WantedProgram:
        """The same program for requests without LoRAs."""
        return replace(self, loras=False)


@dataclass(frozen=True)
class UnavailableSize:
    """A size that a UNet cannot draw now on the tvm backend."""

    component: str
    """Component id of the UNet."""
    width: int
    height: int
    control: bool

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class CompilingSize(UnavailableSize):
    """A size that is not ready yet, and how far it is."""

    state: CompilingState


@dataclass(frozen=True)
class RefusedSize(UnavailableSize):
    """A size that is compiled, but whose program this replica does not run; `reason` says why."""

    reason: str


@dataclass(frozen=True)
class CompileReport:
    """The sizes a replica can run now, those it still compiles, and those it does not run."""

    sizes: tuple[CompiledSize, ...]
    pending: tuple[CompilingSize, ...]
    refused: tuple[RefusedSize, ...] = ()
