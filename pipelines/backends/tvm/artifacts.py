"""Compiled UNets on disk: what makes one valid for a UNet, a shape and a machine, and how they are kept.

Needs neither torch nor tvm: whether something is compiled is known before either is imported.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from config.precision import Precision, WantedPrecision
from pipelines.processor import processor_flags

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
COMPILER_SOURCES = (
    *("bfloat16.py", "compile.py", "convert.py", "lower.py", "norms.py", "packing.py"),
    *("feature_maps.py", "low_rank.py", "products.py", "shapes.py", "tir.py", "winograd.py"),
)
BATCHES = (1, 2, 4, 8)
"""Rows that are compiled; others are padded to the next."""
LORA_ROWS = 2
"""Most rows of a program that takes LoRAs."""
LEVELS = {
    "x86-64-v4+bf16": ("avx512_bf16",),
    "x86-64-v4": ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
    "x86-64-v3": ("avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"),
}
"""Processor levels of the x86-64 psABI and one that multiplies bfloat16, best first, and the flags Linux shows for what
each adds to the one below."""
PROGRAM, DESCRIPTION = "unet.so", "artifact.json"


def program_rows(batches: Iterable[int] = BATCHES) -> list[tuple[int, bool]]:
    """Rows, and whether with LoRAs: those are for single pictures, which more pictures take turns in."""
    return [(rows, False) for rows in batches] + [(rows, True) for rows in batches if rows <= LORA_ROWS]


class ArtifactError(RuntimeError):
    """An artifact that must not be loaded: damaged, or made for another machine; the message says which and why."""


class ArtifactKey(BaseModel):
    """Everything a compiled UNet depends on. Two keys that differ anywhere are two artifacts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: str
    """SHA-256 of the UNet's `config.json`, without what only names it."""
    height: int
    width: int
    """Height and width are of the latents."""
    rows: int
    """Batch size."""
    tokens: int
    """Context length."""
    pooled: int
    """Width of the pooled text, 0 for SD."""
    control: bool
    """Whether it takes a ControlNet's residuals."""
    loras: bool = False
    """Whether it takes LoRAs."""
    level: str
    """The processor it was made for, one of `LEVELS`."""
    sources: str
    """SHA-256 of the compiler's own files."""
    dtype: Precision = "float32"
    """What is multiplied."""
    tvm: str = importlib.metadata.version("apache-tvm")
    tvm_ffi: str = importlib.metadata.version("apache-tvm-ffi")

    @property
    def id(self) -> str:
        """Names the artifact's folder."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:24]


class Artifact(BaseModel):
    """What is written beside the program."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: ArtifactKey
    """What it was made for."""
    program: str
    """SHA-256 of the program."""
    weights: tuple[tuple[str, str, int, int], ...]
    """`(name in the state dict, layout kind, panel, tile)` of every argument after the inputs, in order."""
    compile_seconds: float
    """How long it took to compile."""


def needed_flags(level: str) -> tuple[str, ...]:
    """Flags a machine must have to run programs of a level: its own and those of every level below."""
    names = list(LEVELS)
    return tuple(flag for name in names[names.index(level) :] for flag in LEVELS[name])


def best_level(flags: frozenset[str] | None = None, precision: Precision = "float32") -> str:
    """The best level of a machine, this one by default, for programs of a precision.

    Raises:
        ArtifactError: the kernels are written for AVX2 and up.
    """
    have = processor_flags() if flags is None else flags
    for level in LEVELS:
        if precision == "float32" and level.endswith("+bf16"):
            continue  # nothing that float32 needs: one artifact serves both kinds of machines
        if have.issuperset(needed_flags(level)):
            return level
    raise ArtifactError(f"this processor reaches none of {list(LEVELS)}: backend tvm needs AVX2 and FMA")


def sources_hash(folder: Path = HERE) -> str:
    """SHA-256 over the compiler's own files."""
    digest = hashlib.sha256()
    for name in COMPILER_SOURCES:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of a UNet's configuration, without private entries such as `_name_or_path`."""
    shown = {key: value for key, value in config.items() if not key.startswith("_")}
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


class ProgramKind(NamedTuple):
    """What programs have in common that share packed weights."""

    precision: Precision
    level: str


def every_kind() -> tuple[ProgramKind, ...]:
    """The kinds there are; float32 has no use for the instructions of bfloat16."""
    kinds = [ProgramKind("bfloat16", level) for level in LEVELS]
    return (*kinds, *(ProgramKind("float32", level) for level in LEVELS if not level.endswith("+bf16")))


def program_kinds(wanted: WantedPrecision, flags: frozenset[str] | None = None) -> tuple[ProgramKind, ...]:
    """Kinds that a machine, this one by default, can run in the wanted precision, best first; none if it is too old.

    `auto` takes bfloat16 by the processor's instruction, and float32 where nothing is compiled so.
    """
    have = processor_flags() if flags is None else flags
    kinds = [kind for kind in every_kind() if have.issuperset(needed_flags(kind.level))]
    if wanted == "auto":
        return tuple(kind for kind in kinds if kind.precision == "float32" or kind.level.endswith("+bf16"))
    return tuple(kind for kind in kinds if kind.precision == wanted)


class ArtifactCache:
    """A folder of artifacts, shared by processes and machines; a PVC in production."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, key: ArtifactKey, flags: frozenset[str] | None = None) -> Artifact | None:
        """The artifact of a key, None if it is not compiled.

        Args:
            key: what is wanted.
            flags: of the machine that will run it, this one by default.

        Raises:
            ArtifactError: it is there, but damaged, or this machine lacks instructions it uses.
        """
        folder = self.folder / key.id
        if not folder.is_dir():
            return None
        try:
            artifact = Artifact.model_validate_json((folder / DESCRIPTION).read_text())
            program = hashlib.sha256((folder / PROGRAM).read_bytes()).hexdigest()
        except (OSError, ValidationError) as error:
            raise ArtifactError(f"artifact {key.id} is damaged: {error}; compile it again") from error
        if artifact.key != key or artifact.program != program:
            raise ArtifactError(f"artifact {key.id} is damaged: its content is not what was written; compile it again")
        have = processor_flags() if flags is None else flags
        if missing := [flag for flag in needed_flags(key.level) if flag not in have]:
            raise ArtifactError(f"artifact {key.id} is for {key.level}; this processor has no {', '.join(missing)}")
        return artifact

    def program(self, artifact: Artifact) -> Path:
        """The shared library of an artifact."""
        return self.folder / artifact.key.id / PROGRAM

    def make(self, key: ArtifactKey, build: Callable[[Path], Artifact]) -> tuple[Artifact, bool]:
        """The artifact of a key, built if it is missing or damaged; and whether it was built now.

        Whoever asks for the same key meanwhile, in whatever process, waits and gets the same. An artifact appears by
        one rename, so a half-written one is never found.

        Args:
            key: what is wanted.
            build: writes the program to the path it is given and describes it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f"{key.id}.lock"):
            try:
                if found := self.find(key):
                    return found, False
            except ArtifactError as error:
                logger.warning("%s: making it anew", error)
            for stale in self.folder.glob(f"{key.id}.*.partial"):  # of a process that died
                shutil.rmtree(stale, ignore_errors=True)
            scratch = Path(tempfile.mkdtemp(prefix=f"{key.id}.", suffix=".partial", dir=self.folder))
            try:
                artifact = build(scratch / PROGRAM)
                (scratch / DESCRIPTION).write_text(artifact.model_dump_json(indent=1))
                shutil.rmtree(self.folder / key.id, ignore_errors=True)
                os.replace(scratch, self.folder / key.id)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            return artifact, True
