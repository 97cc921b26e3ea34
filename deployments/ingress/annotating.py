"""Control maps for clients that want to see them."""

from __future__ import annotations

import asyncio

from deployments.access.caller import ANONYMOUS, Caller
from deployments.graph import Graph
from deployments.ingress.deadline import Deadline
from pipelines.pictures.images import check_image


class Annotating:
    """Has photos annotated over the graph."""

    def __init__(self, graph: Graph, max_pixels: int, deadline_s: float) -> None:
        """Take photos of at most `max_pixels`, for at most `deadline_s`."""
        self._graph = graph
        self._max_pixels = max_pixels
        self._deadline_s = deadline_s

    async def annotate(self, component: str, name: str, photo: bytes, caller: Caller = ANONYMOUS) -> bytes:
        """The control map of a photo, made where ControlNet `component` is: a PNG of the photo's size.

        Raises:
            InvalidValueError: it is not a picture.
            TooLargeError: it has too many pixels.
            DeadlineError: it took longer than the caller waits, or the server.
        """
        await asyncio.to_thread(check_image, photo, "image", self._max_pixels)
        deadline = Deadline(min(caller.deadline_s, self._deadline_s))
        call = self._graph.annotate(component=component, name=name, photo=photo)
        try:
            return await deadline.bound(call)
        finally:
            call.cancel()
