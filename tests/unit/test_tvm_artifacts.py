"""Compiled UNets on disk: what distinguishes them, what is refused, how they are made. No compiler runs here."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from config.catalog import ROOT
from pipelines.backends.tvm.artifacts import (
    COMPILER_SOURCES,
    DESCRIPTION,
    HERE,
    PROGRAM,
    Artifact,
    ArtifactCache,
    ArtifactError,
    ArtifactKey,
    best_level,
    config_hash,
    needed_flags,
    program_kinds,
    sources_hash,
)
from pipelines.backends.tvm.compile_subprocess import CompileFailedError, compile_in_subprocess

KEY = ArtifactKey(
    config="c", height=64, width=64, rows=2, tokens=77, pooled=0, control=False, level="x86-64-v3", sources="s"
)
V3 = frozenset(needed_flags("x86-64-v3"))
V4 = frozenset(needed_flags("x86-64-v4"))


def build(path: Path) -> Artifact:
    path.write_bytes(b"machine code")
    digest = hashlib.sha256(b"machine code").hexdigest()
    return Artifact(key=KEY, program=digest, weights=(("conv.weight", "conv", 16, 0),), compile_seconds=1.5)


def test_a_key_changes_with_every_part_of_it() -> None:
    changes = {
        "config": "other",
        "height": 32,
        "width": 96,
        "rows": 4,
        "tokens": 64,
        "pooled": 1280,
        "control": True,
        "loras": True,
        "level": "x86-64-v4",
        "dtype": "bfloat16",
        "sources": "t",
        "tvm": "0.28",
        "tvm_ffi": "0.2",
    }
    assert set(changes) == set(ArtifactKey.model_fields)
    ids = {KEY.model_copy(update={name: value}).id for name, value in changes.items()} | {KEY.id}
    assert len(ids) == len(changes) + 1


def test_the_configs_names_do_not_count_but_its_shape_does() -> None:
    config = {"block_out_channels": [32, 64], "_name_or_path": "here", "_diffusers_version": "0.42"}
    assert config_hash(config) == config_hash(config | {"_name_or_path": "there"})
    assert config_hash(config) != config_hash(config | {"block_out_channels": [32, 96]})


def test_a_changed_kernel_is_another_key(tmp_path: Path) -> None:
    for name in COMPILER_SOURCES:
        (tmp_path / name).write_bytes((HERE / name).read_bytes())
    assert sources_hash(tmp_path) == sources_hash()
    with (tmp_path / "products.py").open("a") as file:
        file.write("\n")
    assert sources_hash(tmp_path) != sources_hash()


def test_an_artifact_is_compiled_once_and_then_found(tmp_path: Path) -> None:
    cache = ArtifactCache(tmp_path)
    assert cache.find(KEY, V3) is None
    assert cache.make(KEY, build) == (cache.find(KEY, V3), True)
    assert cache.make(KEY, build) == (cache.find(KEY, V3), False)
    assert cache.program(build(tmp_path / "x")).read_bytes() == b"machine code"


@pytest.mark.parametrize("damage", ["program", "description", "lost", "other key"])
def test_a_damaged_artifact_is_refused_and_made_anew(tmp_path: Path, damage: str) -> None:
    cache = ArtifactCache(tmp_path)
    cache.make(KEY, build)
    folder = tmp_path / KEY.id
    match damage:
        case "program":
            (folder / PROGRAM).write_bytes(b"machine cod")
        case "description":
            (folder / DESCRIPTION).write_text("{")
        case "lost":
            (folder / PROGRAM).unlink()
        case _:
            text = (folder / DESCRIPTION).read_text()
            (folder / DESCRIPTION).write_text(text.replace('"rows": 2', '"rows": 4'))
    with pytest.raises(ArtifactError, match=r"(?s)damaged.*compile it again"):
        cache.find(KEY, V3)
    assert cache.make(KEY, build)[1]
    assert cache.find(KEY, V3) is not None


def test_an_artifact_for_another_processor_is_refused(tmp_path: Path) -> None:
    cache = ArtifactCache(tmp_path)
    cache.make(KEY, build)
    with pytest.raises(ArtifactError, match="is for x86-64-v3; this processor has no avx2, fma"):
        cache.find(KEY, V3 - {"avx2", "fma"})
    assert cache.find(KEY, V4) is not None, "a better one runs it"


def test_the_level_of_a_machine() -> None:
    assert best_level(V3) == "x86-64-v3"
    assert best_level(V4 | {"amx_tile"}) == "x86-64-v4"
    assert best_level(V4 - {"avx512vl"}) == "x86-64-v3"
    with pytest.raises(ArtifactError, match="needs AVX2 and FMA"):
        best_level(V3 - {"fma"})


def test_kinds_of_programs_a_machine_runs_best_first() -> None:
    new = V4 | {"avx512_bf16"}
    assert best_level(new) == "x86-64-v4", "float32 needs no more"
    assert best_level(new, "bfloat16") == "x86-64-v4+bf16"
    assert program_kinds("auto", new) == (
        ("bfloat16", "x86-64-v4+bf16"),
        ("float32", "x86-64-v4"),
        ("float32", "x86-64-v3"),
    )
    assert program_kinds("auto", V4) == (("float32", "x86-64-v4"), ("float32", "x86-64-v3"))
    assert program_kinds("bfloat16", V3) == (("bfloat16", "x86-64-v3"),), "emulated, since it was asked for by name"
    assert program_kinds("float32", new) == program_kinds("float32", V4)
    assert program_kinds("auto", V3 - {"fma"}) == ()


def test_a_compile_that_fails_leaves_nothing_to_load(tmp_path: Path) -> None:
    cache = ArtifactCache(tmp_path)

    def broken(path: Path) -> Artifact:
        path.write_bytes(b"half")
        raise RuntimeError("out of disk")

    with pytest.raises(RuntimeError, match="out of disk"):
        cache.make(KEY, broken)
    assert cache.find(KEY, V3) is None
    assert [p.name for p in tmp_path.iterdir()] == [f"{KEY.id}.lock"]


def test_what_a_process_that_died_left_is_never_found_and_goes_with_the_next(tmp_path: Path) -> None:
    cache, left = ArtifactCache(tmp_path), tmp_path / f"{KEY.id}.xyz.partial"
    left.mkdir()
    (left / PROGRAM).write_bytes(b"half")
    assert cache.find(KEY, V3) is None
    cache.make(KEY, build)
    assert not left.exists()


def test_a_compiling_process_that_is_ended_leaves_nothing(tmp_path: Path) -> None:
    """It takes longer to start than it is given."""
    cache = ArtifactCache(tmp_path)
    with pytest.raises(CompileFailedError, match="ended with -9"):
        compile_in_subprocess(cache, {}, KEY, seconds=0)
    assert cache.find(KEY, V3) is None


@pytest.mark.slow
def test_a_compiling_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(CompileFailedError, match=r"(?s)ended with 1: .*NoSuchBlock"):
        compile_in_subprocess(ArtifactCache(tmp_path), {"down_block_types": ["NoSuchBlock"]}, KEY)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_nothing_is_found_while_it_is_being_written(tmp_path: Path) -> None:
    cache = ArtifactCache(tmp_path)

    def watched(path: Path) -> Artifact:
        artifact = build(path)
        assert cache.find(KEY, V3) is None
        return artifact

    assert cache.make(KEY, watched)[1]


def test_of_several_who_ask_at_once_one_compiles(tmp_path: Path) -> None:
    made: list[bool] = []
    asking = threading.Barrier(4)
    others_ask = threading.Semaphore(0)

    def slow(path: Path) -> Artifact:
        for _ in range(4):
            others_ask.acquire()
        return build(path)

    def ask() -> None:
        asking.wait()
        others_ask.release()
        made.append(ArtifactCache(tmp_path).make(KEY, slow)[1])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False, False, False, True]


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_compiled(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "pipelines.backends.tvm.compile", "--cache", str(tmp_path / "file" / "cache")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "cannot be written (Not a directory); name a folder that can" in done.stderr
    assert "Traceback" not in done.stderr
