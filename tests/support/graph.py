"""A graph whose edges a test decides."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable
from typing import Any

from deployments.graph import Call, Graph, Sealed
from pipelines.plan import GenerationPlan
from pipelines.upscale import UpscalePlan

Edge = Callable[..., Awaitable[Any]]


class FakeGraph(Graph):
    """Answers some edges as a test says and the others as `inner` does; without one, with None at once.

    An edge is an async function of the edge's keyword arguments (`denoise_watched`: an async generator function).
    """

    def __init__(self, inner: Graph | None = None, compiled: Iterable[str] = (), **edges: Callable[..., Any]) -> None:
        super().__init__({})
        self._inner = inner
        self._compiled = dict.fromkeys(compiled)
        self._edges = edges
        self.calls: list[tuple[str, dict[str, Any]]] = []
        """Name and arguments of every call, in order; a ping's argument is the deployment."""
        self.responses: list[FakeResponse] = []
        """What the test's own edges returned."""

    def named(self, edge: str) -> list[dict[str, Any]]:
        """Arguments of the calls of one edge."""
        return [arguments for name, arguments in self.calls if name == edge]

    @property
    def compiled_components(self) -> tuple[str, ...]:
        return tuple(self._compiled) or (self._inner.compiled_components if self._inner else ())

    def visits(self, plan: GenerationPlan | UpscalePlan) -> tuple[str, ...]:
        if self._inner is not None:
            return self._inner.visits(plan)
        if isinstance(plan, UpscalePlan):
            return (str(plan.component),)
        return (plan.text_encoder, *(stage.component for stage in plan.stages), plan.vae)

    def ping(self, plan: GenerationPlan | UpscalePlan) -> dict[str, Callable[[], Call[None]]]:
        def send(name: str) -> Call[None]:
            return self.call("ping", deployment=name)

        return {name: lambda name=name: send(name) for name in self.visits(plan)}  # type: ignore[misc]

    def call(self, edge: str, **arguments: Any) -> Call[Any]:
        """A call of an edge."""
        self.calls.append((edge, arguments))
        if edge in self._edges:
            self.responses.append(FakeResponse(self._edges[edge], arguments))
            return Call(self.responses[-1])
        if self._inner is None or edge == "ping":
            return Call(FakeResponse(_nothing, {}))
        if any(_is_fake(value) for value in arguments.values()):
            return Call(FakeResponse(self._after_fakes, {"edge": edge, "arguments": arguments}))
        call: Call[Any] = getattr(self._inner, edge)(**arguments)
        return call

    async def _after_fakes(self, edge: str, arguments: dict[str, Any]) -> Any:
        """A call of `inner` that was handed a fake response: Serve could not wait for it, so it is awaited here."""
        results = {name: await value if _is_fake(value) else value for name, value in arguments.items()}
        return await getattr(self._inner, edge)(**results)

    def encode_text(self, **arguments: Any) -> Call[Any]:
        return self.call("encode_text", **arguments)

    def encode(self, **arguments: Any) -> Call[Any]:
        return self.call("encode", **arguments)

    def enlarge(self, **arguments: Any) -> Call[Any]:
        return self.call("enlarge", **arguments)

    def pixels(self, **arguments: Any) -> Call[Any]:
        return self.call("pixels", **arguments)

    def upscale(self, **arguments: Any) -> Call[Any]:
        return self.call("upscale", **arguments)

    def encode_pixels(self, **arguments: Any) -> Call[Any]:
        return self.call("encode_pixels", **arguments)

    def upscale_file(self, **arguments: Any) -> Call[Any]:
        return self.call("upscale_file", **arguments)

    def prepare(self, **arguments: Any) -> Call[Any]:
        return self.call("prepare", **arguments)

    def annotate(self, **arguments: Any) -> Call[Any]:
        return self.call("annotate", **arguments)

    def denoise(self, **arguments: Any) -> Call[Any]:
        return self.call("denoise", **arguments)

    async def denoise_watched(self, **arguments: Any) -> AsyncGenerator[Any, None]:
        self.calls.append(("denoise_watched", arguments))
        edge = self._edges.get("denoise_watched")
        items = edge(**arguments) if edge else self._inner.denoise_watched(**arguments) if self._inner else _no_items()
        try:
            async for item in items:
                yield item
        finally:
            await items.aclose()

    def decode(self, **arguments: Any) -> Call[Any]:
        return self.call("decode", **arguments)

    def preview(self, **arguments: Any) -> Call[Any]:
        return self.call("preview", **arguments)

    def compile_report(self, **arguments: Any) -> Call[Any]:
        return self.call("compile_report", **arguments)

    def device(self, component: str) -> Call[Any]:
        return self.call("device", component=component)


class FakeResponse:
    """A response as Serve's: awaited any number of times, handed on un-awaited, cancelled."""

    def __init__(self, edge: Edge, arguments: dict[str, Any]) -> None:
        self._edge = edge
        self._arguments = arguments
        self._task: asyncio.Future[Any] | None = None
        self.cancelled = False

    def __await__(self) -> Generator[Any, None, Any]:
        if self._task is None:
            self._task = asyncio.ensure_future(self._edge(**self._arguments))
        return self._task.__await__()

    def cancel(self) -> None:
        self.cancelled = True
        if self._task is not None:
            self._task.cancel()


def _is_fake(value: Any) -> bool:
    return isinstance(value, Call) and isinstance(value.response, FakeResponse)


def raising(error: BaseException) -> Edge:
    """An edge whose calls end in `error`."""

    async def fail(**_: Any) -> None:
        raise error

    return fail


async def never(**_: Any) -> None:
    """An edge that does not answer."""
    await asyncio.Event().wait()


async def denoised(**_: Any) -> AsyncGenerator[Any, None]:
    """A watched stage that ends at once."""
    yield Sealed(b"")


async def unending(**_: Any) -> AsyncGenerator[Any, None]:
    """A watched stage that never ends."""
    await never()
    yield


async def _nothing(**_: Any) -> None:
    return None


async def _no_items() -> AsyncGenerator[Any, None]:
    return
    yield
