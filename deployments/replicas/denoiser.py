"""The denoiser deployment: UNets, their ControlNets and an engine loop, connected to the graph."""

from __future__ import annotations

import functools
import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

from config.catalog import Catalog
from deployments.autoscaling import OUTSTANDING, PACE
from deployments.graph import ControlNetEdge, Progress, Sealed
from deployments.ray_compat import replica_died
from deployments.replicas.base import Replica, Runtime
from deployments.replicas.engine_loop import EngineLoop, Update, Work
from deployments.replicas.remote_control import RemoteControl
from deployments.replicas.sealing import seal, unseal
from deployments.telemetry.metrics import metrics
from deployments.telemetry.stages import Timed, stopwatch
from pipelines.acceleration import Acceleration
from pipelines.compiling import CompileReport, Compiling, CompilingState, RefusedSize, WantedProgram
from pipelines.errors import SdgraphError, UncompiledError
from pipelines.plan import CompiledSize, StagePlan

if TYPE_CHECKING:
    from pipelines.backends.tvm.on_demand import OnDemand
    from pipelines.control.nets import ControlNets
    from pipelines.control.types import ControlHint, ControlSource
    from pipelines.engine.engine import StepEngine, TickReport
    from pipelines.sampling.latents import Latents
    from pipelines.text.conditioning import Conditioning


class DenoiserDeployment(Replica):
    """Hosts one UNet, or all of them when components are grouped by role."""

    def __init__(
        self,
        *,
        components: Sequence[str],
        catalog: Catalog,
        runtime: Runtime,
        max_rows: int,
        controlnets: Mapping[str, Any] | None = None,
        strict: bool = False,
        compiled: Compiling | None = None,
        row_price: float | None = None,
        acceleration: Acceleration | None = None,
    ) -> None:
        """Load the UNets.

        Args:
            components: ids of the UNets.
            catalog: describes them.
            runtime: how this process computes.
            max_rows: the largest number of rows of a tick; memory may allow fewer.
            controlnets: UNet id -> handle of the deployment of its ControlNets; None hosts them in this process.
            strict: make the same bytes, whatever other rows are in the tick.
            compiled: run the compiled programs (backend tvm) of those UNets that have some; None runs torch.
            row_price: the time that one more row may cost on a GPU, see `assembly.load_engine`; not used on a CPU.
            acceleration: how a GPU is used; its defaults if None.
        """
        super().__init__(runtime)
        from pipelines.assembly import load_engine
        from pipelines.recordings import capturer_for

        acceleration = acceleration or Acceleration()
        self._capturer = capturer_for(self._device, acceleration.graphs)
        self._compiled: dict[str, tuple[CompiledSize, ...]] = {}
        self._refused: dict[str, tuple[RefusedSize, ...]] = {}
        self._on_demand: dict[str, OnDemand] = {}
        self._colocated: dict[str, ControlNets] = {}
        control = {component: self._control_of(component, catalog, controlnets) for component in components}
        if compiled is None:
            load = functools.partial(
                load_engine,
                catalog,
                device=self._device,
                max_rows=max_rows,
                strict=strict,
                row_price=row_price if self._device == "cuda" else None,
                capturer=self._capturer,
                acceleration=acceleration,
                precision=self._precision,
            )
            # On the thread that ticks, because CUDA graphs that are recorded while rows are measured belong to it.
            self._engines = self._worker.finish(lambda: {c: load(c, control=control[c]) for c in components})
        else:
            self._engines = self._load_compiled(catalog, compiled, max_rows, strict, control)
        for engine in self._engines.values():
            engine.control_lost = replica_died
        if self._capturer is not None:
            self._worker.finish(self._record_common_passes, catalog)
        self._annotating = self._worker.beside("annotate")  # seconds on a CPU, which ticks must not wait for
        self._loop = EngineLoop(self._engines, self._worker, on_tick=self._count, unwrap=_death_or_error)

    def _load_compiled(
        self,
        catalog: Catalog,
        compiling: Compiling,
        max_rows: int,
        strict: bool,
        control: Mapping[str, ControlSource | None],
    ) -> dict[str, StepEngine]:
        from pipelines.assembly import load_compiled, refused_sizes

        self._refused = {component: refused_sizes(catalog, component, compiling) for component in control}
        loaded = {c: load_compiled(catalog, c, compiling, max_rows, strict, source) for c, source in control.items()}
        unets = {component: unet for component, unet in loaded.items() if unet}
        self._compiled = {component: unet.sizes for component, unet in unets.items()}
        self._on_demand = {component: unet.on_demand for component, unet in unets.items() if unet.on_demand}
        return {component: unet.engine for component, unet in unets.items()}

    def _control_of(self, component: str, catalog: Catalog, handles: Mapping[str, Any] | None) -> ControlSource | None:
        """The source of a UNet's residuals: this process or another deployment; None without ControlNets."""
        from pipelines.assembly import load_controlnets
        from pipelines.control.nets import ColocatedControl

        if handles is not None:
            return RemoteControl(ControlNetEdge(handles[component])) if component in handles else None
        own = catalog.controlnets_of(component)
        if not own:
            return None
        self._colocated[component] = load_controlnets(catalog, own, self._device, self._capturer, self._precision)
        return ColocatedControl(self._colocated[component])

    async def check_health(self) -> None:
        """Check the base, and set gauges: Ray's agent forgets gauges that are not set again."""
        await super().check_health()
        for component in self._engines:
            labels = {"component": component}
            metrics().outstanding.set(self._loop.outstanding(component), labels)
            report = self._report(component)
            metrics().programs.set(len(report.sizes), labels)
            states = [size.state for size in report.pending]
            for state in get_args(CompilingState) if component in self._on_demand else ():
                metrics().compiling.set(states.count(state), labels | {"state": state})
            self._tell_acceleration(component)

    def _record_common_passes(self, catalog: Catalog) -> None:
        """Record CUDA graphs at start, so that the first requests on a GPU do not wait for it."""
        from pipelines.assembly import record_common_passes
        from pipelines.backends.torch_backend import TorchDenoiser

        for component, engine in self._engines.items():
            if isinstance(engine.denoiser, TorchDenoiser):
                record_common_passes(engine.denoiser, catalog, component)

    def _tell_acceleration(self, component: str) -> None:
        from pipelines.backends.torch_backend import TorchDenoiser

        denoiser, nets = self._engines[component].denoiser, self._colocated.get(component)
        if isinstance(denoiser, TorchDenoiser):
            metrics().accelerated(
                component,
                captured=denoiser.captured + (nets.captured if nets else 0),
                failed=denoiser.failed_captures + (nets.failed_captures if nets else 0),
                compiled=denoiser.compiled_blocks,
            )

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the figures that Serve passes to deployments/autoscaling.py."""
        return {OUTSTANDING: float(self._loop.outstanding()), PACE: self._loop.throughput.overall.value}

    async def device(self) -> str:
        """Return the device of this replica, `cpu` or `cuda`."""
        return self._device

    async def compile_report(self, *, component: str, wanted: tuple[WantedProgram, ...] = ()) -> CompileReport:
        """Queue the `wanted` programs of a UNet, and return which sizes this replica can draw and how fast."""
        if component in self._on_demand:
            self._on_demand[component].want(*wanted)
        return self._report(component)

    def _report(self, component: str) -> CompileReport:
        refused = self._refused.get(component, ())
        if component in self._on_demand:
            return replace(self._on_demand[component].report(), refused=refused)
        return CompileReport(self._compiled.get(component, ()), (), refused)

    def _check_is_compiled(self, stage: StagePlan) -> None:
        """Check that this replica has the program of a stage, which another replica may have had first.

        Raises:
            UncompiledError: it has not; the program has been queued.
        """
        on_demand, wanted = self._on_demand.get(stage.component), WantedProgram.of(stage)
        if on_demand is not None and not on_demand.holds(wanted):
            on_demand.want(wanted)
            raise UncompiledError(
                f"backend 'tvm': {stage.width}x{stage.height} is being loaded. Only ['auto', 'torch'] allowed now",
                "backend",
            )

    async def prepare(
        self, *, stage: StagePlan, photos: Sequence[bytes], image: bytes | None, mask: bytes | None
    ) -> Timed[tuple[ControlHint, ...]]:
        """Make the control maps of a stage, if the ControlNets are in this process."""
        make = self._colocated[stage.component].prepare
        with stopwatch("controlnet_prepare", stage.controls[0].component) as watch:
            hints = await self._annotating.run(make, photos, stage, image, mask, started=watch.start_work)
        return watch.timed(hints)

    async def annotate(self, *, name: str, photo: bytes) -> bytes:
        """Make the control map of a photo, if ControlNets are in this process; all have the same annotators."""
        nets = next(iter(self._colocated.values()))
        with stopwatch("annotate", name) as watch:
            return await self._annotating.run(nets.annotated, name, photo, started=watch.start_work)

    async def denoise(
        self,
        *,
        stage: StagePlan,
        conditioning: Timed[Conditioning],
        latents: Timed[Latents] | None,
        hints: Timed[tuple[ControlHint, ...]] | None = None,
        expires: float = math.inf,
    ) -> Timed[Latents]:
        """Run one stage; see `EngineLoop.submit`."""
        self._check_is_compiled(stage)
        work = _work(stage, conditioning, latents, hints, expires)
        with stopwatch("denoise", stage.component) as watch:
            result = await self._loop.submit(work, watch.start_work)
        return watch.timed(result, conditioning, latents, hints)

    async def denoise_watched(
        self,
        *,
        stage: StagePlan,
        conditioning: Timed[Conditioning],
        latents: Timed[Latents] | Sealed[Timed[Latents]] | None,
        hints: Timed[tuple[ControlHint, ...]] | None = None,
        expires: float = math.inf,
        previews: bool = False,
    ) -> AsyncGenerator[Progress | Sealed[Timed[Latents]], None]:
        """Run one stage, and yield its progress and then its result.

        Tensors are sealed, because the items pass through the ingress.
        """
        self._check_is_compiled(stage)
        begin = unseal(latents) if latents is not None else None
        work = _work(stage, conditioning, begin, hints, expires)
        result: Latents | None = None
        with stopwatch("denoise", stage.component) as watch:
            async with aclosing(self._loop.watch(work, watch.start_work, previews)) as items:
                async for item in items:
                    if isinstance(item, Update):
                        preview = seal(item.latents) if item.latents is not None else None
                        yield replace(item.progress, latents=preview)
                    else:
                        result = item
        assert result is not None
        yield seal(watch.timed(result, conditioning, begin, hints))

    def _count(self, component: str, report: TickReport, seconds: float) -> None:
        for _, error in report.failed:
            self._notice(error)
        metrics().cache("lora", component, self._engines[component].loras.cache)
        if report.rows:
            metrics().tick(component, report.rows, report.padding, seconds)


def _work(
    stage: StagePlan,
    conditioning: Timed[Conditioning],
    latents: Timed[Latents] | None,
    hints: Timed[tuple[ControlHint, ...]] | None,
    expires: float,
) -> Work:
    return Work(
        stage,
        conditioning.value,
        latents.value if latents is not None else None,
        hints.value if hints is not None else (),
        expires,
    )


def _death_or_error(error: SdgraphError) -> BaseException:
    """The death of a ControlNet replica if that caused the error, so that the ingress recognises it; else the error."""
    cause = error.__cause__
    return cause if cause is not None and replica_died(cause) else error
