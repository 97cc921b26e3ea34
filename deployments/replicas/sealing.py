"""Sealing tensors that pass through the ingress, and opening them where they are needed."""

from __future__ import annotations

import pickle
from typing import TypeVar, cast, overload

from deployments.graph import Sealed

T = TypeVar("T")


def seal(value: T) -> Sealed[T]:
    """Pickle a value."""
    return Sealed(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL))


@overload
def unseal(value: Sealed[T]) -> T: ...
@overload
def unseal(value: T | Sealed[T]) -> T: ...
def unseal(value: T | Sealed[T]) -> T:
    """The value, sealed or not. Only what another replica of this graph sealed is ever opened."""
    return cast("T", pickle.loads(value.pickled)) if isinstance(value, Sealed) else value
