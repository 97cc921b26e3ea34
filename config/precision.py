"""In which numbers UNets on CPUs multiply; sums, norms and softmax are float32 in either."""

from __future__ import annotations

from typing import Literal

Precision = Literal["float32", "bfloat16"]
WantedPrecision = Literal["auto", "float32", "bfloat16"]
"""`auto` is bfloat16 where the processor multiplies it, else float32."""
