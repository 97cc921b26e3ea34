"""What a setting of the precision means on a machine."""

from __future__ import annotations

import pytest

from config.precision import Precision, WantedPrecision
from config.settings import Settings
from pipelines.processor import precision_here


@pytest.mark.parametrize(
    ("wanted", "flags", "precision"),
    [
        ("auto", {"avx2", "fma"}, "float32"),
        ("auto", {"avx2", "avx512f", "avx512_vnni"}, "float32"),
        ("auto", {"avx2", "avx512f", "avx512_bf16"}, "bfloat16"),
        ("auto", {"amx_bf16"}, "bfloat16"),
        ("float32", {"avx512_bf16"}, "float32"),
        ("bfloat16", set(), "bfloat16"),
    ],
)
def test_auto_is_what_the_processor_multiplies(wanted: WantedPrecision, flags: set[str], precision: Precision) -> None:
    assert precision_here(wanted, frozenset(flags)) == precision


def test_the_setting_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SDGRAPH_TVM_PRECISION", raising=False)
    assert Settings().tvm_precision == "auto"
    monkeypatch.setenv("SDGRAPH_TVM_PRECISION", "bfloat16")
    assert Settings().tvm_precision == "bfloat16"
    monkeypatch.setenv("SDGRAPH_TVM_PRECISION", "float16")
    with pytest.raises(ValueError, match="'auto', 'float32' or 'bfloat16'"):
        Settings()
