"""Compiled UNets on disk: what makes one valid for a UNet, a shape and a machine, and how they are stored.

This module imports neither torch nor tvm, so that a process can find out what is compiled before it imports either.
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
"""Batch sizes that are compiled. Other numbers of rows are padded to the next larger one."""
LORA_ROWS = 2
"""The largest batch size that is compiled with LoRAs: one picture with guidance."""
LEVELS = {
    "x86-64-v4+bf16": ("avx512_bf16",),
    "x86-64-v4": ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
    "x86-64-v3": ("avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"),
}
"""Levels of processors, best first: those of the x86-64 psABI, and one whose processors multiply bfloat16. The values
are the CPU flags, as Linux names them, that a level adds to the one below it."""
PROGRAM, DESCRIPTION = "unet.so", "artifact.json"


def program_rows(batches: Iterable[int] = BATCHES) -> list[tuple[int, bool]]:
    """The programs to compile, as `(rows, with LoRAs)`.

    Programs with LoRAs have the rows of one picture. Several pictures with LoRAs run one after the other.
    """
    return [(rows, False) for rows in batches] + [(rows, True) for rows in batches if rows <= LORA_ROWS]


class ArtifactError(RuntimeError):
    """An artifact must not be loaded, because it is damaged or made for another machine; the message says which."""


class ArtifactKey(BaseModel):
    """Everything a compiled UNet depends on. Two keys that differ anywhere are two artifacts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: str
    """SHA-256 of the UNet's `config.json`, without entries that begin with an underscore (see `config_hash`)."""
    height: int
    width: int
    """Height and width of the latents."""
    rows: int
    """Batch size."""
    tokens: int
    """Length of the text conditioning, in tokens."""
    pooled: int
    """Width of the pooled prompt embeddings, 0 for SD."""
    control: bool
    """Whether the program takes a ControlNet's residuals."""
    loras: bool = False
    """Whether the program applies LoRAs."""
    level: str
    """The level of processors it was compiled for, one of `LEVELS`."""
    sources: str
    """SHA-256 of the compiler's own files."""
    dtype: Precision = "float32"
    """The number format that products multiply."""
    tvm: str = importlib.metadata.version("apache-tvm")
    tvm_ffi: str = importlib.metadata.version("apache-tvm-ffi")

    @property
    def id(self) -> str:
        """A hash of the key, which is the name of the artifact's folder."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:24]


class Artifact(BaseModel):
    """The description that is stored beside a compiled program."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: ArtifactKey
    """What the program was compiled for."""
    program: str
    """SHA-256 of the program's file."""
    weights: tuple[tuple[str, str, int, int], ...]
    """The program's arguments after its inputs, in order: `(name in the state dict, layout kind, panel, tile)`."""
    compile_seconds: float
    """How long it took to compile."""


def needed_flags(level: str) -> tuple[str, ...]:
    """The CPU flags that a machine must have to run programs of a level: its own and those of every level below."""
    names = list(LEVELS)
    return tuple(flag for name in names[names.index(level) :] for flag in LEVELS[name])


def best_level(flags: frozenset[str] | None = None, precision: Precision = "float32") -> str:
    """The best level of a machine, this one by default, for programs of a precision.

    Raises:
        ArtifactError: the processor lacks AVX2 or FMA, which every kernel uses.
    """
    have = processor_flags() if flags is None else flags
    for level in LEVELS:
        if precision == "float32" and level.endswith("+bf16"):
            continue  # float32 does not use its instructions, so one artifact serves both levels
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
    """What all programs that share one packed copy of the weights have in common."""

    precision: Precision
    level: str


def every_kind() -> tuple[ProgramKind, ...]:
    """All kinds of programs, the best first.

    None of them is float32 at the level of bfloat16, whose instructions float32 does not use.
    """
    kinds = [ProgramKind("bfloat16", level) for level in LEVELS]
    return (*kinds, *(ProgramKind("float32", level) for level in LEVELS if not level.endswith("+bf16")))


def program_kinds(wanted: WantedPrecision, flags: frozenset[str] | None = None) -> tuple[ProgramKind, ...]:
    """Kinds that a machine, by default this one, can run in the wanted precision, best first; empty if it is too old.

    `auto` means bfloat16 if the processor has the instruction for it, and then float32.
    """
    have = processor_flags() if flags is None else flags
    kinds = [kind for kind in every_kind() if have.issuperset(needed_flags(kind.level))]
    if wanted == "auto":
        return tuple(kind for kind in kinds if kind.precision == "float32" or kind.level.endswith("+bf16"))
    return tuple(kind for kind in kinds if kind.precision == wanted)


class ArtifactCache:
    """A folder of artifacts that processes and machines share; in production it is on a PersistentVolumeClaim."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, key: ArtifactKey, flags: frozenset[str] | None = None) -> Artifact | None:
        """Return the artifact of a key, or None if it is not compiled.

        Args:
            key: the program that is wanted.
            flags: CPU flags of the machine that will run it, by default of this one.

        Raises:
            ArtifactError: the artifact is damaged, or the machine lacks instructions that it uses.
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
        """The path of an artifact's shared library."""
        return self.folder / artifact.key.id / PROGRAM

    def make(self, key: ArtifactKey, build: Callable[[Path], Artifact]) -> tuple[Artifact, bool]:
        """Return the artifact of a key, built now if it is missing or damaged, and whether it was built now.

        Other threads and processes that ask for the same key meanwhile wait and get the same artifact. It appears by
        one rename, so that `find` never sees a half-written one.

        Args:
            key: the program that is wanted.
            build: writes the program to the path that it is given, and returns its description.
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
