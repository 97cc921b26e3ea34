"""The threads of a replica: one for its models (ENG-3), and others for files."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

R = TypeVar("R")


def _ignore(error: BaseException) -> None:
    pass


class Worker:
    """Runs functions one after another, so that the replica's event loop stays free to cancel and answer."""

    def __init__(
        self, on_error: Callable[[BaseException], None] = _ignore, threads: int = 1, name: str = "model"
    ) -> None:
        """Create the threads. With more than one, functions may run at the same time and in any order.

        `on_error` is called on the thread with every exception that `run` raises.
        """
        self._on_error = on_error
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)

    def beside(self, name: str, threads: int = 1) -> Worker:
        """Create further threads, whose errors are reported to the same callback."""
        return Worker(self._on_error, threads, name)

    async def run(self, function: Callable[..., R], *args: object, started: Callable[[], None] | None = None) -> R:
        """Run `function(*args)` after all functions submitted before it, in the caller's context (request id, trace).

        `started` is called on the thread immediately before the function.
        """

        def turn() -> R:
            if started is not None:
                started()
            try:
                return function(*args)
            except BaseException as error:
                self._on_error(error)
                raise

        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._executor, context.run, turn)

    def finish(self, function: Callable[..., R], *args: object) -> R:
        """Run a function on the thread and block until it returns; for constructors, which cannot await."""
        return self._executor.submit(contextvars.copy_context().run, function, *args).result()

    def submit(self, function: Callable[..., object], *args: object) -> None:
        """Run a function on the thread without waiting for it."""
        self._executor.submit(contextvars.copy_context().run, function, *args)
