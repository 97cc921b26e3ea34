"""Seeing a request on its way: stage times that travel with the data, and one log line a request."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from pipelines.latents import Latents

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


def show_logs() -> None:
    """Let this process's error stream, which Ray collects, have sdgraph's messages from INFO upwards; once."""
    logger = logging.getLogger("sdgraph")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


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

    def __init__(self) -> None:
        self.span: Span | None = None

    def trace(self, value: T, *inputs: Traced[object] | None) -> Traced[T]:
        """Wrap a result: the spans of its inputs, each once, then this one."""
        spans = [span for item in inputs if item is not None for span in item.spans]
        if self.span is not None:
            spans.append(self.span)
        return Traced(value, tuple(dict.fromkeys(spans)))


@contextmanager
def stopwatch(name: str) -> Iterator[Stopwatch]:
    """Time a block as the stage `name`."""
    watch = Stopwatch()
    begin = time.perf_counter()
    yield watch
    watch.span = Span(name, time.perf_counter() - begin)


def server_timing(spans: tuple[Span, ...]) -> str:
    """The `server-timing` header (W3C Server Timing): one entry a stage, milliseconds."""
    return ", ".join(f"{span.name};dur={span.seconds * 1000:.1f}" for span in spans)
