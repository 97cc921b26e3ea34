"""A program compiled while the server serves: in a niced process of its own, which tries it before anyone finds it.

Whatever goes wrong there, a crash of the compiler or of its code, ends that process and leaves no artifact.
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
"""A compile that takes longer is ended: SDXL's takes some minutes on a busy core."""
NICENESS = 19
ONE_AT_A_TIME = "on-demand.lock"
TAIL = 2000
"""Characters of what a failed process said that are worth a line of the log."""


class CompileFailedError(RuntimeError):
    """A program that could not be made; the message says why."""


def compile_apart(
    cache: ArtifactCache, config: Mapping[str, Any], key: ArtifactKey, seconds: float = MOST_SECONDS
) -> Artifact:
    """The artifact of a key, made now if it is not there; one at a time of all processes that share the folder.

    Raises:
        CompileFailedError: the process failed, died or took longer than `seconds`; nothing was left.
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
    """Compile in a process; what it said if it failed."""
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
    """Stop when whoever wants the program is gone: its end of the pipe closes with it."""
    sys.stdin.read()
    os._exit(1)


def _work() -> None:
    """Make what standard input says."""
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
