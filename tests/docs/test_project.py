"""What GitHub reads of this project is what GitHub expects, and it calls targets that exist."""

from __future__ import annotations

import datetime
import importlib.util
import re
import shutil
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


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What a release changes, in a folder of its own."""
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    (tmp_path / "deployments").mkdir()
    (tmp_path / "deployments/__init__.py").write_text((ROOT / "deployments/__init__.py").read_text())
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n\n### Added\n- A thing.\n\n## [0.0.1]\n")
    return tmp_path


def test_a_prepared_release_has_its_version_everywhere_and_its_notes(release: ModuleType, checkout: Path) -> None:
    changed = release.prepare("99.0.0", datetime.date(2030, 1, 2), checkout)
    assert {"CHANGELOG.md", "deployments/__init__.py", "k8s/base/rayservice.yaml"} <= set(changed)
    assert image_tags(checkout / "k8s") == {"99.0.0"}
    assert release.notes("v99.0.0", checkout) == "### Added\n- A thing."
    assert "## [Unreleased]\n\n## [99.0.0] - 2030-01-02\n\n### Added" in (checkout / "CHANGELOG.md").read_text()
    with pytest.raises(ValueError, match="nothing under"):
        release.prepare("99.0.1", datetime.date(2030, 1, 2), checkout)


@pytest.mark.parametrize("new", ["0.0.0", __version__, "v99.0.0", "99.0"])
def test_a_version_that_is_not_above_the_present_one_is_refused(release: ModuleType, checkout: Path, new: str) -> None:
    with pytest.raises(ValueError, match="is not a version above"):
        release.prepare(new, datetime.date(2030, 1, 2), checkout)


def test_a_release_has_its_section_of_the_changelog(release: ModuleType) -> None:
    notes = release.notes(f"v{__version__}")
    assert notes.startswith("### ")
    assert "\n## " not in notes


def test_a_tag_that_is_not_the_version_is_no_release(release: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"the tag is v99, and .* says"):
        release.notes("v99")


def image_tags(folder: Path) -> set[str]:
    """The tags of this project's images in manifests and runbook."""
    texts = [path.read_text() for kind in ("yaml", "md") for path in folder.rglob(f"*.{kind}")]
    return {tag for text in texts for tag in re.findall(r"ghcr\.io/sdgraph/[\w-]+:(\d[\w.]*\w)", text)}


def test_the_manifests_name_the_version() -> None:
    assert image_tags(ROOT / "k8s") == {__version__}
    for path in (ROOT / "k8s/overlays").glob("*/kustomization.yaml"):
        for image in yaml.safe_load(path.read_text()).get("images", []):
            assert image.get("newTag", __version__) == __version__, path


def test_pre_commit_accepts_its_file() -> None:
    command = [sys.executable, "-m", "pre_commit", "validate-config", str(ROOT / ".pre-commit-config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
