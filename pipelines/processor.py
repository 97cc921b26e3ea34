"""What this machine's processor can do."""

from __future__ import annotations

import functools
from pathlib import Path

from config.precision import Precision, WantedPrecision

CPUINFO = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
"""Flags of instructions that multiply bfloat16 and add up in float32."""


@functools.cache
def processor_flags() -> frozenset[str]:
    """Instruction set extensions of this machine, as Linux names them."""
    for line in CPUINFO.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


def precision_here(wanted: WantedPrecision, flags: frozenset[str] | None = None) -> Precision:
    """The precision of UNets on a CPU, this machine's by default; `wanted` is `SDGRAPH_TVM_PRECISION`."""
    have = processor_flags() if flags is None else flags
    if wanted == "auto":
        return "float32" if BFLOAT16_FLAGS.isdisjoint(have) else "bfloat16"
    return wanted
