"""Compiling a program while the server serves, in a subprocess of low priority.

The subprocess runs the program once before it is stored. If the compiler or the compiled code crashes, only the
subprocess ends, and no artifact is stored.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from config.catalog import ROOT
from pipelines.backends.tvm.artifacts import Artifact, ArtifactCache, ArtifactError, ArtifactKey

logger = logging.getLogger(__name__)

MOST_SECONDS = 1800
"""Seconds after which a compile is ended. SDXL takes some minutes on a busy core."""
NICENESS = 19
ONE_AT_A_TIME = "on-demand.lock"
TAIL = 2000
"""How many of the last characters of a failed process's output the error message has."""


class CompileFailedError(RuntimeError):
    """A program could not be compiled; the message says why."""


def compile_in_subprocess(
    cache: ArtifactCache, config: Mapping[str, Any], key: ArtifactKey, seconds: float = MOST_SECONDS
) -> Artifact:
    """Return the artifact of a key, and compile it first if the cache does not have it.

    Of all processes that share the cache's folder, one compiles at a time; the others wait.

    Raises:
        CompileFailedError: the subprocess failed, died or took longer than `seconds`; no artifact was stored.
    """
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(cache.folder / ONE_AT_A_TIME):
            said = "" if _found(cache, key) else _run(cache, config, key, seconds)
    except OSError as error:
        raise CompileFailedError(f"{cache.folder}: {error}") from error
    artifact = _found(cache, key)
    if artifact is None:
        raise CompileFailedError(said)
    return artifact


def _found(cache: ArtifactCache, key: ArtifactKey) -> Artifact | None:
    try:
        return cache.find(key)
    except ArtifactError as error:
        logger.warning("%s: making it anew", error)
        return None


def _run(cache: ArtifactCache, config: Mapping[str, Any], key: ArtifactKey, seconds: float) -> str:
    """Compile in a subprocess; returns its exit status and the end of its output, for an error message."""
    folder = str(cache.folder.resolve())
    task = json.dumps({"folder": folder, "config": dict(config), "key": key.model_dump(), "niceness": NICENESS})
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TVM_NUM_THREADS": "1", "TVM_BIND_THREADS": "0"}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=said,
        )
        assert process.stdin is not None
        try:
            process.stdin.write(task.encode() + b"\n")
            process.stdin.flush()
            status = process.wait(seconds)
        except (subprocess.TimeoutExpired, BrokenPipeError) as error:
            process.kill()
            status = process.wait()
            logger.warning("compiling %s ends: %s", key.id, type(error).__name__)
        finally:
            process.stdin.close()
        said.seek(0)
        return f"the compiling process ended with {status}: {said.read().decode(errors='replace')[-TAIL:].strip()}"


def _end_with_parent() -> None:
    """End this process when its parent is gone: the parent's end of the pipe is then closed."""
    sys.stdin.read()
    os._exit(1)


def _work() -> None:
    """Compile the program that standard input describes as one line of JSON."""
    task = json.loads(sys.stdin.readline())
    os.nice(task["niceness"])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    from pipelines.backends.tvm.compile import compile_unet, try_program

    torch.set_num_threads(1)

    def build(program: Path) -> Artifact:
        artifact = compile_unet(task["config"], key, program)
        try_program(task["config"], artifact, program)
        return artifact

    key = ArtifactKey.model_validate(task["key"])
    ArtifactCache(Path(task["folder"])).make(key, build)


if __name__ == "__main__":
    _work()
