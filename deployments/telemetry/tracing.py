"""The exporter of traces, which RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH names. Needs the extra `otlp`."""

from __future__ import annotations

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor


def otlp() -> list[SpanProcessor]:
    """Send spans to the collector of OTEL_EXPORTER_OTLP_ENDPOINT, in batches, off the request's path.

    Serve makes spans of its proxy, routers and replicas; the stages' own lie within those.
    """
    return [BatchSpanProcessor(OTLPSpanExporter())]
