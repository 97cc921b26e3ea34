"""Annotators: what turns a photo into a control map."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from config.sources import PlainSource, Spec

WEIGHTLESS_ANNOTATORS = ("canny", "lineart")
"""Controls that a photo is turned into without weights, on every server."""


class AnnotatorSpec(Spec):
    """Weights that turn a photo into the control map of one ControlNet name."""

    name: Literal["depth", "openpose", "softedge"]
    source: PlainSource
    detector: PlainSource | None = None
    """openpose only: the model that finds people; `source` is the one that finds their joints."""
    file: str | None = Field(default=None, pattern=r"^[^/]+\.onnx$")
    """softedge only: the ONNX file in `source`."""

    @model_validator(mode="after")
    def _complete(self) -> AnnotatorSpec:
        for name, field in (("openpose", "detector"), ("softedge", "file")):
            if (self.name == name) != (getattr(self, field) is not None):
                raise ValueError(f"annotator {self.name!r}: {name} needs {field}, no other has one")
        return self
