"""Nulls in JSON: a field that is null is absent."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, model_validator


class NullsAbsent(BaseModel):
    """A part of a request that is read without its nulls, so that they stand for the defaults."""

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data
