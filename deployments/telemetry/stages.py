"""How long each stage of a request took: times that travel with the data, metrics, log lines and trace spans."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from opentelemetry import trace

from deployments.telemetry.metrics import metrics

logger = logging.getLogger(__name__)
tracer = trace.get_tracer("sdgraph")
"""Does nothing until Serve has an exporter (docs/operations.md)."""

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True)
class StageTime:
    """How long one stage worked on one request, waiting inside the stage included."""

    name: str
    seconds: float
    note: str | None = None
    """Values of the stage for the client's reply, which have no other way back."""


@dataclass(frozen=True)
class Timed(Generic[T_co]):
    """A stage's result with the times of every stage that led to it.

    Results go from stage to stage without passing the ingress, so their times travel with them.
    """

    value: T_co
    times: tuple[StageTime, ...] = ()


class Stopwatch:
    """Times a stage, and how long of it the stage waited for its model."""

    def __init__(self, stage: str, component: str, level: int) -> None:
        self._level = level
        self._stage = stage
        self._component = component
        self._begin = time.perf_counter()
        self._working = False
        self._waited = 0.0
        self.note: str | None = None
        """What `StageTime` says beside the time; set before the stage ends."""
        self.stage_time: StageTime | None = None

    def start_work(self) -> None:
        """The model begins: what passed until now was waiting. Later calls change nothing."""
        if not self._working:
            self._working = True
            self._waited = time.perf_counter() - self._begin
            metrics().queue_seconds.observe(self._waited, {"stage": self._stage, "component": self._component})

    def stop(self) -> None:
        """The stage is done."""
        seconds = time.perf_counter() - self._begin
        name = f"{self._stage}_{self._component}" if self._stage == "denoise" else self._stage
        self.stage_time = StageTime(name, seconds, self.note)
        metrics().stage_seconds.observe(seconds, {"stage": self._stage, "component": self._component})
        logger.log(
            self._level,
            "%s %s took %.3f s, %.3f s of it waiting",
            *(self._stage, self._component, seconds, self._waited),
            extra={"stage": self._stage, "component": self._component, "seconds": seconds, "waited": self._waited},
        )

    def fail(self, error: BaseException) -> None:
        """The stage raised."""
        labels = {"stage": self._stage, "component": self._component}
        metrics().stage_errors.inc(1, labels | {"error": type(error).__name__})

    def timed(self, value: T, *inputs: Timed[object] | None) -> Timed[T]:
        """Wrap a result: the times of its inputs, each once, then this stage's."""
        times = [taken for item in inputs if item is not None for taken in item.times]
        if self.stage_time is not None:
            times.append(self.stage_time)
        return Timed(value, tuple(dict.fromkeys(times)))


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


def server_timing(times: tuple[StageTime, ...]) -> str:
    """The `server-timing` header (W3C Server Timing): one entry a stage, milliseconds."""
    return ", ".join(f"{taken.name};dur={taken.seconds * 1000:.1f}" for taken in times)
