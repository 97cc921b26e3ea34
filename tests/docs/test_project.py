"""What GitHub reads of this project is what GitHub expects, and it calls targets that exist."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from config.catalog import ROOT
from deployments import __version__

GITHUB = ROOT / ".github"


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("github-workflows", sorted(GITHUB.glob("workflows/*.yml"))),
        ("github-actions", sorted(GITHUB.glob("actions/*/action.yml"))),
        ("dependabot", [GITHUB / "dependabot.yml"]),
        ("github-issue-forms", [GITHUB / "ISSUE_TEMPLATE/bug.yml", GITHUB / "ISSUE_TEMPLATE/feature.yml"]),
        ("github-issue-config", [GITHUB / "ISSUE_TEMPLATE/config.yml"]),
    ],
)
def test_github_accepts_its_files(schema: str, files: list[Path]) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_workflows_call_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for workflow in GITHUB.glob("workflows/*.yml"):
        for line in re.findall(r"run: make (.*)", workflow.read_text()):
            called = [word for word in re.sub(r"\w+=(\"[^\"]*\"|\S*)|[}].*", "", line).split() if word]
            assert called, line
            assert set(called) <= targets, f"{workflow.name}: {line}"


def test_every_test_folder_is_run_by_make_and_by_github() -> None:
    makefile, ci = (ROOT / "Makefile").read_text(), (GITHUB / "workflows/ci.yml").read_text()
    by_hand = {"clients", "support"}  # `make clients`; what tests share
    for folder in (path.name for path in (ROOT / "tests").iterdir() if (path / "__init__.py").exists()):
        if folder not in by_hand | {"cluster"}:  # all of tests/cluster is slow
            assert f"tests/{folder}" in makefile, folder
    picture_tests = re.search(r"^PICTURE_TESTS \?= (.*)$", makefile, re.MULTILINE)
    assert picture_tests is not None
    for path in picture_tests[1].split():
        assert path in ci, f"{path} is in no shard"


@pytest.fixture
def release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release", GITHUB / "release.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_release_has_its_section_of_the_changelog(release: ModuleType) -> None:
    notes = release.notes(f"v{__version__}")
    assert notes.startswith("### ")
    assert "\n## " not in notes


def test_a_tag_that_is_not_the_version_is_no_release(release: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"the tag is v99, and .* says"):
        release.notes("v99")


def test_the_manifests_name_the_version() -> None:
    for path in (ROOT / "k8s/overlays").glob("*/kustomization.yaml"):
        for image in yaml.safe_load(path.read_text()).get("images", []):
            assert image.get("newTag", __version__) == __version__, path


def test_pre_commit_accepts_its_file() -> None:
    command = [sys.executable, "-m", "pre_commit", "validate-config", str(ROOT / ".pre-commit-config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
