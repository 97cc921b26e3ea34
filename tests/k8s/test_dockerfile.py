"""The Dockerfile, read. tests/image builds it and runs what it makes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from config.catalog import ROOT


def stage(name: str) -> str:
    """Text of a build stage."""
    text = (ROOT / "Dockerfile").read_text()
    found = re.search(rf"^FROM \S+ AS {name}$(.*?)(?=^FROM|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def test_only_the_compilers_stage_has_a_compiler() -> None:
    assert " gcc " in stage("compiler")
    assert not any("gcc" in stage(name) for name in ("build", "runtime", "dev"))


def test_the_dockerfile() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    text = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^ARG BASE=\S+@sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    assert re.search(r"apt-get install .*\bbash wget\b", text), "KubeRay's probes run them"
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE)[-1] == "1000"


def base_image(*given: str) -> subprocess.CompletedProcess[str]:
    """What the Dockerfile's first FROM names; BuildKit expands the arguments before it as bash does."""
    text = (ROOT / "Dockerfile").read_text()
    arguments = re.findall(r"^ARG (\w+=.*)$", text[: text.index("\nFROM ")], re.MULTILINE)
    image = re.search(r"^FROM (\S+) AS build$", text, re.MULTILINE)
    assert image is not None
    script = "\n".join([arguments[0], *given, *arguments[1:], f"echo {image[1]}"])
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)


def test_a_build_with_the_digest_of_zeros_says_that_it_is_a_placeholder() -> None:
    refused = base_image()
    assert refused.returncode != 0
    assert "the digest of zeros is a placeholder, build with --build-arg BASE=" in refused.stderr


def test_a_build_with_a_real_digest_begins_with_it() -> None:
    image = f"mirror.example/python:3.11-slim-bookworm@sha256:{'0123456789abcdef' * 4}"
    assert base_image(f"BASE={image}").stdout.strip() == image
