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
    assert not any("gcc" in stage(name) for name in ("runtime", "dev"))


def test_the_dockerfile() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    text = (ROOT / "Dockerfile").read_text()
    assert re.search(r"apt-get install .*\bbash wget\b", text), "KubeRay's probes run them"
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE)[-1] == "1000"


def test_the_dockerfile_has_no_default_base_image() -> None:
    """A tag that moves, or a digest that nobody has, would be worse than none."""
    text = (ROOT / "Dockerfile").read_text()
    assert re.findall(r"^ARG (BASE.*)$", text, re.MULTILINE) == ["BASE"]
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) == {"${BASE}", "runtime"}
