"""Log lines: for people, or JSON with the request's id and, where there is a trace, its id."""

from __future__ import annotations

import logging
from typing import Literal

from opentelemetry import trace
from pythonjsonlogger.json import JsonFormatter

from deployments.ray_compat import current_request_id

LogFormat = Literal["text", "json"]
ROOTS = ("config", "pipelines", "deployments")
"""Loggers are named after their modules."""

TEXT = "%(asctime)s %(levelname)s %(name)s [%(request_id)s]: %(message)s"
JSON = "%(asctime)s %(levelname)s %(name)s %(message)s"


def show_logs(form: LogFormat = "text") -> None:
    """Write this project's messages from INFO upwards to the error stream, which Ray collects; once a process."""
    if logging.getLogger(ROOTS[0]).handlers:
        return
    handler = logging.StreamHandler()
    handler.addFilter(_Identify())
    if form == "json":
        renamed = {"asctime": "time", "levelname": "level", "name": "logger"}
        handler.setFormatter(JsonFormatter(JSON, rename_fields=renamed))
    else:
        handler.setFormatter(logging.Formatter(TEXT))
    for root in ROOTS:
        logging.getLogger(root).addHandler(handler)
        logging.getLogger(root).setLevel(logging.INFO)


class _Identify(logging.Filter):
    """Adds the ids by which a request's lines are found in every process; never drops a line.

    Serve carries a request's id to every replica that works for it. A line that speaks of one request from outside its
    context (the engine's loop) passes `extra={"request_id": ...}` itself.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if not hasattr(record, "request_id"):
            record.request_id = current_request_id() or "-"
        if (span := trace.get_current_span().get_span_context()).is_valid:
            record.trace_id = f"{span.trace_id:032x}"
        return True
