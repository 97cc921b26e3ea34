"""The tvm backend: compiled programs over one packed copy of the weights."""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import tvm
import tvm_ffi
from torch import Tensor
from torch.utils.dlpack import from_dlpack
from tvm import relax

from pipelines.adapters.layers import Adapter, Mixture
from pipelines.adapters.reading import AdapterFile
from pipelines.adapters.rows import RowAdapters
from pipelines.adapters.slots import BUCKETS, in_slots
from pipelines.backends.base import StepBatch
from pipelines.backends.tvm import convert  # noqa: F401  registers the attention that programs call
from pipelines.backends.tvm.artifacts import Artifact, ArtifactCache, ArtifactError, ArtifactKey
from pipelines.backends.tvm.low_rank import adapted
from pipelines.backends.tvm.packing import Layout, aligned
from pipelines.backends.tvm.shapes import example_inputs
from pipelines.control.buffers import spread
from pipelines.errors import DenoiseError, InvalidValueError, UncompiledError

logger = logging.getLogger(__name__)

MEASURED_STEPS = 3


class PackedWeights:
    """A model's weights in the layouts that programs ask for, each made once."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        """Pack from a state dict, which `pack` and `forget` let go of and `remember` brings back."""
        self._state = dict(state)
        self._packed: dict[tuple[str, Layout], Any] = {}
        self.seconds = 0.0

    def pack(self, artifacts: Iterable[Artifact]) -> None:
        """All that programs ask for, each unpacked weight let go of as soon as it is packed."""
        wanted: dict[str, dict[Layout, None]] = {}
        for artifact in artifacts:
            for name, layout in layouts_of(artifact):
                wanted.setdefault(name, {})[layout] = None
        for name, layouts in wanted.items():
            for layout in layouts:
                self._pack(name, layout)
            del self._state[name]
        self.forget()

    def arguments(self, artifact: Artifact) -> list[Any]:
        """The weights of a program, in its order."""
        names = layouts_of(artifact)
        for name, layout in names:
            self._pack(name, layout)
        return [self._packed[name] for name in names]

    def _pack(self, name: str, layout: Layout) -> None:
        if (name, layout) not in self._packed:
            begin = time.perf_counter()
            self._packed[name, layout] = tvm_ffi.from_dlpack(layout.pack(self._state[name]))
            self.seconds += time.perf_counter() - begin

    def remember(self, state: Mapping[str, Tensor]) -> None:
        """The same weights again, for programs that ask for layouts which are not packed yet."""
        self._state = dict(state)

    def forget(self) -> None:
        """Let go of the unpacked weights; plain ones live on in the packed copy."""
        self._state = {}


def layouts_of(artifact: Artifact) -> list[tuple[str, Layout]]:
    """Name and layout of each weight that a program takes, in its order."""
    return [(name, Layout(kind, panel, tile)) for name, kind, panel, tile in artifact.weights]  # type: ignore[arg-type]


@dataclass(frozen=True)
class Shape:
    """What selects a program, but for the number of rows."""

    height: int
    width: int
    control: bool
    loras: bool = False


class Program:
    """One compiled UNet with its weights."""

    def __init__(self, cache: ArtifactCache, artifact: Artifact, weights: Sequence[Any]) -> None:
        """Load it.

        Raises:
            ArtifactError: the file does not load.
        """
        self.artifact = artifact
        try:
            library = tvm.runtime.load_module(str(cache.program(artifact)))
        except RuntimeError as error:
            raise ArtifactError(f"artifact {artifact.key.id} does not load: {error}; compile it again") from error
        self._main = relax.VirtualMachine(library, tvm.cpu())["main"]
        self._weights = list(weights)

    def run(self, inputs: Sequence[Tensor]) -> Tensor:
        """The model output of exactly the compiled number of rows."""
        arguments = [tvm_ffi.from_dlpack(aligned(tensor)) for tensor in inputs]
        return from_dlpack(self._main(*arguments, *self._weights))


class TvmDenoiser:
    """A Denoiser over compiled programs, on the CPU. Shapes without a program are an error, never slow.

    Its inputs and outputs are float32, whatever its programs multiply.
    """

    def __init__(
        self, config: Mapping[str, Any], programs: Sequence[Program], adapters: RowAdapters | None = None
    ) -> None:
        """Evaluate `programs`, with LoRAs by `adapters` of the UNet's skeleton if there are some."""
        self.config = config
        self.adapters = adapters
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self._programs: Mapping[Shape, Mapping[int, Program]] = {}
        for program in programs:
            self.add(program)

    def add(self, program: Program) -> None:
        """Take one more program; on any thread, between or beside evaluations."""
        key, shape = program.artifact.key, shape_of(program.artifact.key)
        self._programs = {**self._programs, shape: {**self._programs.get(shape, {}), key.rows: program}}

    def takes_loras(self, shape: Shape) -> bool:
        """Whether rows of this shape may bring LoRAs."""
        return self.adapters is not None and dataclasses.replace(shape, loras=True) in self._programs

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Shapes it can evaluate."""
        return tuple(self._programs)

    def fit(self, file: AdapterFile) -> Adapter:
        """A LoRA for the programs. On any thread.

        Raises:
            UncompiledError: it does not fit, or some of it is no low-rank product that the slots have room for.
        """
        if self.adapters is None:
            raise UncompiledError("backend 'tvm' takes no LoRAs here", "backend")
        try:
            adapter = self.adapters.fit(file, self.device, self.dtype)
        except InvalidValueError as error:  # torch, which has the UNet's weights, may find that it fits
            raise UncompiledError(f"backend 'tvm': {error}. Only ['auto', 'torch'] allowed", "backend") from error
        if not in_slots(adapter):
            raise UncompiledError(
                f"backend 'tvm': {file.name} is more than low-rank products of {BUCKETS[-1]} ranks. "
                "Only ['auto', 'torch'] allowed with it",
                "backend",
            )
        return adapter

    @torch.inference_mode()
    def predict(self, batch: StepBatch) -> Tensor:
        """Evaluate the UNet for all rows, in as many runs as the compiled batch sizes ask for.

        Raises:
            DenoiseError: nothing is compiled for this shape.
            UncompiledError: the rows' context is longer than the programs', or a row brings more LoRAs than they take.
        """
        shape = self._needed(batch)
        if shape not in self._programs:
            raise DenoiseError(
                f"nothing is compiled for latents of {shape.width}x{shape.height}, control {shape.control}, "
                f"LoRAs {shape.loras}"
            )
        read = next(iter(self._programs[shape].values())).artifact.key.tokens
        if (tokens := batch.prompt_embeds.shape[1]) != read:
            raise UncompiledError(
                f"backend 'tvm': compiled UNets read {read} tokens, the prompts of this request take {tokens}. "
                "Only ['auto', 'torch'] allowed with them, or send long_prompt 'cut'",
                "backend",
            )
        inputs = [batch.sample, batch.timesteps, batch.prompt_embeds]
        inputs += [batch.added_conditions[name] for name in ("text_embeds", "time_ids") if batch.added_conditions]
        inputs += self._residuals(batch)
        return torch.cat(
            [
                self._padded(shape, [t[first:last] for t in inputs], batch.loras[first:last])
                for first, last in self._runs(shape, len(batch.sample))
            ]
        )

    def padding(self, batch: StepBatch) -> int:
        """Rows that only fill the compiled batch sizes."""
        shape = self._needed(batch)
        runs = self._runs(shape, len(batch.sample))
        return sum(self._program(shape, last - first).artifact.key.rows - (last - first) for first, last in runs)

    def _residuals(self, batch: StepBatch) -> list[Tensor]:
        """Residuals of every row, zero for those that nothing steers."""
        if batch.controlled is None:
            return []
        given = batch.controlled.pending.result().on(self.device, self.dtype)
        return list(spread(given, batch.controlled.rows, len(batch.sample)))

    def _runs(self, shape: Shape, count: int) -> list[tuple[int, int]]:
        """First and last row of every run: the largest compiled batch as often as it fills, then the rest."""
        most = max(self._programs[shape])
        return [(first, min(first + most, count)) for first in range(0, count, most)]

    def _padded(self, shape: Shape, inputs: list[Tensor], loras: Sequence[Mixture]) -> Tensor:
        """Run a program that holds the rows; the last row is repeated to fill it, and its copies dropped."""
        count = len(inputs[0])
        program = self._program(shape, count)
        rows = program.artifact.key.rows
        index = torch.arange(rows).clamp(max=count - 1)
        filled = inputs if rows == count else [tensor[index] for tensor in inputs]
        ready = [tensor.to(self.device, self.dtype) for tensor in filled]
        if not shape.loras or self.adapters is None:
            return program.run(ready)[:count]
        with self.adapters.active([loras[i] for i in index.tolist()]) as slots:
            if slots is not None:
                with adapted(self.adapters.modules):
                    return program.run(ready)[:count]
        if len(set(loras)) == 1:
            raise UncompiledError(
                "backend 'tvm': the LoRAs of this request have more ranks together than compiled UNets take. "
                "Only ['auto', 'torch'] allowed with them",
                "backend",
            )
        half = count // 2
        parts = slice(0, half), slice(half, count)
        return torch.cat([self._padded(shape, [t[part] for t in inputs], loras[part]) for part in parts])

    def _program(self, shape: Shape, count: int) -> Program:
        """The smallest program that holds `count` rows."""
        programs = self._programs[shape]
        return programs[min(rows for rows in programs if rows >= count)]

    def _needed(self, batch: StepBatch) -> Shape:
        """What a batch needs; a program for LoRAs serves where there is no other."""
        *_, height, width = batch.sample.shape
        shape = Shape(height, width, batch.controlled is not None, any(batch.loras))
        if not shape.loras and shape not in self._programs and self.takes_loras(shape):
            return dataclasses.replace(shape, loras=True)
        return shape


def shape_of(key: ArtifactKey) -> Shape:
    """What a program evaluates."""
    return Shape(key.height, key.width, key.control, key.loras)


def load_programs(cache: ArtifactCache, keys: Sequence[ArtifactKey], weights: PackedWeights) -> list[Program]:
    """The programs of those keys that are compiled and sound; the log says why another is not used."""
    programs = []
    for key in keys:
        try:
            if artifact := cache.find(key):
                programs.append(Program(cache, artifact, weights.arguments(artifact)))
        except ArtifactError as error:
            logger.warning("%s", error)
    return programs


def speedup(fast: TvmDenoiser, slow: Any, batch: StepBatch) -> float:
    """How many times faster `fast` evaluates a batch than `slow`: medians of three alternated steps each, after one."""
    seconds: dict[Any, list[float]] = {fast: [], slow: []}
    for step in range(MEASURED_STEPS + 1):
        for denoiser, taken in seconds.items():
            begin = time.perf_counter()
            denoiser.predict(batch)
            if step:
                taken.append(time.perf_counter() - begin)
    return statistics.median(seconds[slow]) / statistics.median(seconds[fast])


def seconds(denoiser: Any, batch: StepBatch) -> float:
    """The median of three evaluations, after one."""
    taken = []
    for step in range(MEASURED_STEPS + 1):
        begin = time.perf_counter()
        denoiser.predict(batch)
        if step:
            taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def trial_batch(config: Mapping[str, Any], artifact: Artifact) -> StepBatch:
    """Random rows for a program, no ControlNet: what the start-up measurement evaluates."""
    generator = torch.Generator().manual_seed(0)
    key = artifact.key.model_copy(update={"control": False})
    sample, times, context, *added = (torch.randn(t.shape, generator=generator) for t in example_inputs(config, key))
    conditions = dict(zip(("text_embeds", "time_ids"), added, strict=False))  # SD has none of the two
    return StepBatch(sample, times.abs() * 300, context, conditions, [()] * key.rows)
