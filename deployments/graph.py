"""The typed calls between deployments: the only file that calls `.remote` (GRA-8).

A `Graph` knows the handle of each deployment by the ids of the components it hosts. Its methods begin a call and return
a `Call`: awaited, it gives the result; handed on to the next method un-awaited, the result goes from replica to replica
without passing through this process. `tests/support/graph.py` has a graph whose edges a test decides.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pipelines.upscale import UpscalePlan

if TYPE_CHECKING:
    from deployments.telemetry.stages import Timed
    from pipelines.compiling import CompileReport, WantedProgram
    from pipelines.control.residuals import PackedResiduals
    from pipelines.control.types import ControlBatch, ControlHint
    from pipelines.pictures.images import EncodedImage
    from pipelines.pictures.upscaling import Pixels
    from pipelines.plan import GenerationPlan, OutputFormat, StagePlan
    from pipelines.sampling.latents import Latents
    from pipelines.text.conditioning import Conditioning

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Call(Generic[T_co]):
    """A call in flight."""

    def __init__(self, response: Awaitable[T_co]) -> None:
        """Wrap Serve's response, whose type says nothing of its result."""
        self.response: Any = response

    def __await__(self) -> Generator[Any, None, T_co]:
        result: Generator[Any, None, T_co] = self.response.__await__()
        return result

    def cancel(self) -> None:
        """Stop it, whether it has begun or waits for its arguments; nothing if it is done."""
        self.response.cancel()


@dataclass(frozen=True)
class Sealed(Generic[T_co]):
    """Pickled tensors that pass through the ingress, which never opens them (GRA-10).

    Opening would import torch into a process that serves without it: 160 MB instead of 540.
    """

    pickled: bytes


@dataclass(frozen=True)
class Progress:
    """Where a stage of a watched request stands."""

    stage: str
    """The component."""
    step: int
    """Sampler steps done."""
    steps: int
    """Sampler steps of the stage; 0 while the job waits for rows."""
    position: int | None = None
    """Jobs that go first, while the job waits for rows; None while it runs."""
    latents: Sealed[Latents] | None = None
    """Where the picture stands, if the watcher asked for previews."""
    visit: int = 1
    """Which stage of the plan this is, from 1."""
    visits: int = 1
    """Stages of the plan."""


class Graph:
    """Every deployment a request can visit, by component id."""

    def __init__(self, handles: Mapping[str, Any], compiled: Mapping[str, Any] | None = None) -> None:
        """Know the deployments.

        Args:
            handles: component id -> Serve's handle; several components may share one. What app.py binds are the
                deployments themselves, in whose place Serve puts handles when it makes the ingress.
            compiled: the same for UNets compiled with TVM; each is in `handles` too, running on torch.
        """
        self._handles = dict(handles)
        self._compiled = dict(compiled or {})

    @property
    def deployments(self) -> list[Any]:
        """What was bound or what Serve put in its place, each once."""
        return list({id(h): h for h in (*self._handles.values(), *self._compiled.values())}.values())

    @property
    def compiled_components(self) -> tuple[str, ...]:
        """UNets that have a compiled deployment."""
        return tuple(self._compiled)

    def visits(self, plan: GenerationPlan | UpscalePlan) -> tuple[str, ...]:
        """Names of the deployments that a plan goes through, each once, in order."""
        return tuple(dict.fromkeys(_name(handle) for handle in self._visited(plan)))

    def ping(self, plan: GenerationPlan | UpscalePlan) -> dict[str, Callable[[], Call[None]]]:
        """For each deployment that a plan visits a call that does nothing, which starts one that has no replica."""
        handles = {_name(handle): handle for handle in self._visited(plan)}
        return {name: _Ping(handle) for name, handle in handles.items()}

    def encode_text(self, *, component: str, stage: StagePlan) -> Call[Timed[Conditioning]]:
        """The conditioning of a stage."""
        return Call(self._handles[component].encode.remote(component=component, stage=stage))

    def encode(self, *, plan: GenerationPlan, image: bytes | None, mask: bytes | None) -> Call[Timed[Latents]]:
        """What the first stage begins from: latents of a picture, and which part of them is drawn."""
        return Call(self._handles[plan.vae].encode.remote(plan=plan, image=image, mask=mask))

    def enlarge(
        self, *, component: str, stage: StagePlan, latents: Call[Timed[Latents]] | Sealed[Timed[Latents]]
    ) -> Call[Timed[Latents]]:
        """Latents of the picture that `latents` are to VAE `component`, resized to a second pass's `stage`."""
        vae = self._handles[component]
        return Call(vae.enlarge.remote(component=component, stage=stage, latents=_handed_on(latents)))

    def pixels(self, *, component: str, latents: Call[Timed[Latents]] | Sealed[Timed[Latents]]) -> Call[Timed[Pixels]]:
        """The picture that `latents` are to VAE `component`, before a model enlarges it."""
        return Call(self._handles[component].pixels.remote(component=component, latents=_handed_on(latents)))

    def upscale(self, *, component: str, stage: StagePlan, pixels: Call[Timed[Pixels]]) -> Call[Timed[Pixels]]:
        """The same, of the size of a second pass's `stage`."""
        upscaler = self._handles[component]
        return Call(upscaler.upscale.remote(component=component, stage=stage, pixels=_handed_on(pixels)))

    def encode_pixels(self, *, component: str, stage: StagePlan, pixels: Call[Timed[Pixels]]) -> Call[Timed[Latents]]:
        """Latents of a picture of the size of `stage`, by VAE `component`."""
        vae = self._handles[component]
        return Call(vae.encode_pixels.remote(component=component, stage=stage, pixels=_handed_on(pixels)))

    def upscale_file(self, *, component: str, plan: UpscalePlan, image: bytes) -> Call[Timed[EncodedImage]]:
        """The file of a sent picture, larger."""
        return Call(self._handles[component].upscale_file.remote(component=component, plan=plan, image=image))

    def prepare(
        self, *, component: str, stage: StagePlan, photos: Sequence[bytes], image: bytes | None, mask: bytes | None
    ) -> Call[Timed[tuple[ControlHint, ...]]]:
        """The control maps of a stage, made where its ControlNets live: in one deployment for each UNet.

        Args:
            component: a ControlNet among them.
            stage: has at least one control.
            photos: one for each of them.
            image: with `mask` for a stage that draws a part alone, so that the maps are cut out where it is.
            mask: of the same size.
        """
        nets = self._handles[component]
        return Call(nets.prepare.remote(stage=stage, photos=photos, image=image, mask=mask))

    def annotate(self, *, component: str, name: str, photo: bytes) -> Call[bytes]:
        """The map that annotator `name` makes of a photo, a PNG of its size, where ControlNet `component` lives."""
        return Call(self._handles[component].annotate.remote(name=name, photo=photo))

    def denoise(
        self,
        *,
        stage: StagePlan,
        conditioning: Call[Timed[Conditioning]],
        latents: Call[Timed[Latents]] | None,
        hints: Call[Timed[tuple[ControlHint, ...]]] | None,
        expires: float,
    ) -> Call[Timed[Latents]]:
        """Run a stage; `expires` is the time (Unix, in seconds) at which the caller stops waiting."""
        return Call(
            self._denoiser(stage).denoise.remote(
                stage=stage,
                conditioning=_handed_on(conditioning),
                latents=_handed_on(latents),
                hints=_handed_on(hints),
                expires=expires,
            )
        )

    async def denoise_watched(
        self,
        *,
        stage: StagePlan,
        conditioning: Call[Timed[Conditioning]],
        latents: Call[Timed[Latents]] | Sealed[Timed[Latents]] | None,
        hints: Call[Timed[tuple[ControlHint, ...]]] | None,
        expires: float,
        previews: bool,
    ) -> AsyncGenerator[Progress | Sealed[Timed[Latents]], None]:
        """The same, telling its progress on the way; the last item is the result. Closing it ends the stage."""
        items = (
            self._denoiser(stage)
            .options(stream=True)
            .denoise_watched.remote(
                stage=stage,
                conditioning=_handed_on(conditioning),
                latents=_handed_on(latents),
                hints=_handed_on(hints),
                expires=expires,
                previews=previews,
            )
        )
        try:
            async for item in items:
                yield item
        finally:
            items.cancel()  # a response that is dropped goes on by itself

    def decode(
        self,
        *,
        plan: GenerationPlan,
        latents: Call[Timed[Latents]] | Sealed[Timed[Latents]],
        image: bytes | None,
        mask: bytes | None,
    ) -> Call[Timed[EncodedImage]]:
        """The finished file, with the plan inside; with a mask, what was drawn lies in the picture that was sent."""
        vae = self._handles[plan.vae]
        return Call(vae.decode.remote(plan=plan, latents=_handed_on(latents), image=image, mask=mask))

    def preview(self, *, plan: GenerationPlan, latents: Sealed[Latents], file_format: OutputFormat) -> Call[bytes]:
        """A small file of an unfinished picture."""
        return Call(self._handles[plan.vae].preview.remote(plan=plan, latents=latents, file_format=file_format))

    def compile_report(self, *, component: str, wanted: tuple[WantedProgram, ...] = ()) -> Call[CompileReport]:
        """What the replica of a compiled UNet can draw and what it works on, after it has been asked for more."""
        return Call(self._compiled[component].compile_report.remote(component=component, wanted=wanted))

    def device(self, component: str) -> Call[str]:
        """Where torch runs a UNet: `cpu` or `cuda`."""
        return Call(self._handles[component].device.remote())

    def _denoiser(self, stage: StagePlan) -> Any:
        return (self._compiled if stage.backend == "tvm" else self._handles)[stage.component]

    def _visited(self, plan: GenerationPlan | UpscalePlan) -> Iterable[Any]:
        if isinstance(plan, UpscalePlan):
            yield self._handles[str(plan.component)]
            return
        yield self._handles[plan.text_encoder]
        for stage in plan.stages:
            if stage.enlargement and stage.enlargement.component:
                yield self._handles[stage.enlargement.component]
            yield self._denoiser(stage)
            yield from (self._handles[control.component] for control in stage.controls)
        yield self._handles[plan.vae]


class ControlNetEdge:
    """A denoiser's edge to the deployment of its ControlNets."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def residuals(self, *, batch: ControlBatch, hints: Mapping[str, ControlHint]) -> Call[PackedResiduals | None]:
        """Residuals of every row of a tick; None asks for the maps in `hints`, which that replica has not got."""
        return Call(self._handle.residuals.remote(batch=batch, hints=dict(hints)))


@dataclass(frozen=True)
class _Ping:
    handle: Any

    def __call__(self) -> Call[None]:
        return Call(self.handle.ping.remote())


def _name(handle: Any) -> str:
    return str(handle.deployment_name)


def _handed_on(value: Call[T] | Sealed[T] | None) -> Any:
    """Serve's own response, which Serve replaces by its result when the call is made."""
    return value.response if isinstance(value, Call) else value
