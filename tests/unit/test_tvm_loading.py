"""Which programs a replica takes of those that are there: of one kind, the best it can run, and never in silence."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from config.catalog import Catalog, Size
from pipelines.backends.tvm.artifacts import LEVELS, Artifact, ArtifactCache, ArtifactKey, ProgramKind, program_kinds
from pipelines.backends.tvm.denoiser import PackedWeights
from pipelines.backends.tvm.loading import _compiled
from pipelines.backends.tvm.shapes import artifact_key

UNET, SIZES = "unet-sd15", (Size(width=128, height=128), Size(width=256, height=256))
NEW = frozenset({flag for flags in LEVELS.values() for flag in flags})
NATIVE = ProgramKind("bfloat16", "x86-64-v4+bf16")
PLAIN = ProgramKind("float32", "x86-64-v4")


@pytest.fixture
def sized(catalog: Catalog) -> Catalog:
    models = tuple(m.model_copy(update={"tvm_sizes": SIZES if m.unet == UNET else ()}) for m in catalog.models)
    return catalog.model_copy(update={"models": models})


def make(cache: ArtifactCache, catalog: Catalog, kind: ProgramKind, size: Size) -> ArtifactKey:
    key = artifact_key(catalog, UNET, size.width, size.height, 2, False, kind.level, precision=kind.precision)

    def build(path: Path) -> Artifact:
        path.write_bytes(b"program")
        return Artifact(key=key, program=hashlib.sha256(b"program").hexdigest(), weights=(), compile_seconds=1)

    cache.make(key, build)
    return key


def taken(cache: ArtifactCache, catalog: Catalog, flags: frozenset[str], wanted: str = "auto") -> set[tuple[str, str]]:
    kinds = program_kinds(wanted, flags)  # type: ignore[arg-type]
    found, _ = _compiled(catalog, UNET, cache, kinds)
    return {(str(size), artifact.key.dtype) for (size, _), artifact in found.items()}


def reasons(cache: ArtifactCache, catalog: Catalog, flags: frozenset[str], wanted: str = "auto") -> dict[str, str]:
    kinds = program_kinds(wanted, flags)  # type: ignore[arg-type]
    return {str(size): size.reason for size in _compiled(catalog, UNET, cache, kinds)[1]}


def test_float32_serves_where_nothing_is_compiled_in_bfloat16(sized: Catalog, tmp_path: Path) -> None:
    cache = ArtifactCache(tmp_path)
    make(cache, sized, PLAIN, SIZES[0])
    assert taken(cache, sized, NEW) == {("128x128", "float32")}
    assert taken(cache, sized, NEW, "bfloat16") == set(), "asked for by name"


def test_of_a_mixed_table_one_precision_is_taken(sized: Catalog, tmp_path: Path) -> None:
    cache = ArtifactCache(tmp_path)
    make(cache, sized, NATIVE, SIZES[0])
    make(cache, sized, PLAIN, SIZES[1])
    assert taken(cache, sized, NEW) == {("128x128", "bfloat16")}
    told = reasons(cache, sized, NEW)
    assert told == {"256x256": "a program in float32 for x86-64-v4 is left aside: another kind is run here"}
    assert taken(cache, sized, NEW, "float32") == {("256x256", "float32")}


def test_instructions_that_the_machine_lacks_are_never_loaded(
    sized: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, old = ArtifactCache(tmp_path), NEW - {"avx512_bf16"}
    make(cache, sized, NATIVE, SIZES[0])
    monkeypatch.setattr("pipelines.backends.tvm.artifacts.processor_flags", lambda: old)
    for wanted in ("auto", "bfloat16"):
        assert taken(cache, sized, old, wanted) == set()
        told = reasons(cache, sized, old, wanted)
        assert told["128x128"].endswith("is for x86-64-v4+bf16; this processor has no avx512_bf16")


def test_a_half_written_program_is_left_and_told(sized: Catalog, tmp_path: Path) -> None:
    cache = ArtifactCache(tmp_path)
    key = make(cache, sized, NATIVE, SIZES[0])
    make(cache, sized, PLAIN, SIZES[0])
    (tmp_path / key.id / "unet.so").write_bytes(b"prog")
    assert taken(cache, sized, NEW) == {("128x128", "float32")}
    assert reasons(cache, sized, NEW)["128x128"].startswith(f"artifact {key.id} is damaged")


def test_packing_lets_go_of_each_weight_that_is_packed(sized: Catalog) -> None:
    weights = {"a": torch.randn(64, 32), "b": torch.randn(64), "unused": torch.randn(8)}
    key = artifact_key(sized, UNET, 128, 128, 2, False, NATIVE.level, precision=NATIVE.precision)
    kept = (("a", "matrix16", 64, 0), ("b", "plain", 0, 0))
    packed = PackedWeights(weights)
    artifact = Artifact(key=key, program="", weights=kept, compile_seconds=1)
    packed.pack([artifact])
    assert packed._state == {}
    first, second = (torch.from_dlpack(weight) for weight in packed.arguments(artifact))
    assert (first.dtype, first.shape) == (torch.int32, (1, 1, 16, 64))
    assert second.data_ptr() == weights["b"].data_ptr(), "what needs no packing is not copied"
