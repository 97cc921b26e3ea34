"""The tvm backend: compiled programs that share one packed copy of the weights."""

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
from pipelines.backends.tvm.packing import Layout, aligned, layouts_of
from pipelines.backends.tvm.shapes import example_inputs
from pipelines.control.buffers import spread
from pipelines.errors import DenoiseError, InvalidValueError, UncompiledError

logger = logging.getLogger(__name__)

MEASURED_STEPS = 3


class PackedWeights:
    """A model's weights in the layouts that programs read; each layout is made once."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        """Pack from the tensors of a state dict. `pack` and `forget` release them, `remember` gives them again."""
        self._state = dict(state)
        self._packed: dict[tuple[str, Layout], Any] = {}
        self.seconds = 0.0

    def pack(self, artifacts: Iterable[Artifact]) -> None:
        """Pack every weight that the programs read, and release each unpacked weight as soon as it is packed."""
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
        """The packed weights of a program, in the order of its arguments."""
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
        """Give the same weights again, for programs that read layouts which are not packed yet."""
        self._state = dict(state)

    def forget(self) -> None:
        """Release the unpacked weights. The packed copy keeps those of a `plain` layout, whose memory it shares."""
        self._state = {}


@dataclass(frozen=True)
class Shape:
    """What selects a program, except the number of rows: size of the latents, ControlNet, LoRAs."""

    height: int
    width: int
    control: bool
    loras: bool = False


class Program:
    """One compiled UNet with its weights."""

    def __init__(self, cache: ArtifactCache, artifact: Artifact, weights: Sequence[Any]) -> None:
        """Load a compiled program.

        Raises:
            ArtifactError: the program's file cannot be loaded.
        """
        self.artifact = artifact
        try:
            library = tvm.runtime.load_module(str(cache.program(artifact)))
        except RuntimeError as error:
            raise ArtifactError(f"artifact {artifact.key.id} does not load: {error}; compile it again") from error
        self._main = relax.VirtualMachine(library, tvm.cpu())["main"]
        self._weights = list(weights)

    def run(self, inputs: Sequence[Tensor]) -> Tensor:
        """The model output. The inputs must have exactly the compiled number of rows."""
        arguments = [tvm_ffi.from_dlpack(aligned(tensor)) for tensor in inputs]
        return from_dlpack(self._main(*arguments, *self._weights))


class TvmDenoiser:
    """A Denoiser that runs compiled programs on the CPU. A shape without a program is an error.

    Inputs and outputs are float32, in whatever precision the programs multiply.
    """

    def __init__(
        self, config: Mapping[str, Any], programs: Sequence[Program], adapters: RowAdapters | None = None
    ) -> None:
        """Evaluate `programs`; `adapters` holds the LoRAs, None if no program applies any."""
        self.config = config
        self.adapters = adapters
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self._programs: Mapping[Shape, Mapping[int, Program]] = {}
        for program in programs:
            self.add(program)

    def add(self, program: Program) -> None:
        """Add a program. This may be called on any thread, also during an evaluation."""
        key, shape = program.artifact.key, shape_of(program.artifact.key)
        self._programs = {**self._programs, shape: {**self._programs.get(shape, {}), key.rows: program}}

    def takes_loras(self, shape: Shape) -> bool:
        """Whether rows of this shape may have LoRAs."""
        return self.adapters is not None and dataclasses.replace(shape, loras=True) in self._programs

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes that have a program."""
        return tuple(self._programs)

    def fit(self, file: AdapterFile) -> Adapter:
        """Return a LoRA in the form that the programs apply. This may be called on any thread.

        Raises:
            UncompiledError: it does not fit the UNet, or has parts that are no low-rank products, or too many ranks.
        """
        if self.adapters is None:
            raise UncompiledError("backend 'tvm' takes no LoRAs here", "backend")
        try:
            adapter = self.adapters.fit(file, self.device, self.dtype)
        except InvalidValueError as error:  # torch has the UNet's weights and may accept it
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
            DenoiseError: no program is compiled for this shape.
            UncompiledError: the prompts have more tokens than the programs read, or a row's LoRAs have too many ranks.
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
        """The number of rows that are computed only to fill the compiled batch sizes."""
        shape = self._needed(batch)
        runs = self._runs(shape, len(batch.sample))
        return sum(self._program(shape, last - first).artifact.key.rows - (last - first) for first, last in runs)

    def _residuals(self, batch: StepBatch) -> list[Tensor]:
        """ControlNet residuals of every row, zeros for rows without a ControlNet."""
        if batch.controlled is None:
            return []
        given = batch.controlled.pending.result().on(self.device, self.dtype)
        return list(spread(given, batch.controlled.rows, len(batch.sample)))

    def _runs(self, shape: Shape, count: int) -> list[tuple[int, int]]:
        """The rows of every run, as `(first, end)`: runs of the largest compiled batch size, then the rest."""
        most = max(self._programs[shape])
        return [(first, min(first + most, count)) for first in range(0, count, most)]

    def _padded(self, shape: Shape, inputs: list[Tensor], loras: Sequence[Mixture]) -> Tensor:
        """Run the smallest program that holds the rows; copies of the last row fill it and are dropped after it."""
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
        """The shape of a batch. Rows without LoRAs use a program with LoRAs if no other is compiled."""
        *_, height, width = batch.sample.shape
        shape = Shape(height, width, batch.controlled is not None, any(batch.loras))
        if not shape.loras and shape not in self._programs and self.takes_loras(shape):
            return dataclasses.replace(shape, loras=True)
        return shape


def shape_of(key: ArtifactKey) -> Shape:
    """The shape that the program of a key evaluates."""
    return Shape(key.height, key.width, key.control, key.loras)


def load_programs(cache: ArtifactCache, keys: Sequence[ArtifactKey], weights: PackedWeights) -> list[Program]:
    """Load the programs of those keys that are compiled and valid. A warning in the log names each damaged one."""
    programs = []
    for key in keys:
        try:
            if artifact := cache.find(key):
                programs.append(Program(cache, artifact, weights.arguments(artifact)))
        except ArtifactError as error:
            logger.warning("%s", error)
    return programs


def speedup(fast: TvmDenoiser, slow: Any, batch: StepBatch) -> float:
    """How many times as fast `fast` evaluates a batch as `slow`, measured in alternation."""
    taken_fast, taken_slow = _medians([fast, slow], batch)
    return taken_slow / taken_fast


def seconds(denoiser: Any, batch: StepBatch) -> float:
    """The median duration of three evaluations after a warm-up, in seconds."""
    (taken,) = _medians([denoiser], batch)
    return taken


def _medians(denoisers: Sequence[Any], batch: StepBatch) -> list[float]:
    """The same for several denoisers, which take turns."""
    taken: list[list[float]] = [[] for _ in denoisers]
    for step in range(MEASURED_STEPS + 1):
        for denoiser, own in zip(denoisers, taken, strict=True):
            begin = time.perf_counter()
            denoiser.predict(batch)
            if step:
                own.append(time.perf_counter() - begin)
    return [statistics.median(own) for own in taken]


def trial_batch(config: Mapping[str, Any], artifact: Artifact) -> StepBatch:
    """Random rows without ControlNet residuals, which a program is measured with."""
    generator = torch.Generator().manual_seed(0)
    key = artifact.key.model_copy(update={"control": False})
    sample, times, context, *added = (torch.randn(t.shape, generator=generator) for t in example_inputs(config, key))
    conditions = dict(zip(("text_embeds", "time_ids"), added, strict=False))  # SD has none of the two
    return StepBatch(sample, times.abs() * 300, context, conditions, [()] * key.rows)
