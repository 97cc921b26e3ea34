"""Seeing a request on its way: times of its stages, as spans that travel with the data, metrics and traces."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from opentelemetry import trace

from deployments.telemetry.metrics import metrics

if TYPE_CHECKING:
    from pipelines.sampling.latents import Latents

logger = logging.getLogger("sdgraph.stage")
tracer = trace.get_tracer("sdgraph")
"""Does nothing until Serve is told of an exporter (README, Sight)."""

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True)
class Span:
    """How long one stage worked on one request, waiting inside the stage included."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Traced(Generic[T_co]):
    """A stage's result with the spans of everything that led to it.

    Results go from stage to stage without passing the ingress, so their times travel with them.
    """

    value: T_co
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Progress:
    """Where a stage stands.

    Attributes:
        stage: the component.
        step: sampler steps done.
        steps: sampler steps of the stage.
        position: jobs that go first, while the job waits for rows; None while it runs.
        latents: where the picture stands, if the watcher asked for previews.
    """

    stage: str
    step: int
    steps: int
    position: int | None = None
    latents: Latents | None = None


class Stopwatch:
    """Collects the span of a stage's own work."""

    def __init__(self, stage: str, component: str, level: int) -> None:
        self._level = level
        self._stage = stage
        self._component = component
        self._begin = time.perf_counter()
        self._working = False
        self._waited = 0.0
        self.span: Span | None = None

    def start_work(self) -> None:
        """The model has got to it: what passed since the beginning was waiting. Later calls change nothing."""
        if not self._working:
            self._working = True
            self._waited = time.perf_counter() - self._begin
            metrics().queue_seconds.observe(self._waited, {"stage": self._stage, "component": self._component})

    def stop(self) -> None:
        """The stage is done."""
        seconds = time.perf_counter() - self._begin
        name = f"{self._stage}_{self._component}" if self._stage == "denoise" else self._stage
        self.span = Span(name, seconds)
        metrics().stage_seconds.observe(seconds, {"stage": self._stage, "component": self._component})
        logger.log(
            self._level,
            "%s %s: %.3f s, of it %.3f s waiting",
            *(self._stage, self._component, seconds, self._waited),
            extra={"stage": self._stage, "component": self._component, "seconds": seconds, "waited": self._waited},
        )

    def fail(self, error: BaseException) -> None:
        """The stage raised."""
        of = {"stage": self._stage, "component": self._component}
        metrics().stage_errors.inc(1, of | {"error": type(error).__name__})

    def trace(self, value: T, *inputs: Traced[object] | None) -> Traced[T]:
        """Wrap a result: the spans of its inputs, each once, then this one."""
        spans = [span for item in inputs if item is not None for span in item.spans]
        if self.span is not None:
            spans.append(self.span)
        return Traced(value, tuple(dict.fromkeys(spans)))


@contextmanager
def stopwatch(stage: str, component: str, level: int = logging.INFO) -> Iterator[Stopwatch]:
    """Time a block as a stage of one component.

    It is counted, logged at `level`, and, where traces are exported, a span of the request's.
    """
    watch = Stopwatch(stage, component, level)
    with tracer.start_as_current_span(stage, attributes={"sdgraph.component": component}):
        try:
            yield watch
        except BaseException as error:
            watch.fail(error)
            raise
    watch.stop()


def server_timing(spans: tuple[Span, ...]) -> str:
    """The `server-timing` header (W3C Server Timing): one entry a stage, milliseconds."""
    return ", ".join(f"{span.name};dur={span.seconds * 1000:.1f}" for span in spans)
