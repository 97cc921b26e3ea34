"""Pickling tensors that pass through the ingress, which has no torch, and unpickling them where they are used."""

from __future__ import annotations

import pickle
from typing import TypeVar, cast, overload

from deployments.graph import Sealed

T = TypeVar("T")


def seal(value: T) -> Sealed[T]:
    """Pickle a value to bytes, which a process without torch can pass on."""
    return Sealed(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL))


@overload
def unseal(value: Sealed[T]) -> T: ...
@overload
def unseal(value: T | Sealed[T]) -> T: ...
def unseal(value: T | Sealed[T]) -> T:
    """Return the value, unpickled if it is sealed. Only values from other replicas of this graph are unpickled."""
    return cast("T", pickle.loads(value.pickled)) if isinstance(value, Sealed) else value
