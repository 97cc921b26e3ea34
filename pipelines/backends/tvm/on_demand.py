"""Programs that are compiled for one UNet while it serves: for the first request of a size, or for its models' tables.

A thread makes one wanted program after the other. Each is compiled in a subprocess, loaded here and measured against
torch; only then can `TvmDenoiser` choose it. Requests are served meanwhile.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from config.catalog import Catalog
from pipelines.backends.base import StepBatch
from pipelines.backends.torch_backend import TorchDenoiser
from pipelines.backends.tvm.artifacts import Artifact, ArtifactCache, ArtifactKey
from pipelines.backends.tvm.compile_subprocess import compile_in_subprocess
from pipelines.backends.tvm.denoiser import TvmDenoiser, load_programs, speedup, trial_batch
from pipelines.backends.tvm.loading import CompiledDenoiser, size_table
from pipelines.backends.tvm.shapes import artifact_key, residual_shapes
from pipelines.compiling import CompileReport, CompilingSize, CompilingState, WantedProgram
from pipelines.control.residuals import ReadyResiduals, Residuals
from pipelines.control.types import ControlledRows
from pipelines.plan import CompiledSize
from pipelines.weights.files import read_config

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

logger = logging.getLogger(__name__)

Compile = Callable[[ArtifactCache, Mapping[str, Any], ArtifactKey], Artifact]


class OnDemand:
    """The compiled programs of one UNet, and those that are being compiled. It is thread-safe."""

    def __init__(
        self,
        catalog: Catalog,
        component_id: str,
        cache: ArtifactCache,
        compiled: CompiledDenoiser,
        load_unet: Callable[[], UNet2DConditionModel],
        most_sizes: int,
        compile_program: Compile = compile_in_subprocess,
    ) -> None:
        """Set up; nothing is compiled before the first call of `want`.

        Args:
            catalog: describes the UNet.
            component_id: id of the UNet.
            cache: the folder of compiled programs.
            compiled: the programs that exist already; new ones are added to its denoiser.
            load_unet: loads the UNet in torch, which is kept only while a program is measured.
            most_sizes: the largest number of sizes, including those in `compiled`; no program of another size is made.
            compile_program: compiles an artifact, and raises if that fails.
        """
        self._catalog = catalog
        self._component = component_id
        self._cache = cache
        self._denoiser = compiled.denoiser
        self._weights = compiled.weights
        self._kind = compiled.kind
        self._load_unet = load_unet
        self._most = most_sizes
        self._compile = compile_program
        self._sizes = {(size.width, size.height, size.control): size for size in compiled.sizes}
        self._states: dict[WantedProgram, CompilingState] = {}
        self._lock = threading.Lock()
        self._working = False

    def want(self, *programs: WantedProgram) -> None:
        """Queue programs, except those that exist, are queued, failed before, or would exceed the number of sizes."""
        with self._lock:
            for wanted in dict.fromkeys(each for w in programs for each in (w.without_loras, w)):
                if wanted not in self._states and not self._holds(wanted) and self._has_room(wanted):
                    self._states[wanted] = "waiting"
            if not self._working and "waiting" in self._states.values():
                self._working = True
                threading.Thread(target=self._work, name="on-demand", daemon=True).start()

    def holds(self, wanted: WantedProgram) -> bool:
        """Whether this UNet can run the program now."""
        with self._lock:
            return self._holds(wanted)

    def report(self) -> CompileReport:
        """The sizes that can be run, and those that are queued, being compiled, or failed."""
        with self._lock:
            sizes = tuple(self._sizes.values())
            states = {(w.width, w.height, w.control): state for w, state in self._states.items()}
        pending = (CompilingSize(self._component, *size, state) for size, state in states.items())
        return CompileReport(sizes, tuple(pending))

    def _holds(self, wanted: WantedProgram) -> bool:
        return any(wanted.is_of(size) for size in self._sizes.values())

    def _has_room(self, wanted: WantedProgram) -> bool:
        sizes = {(w, h) for w, h, _ in self._sizes} | {(w.width, w.height) for w in self._states}
        if (wanted.width, wanted.height) in sizes or len(sizes) < self._most:
            return True
        logger.info("%s: %s sizes are compiled already, %s is left to torch", self._component, self._most, wanted)
        return False

    def _work(self) -> None:
        while (wanted := self._next()) is not None:
            try:
                size = self._make(wanted)
            except Exception as error:  # whatever it is, torch still draws this size
                logger.warning("%s: %s cannot be compiled: %s", self._component, wanted, error)
                self._tell(wanted, "failed")
                continue
            with self._lock:
                self._sizes[size.width, size.height, size.control] = size
                del self._states[wanted]
            logger.info("%s: %s is compiled, %.2f times as fast as torch", self._component, wanted, size.speedup)

    def _next(self) -> WantedProgram | None:
        with self._lock:
            waiting = next((wanted for wanted, state in self._states.items() if state == "waiting"), None)
            self._working = waiting is not None
            return waiting

    def _tell(self, wanted: WantedProgram, state: CompilingState) -> None:
        with self._lock:
            self._states[wanted] = state

    @torch.inference_mode()
    def _make(self, wanted: WantedProgram) -> CompiledSize:
        """Compile a program, load it, measure it, and add it to the denoiser."""
        self._tell(wanted, "compiling")
        rows, control, (precision, level) = wanted.rows, wanted.control, self._kind
        sides = wanted.width, wanted.height
        key = artifact_key(self._catalog, self._component, *sides, rows, control, level, wanted.loras, precision)
        config = read_config(self._catalog.component(self._component))
        artifact = self._compile(self._cache, config, key)
        self._tell(wanted, "loading")
        unet = self._load_unet()
        self._weights.remember(unet.state_dict())
        try:
            (program,) = load_programs(self._cache, [key], self._weights)
            if wanted.loras:  # taken over from the program without LoRAs, which is always made first
                ratio = self._sizes[*sides, control].speedup
            else:
                batch = controlled_trial(self._denoiser.config, artifact)
                ratio = speedup(TvmDenoiser(self._denoiser.config, [program]), TorchDenoiser(unet), batch)
        finally:
            self._weights.forget()
        self._denoiser.add(program)
        return CompiledSize(self._component, *sides, control, ratio, precision, wanted.loras)


def table_of(catalog: Catalog, component_id: str) -> tuple[WantedProgram, ...]:
    """The programs that the size tables of a UNet's models list."""
    models = [model for model in catalog.models if component_id in (model.unet, model.refiner)]
    rows = 2 if any(model.defaults.cfg_scale > 1 for model in models) else 1
    table = size_table(catalog, component_id)
    return tuple(WantedProgram(size.width, size.height, control, rows) for size, control in table)


def controlled_trial(config: Mapping[str, Any], artifact: Artifact) -> StepBatch:
    """The batch of `trial_batch`, with residuals of zeros for a program that takes a ControlNet's residuals."""
    batch, key = trial_batch(config, artifact), artifact.key
    if not key.control:
        return batch
    shapes = residual_shapes(config, key.height, key.width)
    residuals = Residuals(tuple(torch.zeros(key.rows, *shape) for shape in shapes))
    controlled = ControlledRows(tuple(range(key.rows)), ReadyResiduals(residuals))
    return dataclasses.replace(batch, controlled=controlled)
