"""What this machine lacks to build an image and to run containers, found out by running a small one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.image.building import MIRROR, base_exists, buildah
from tests.image.containers import container, network
from tests.support.manifests import documents, groups, ray_service

TOOLS = ("buildah", "debootstrap", "runc", "ip", "kubectl")
ADDRESS = "10.77.0.1"
NOTHING: dict[str, Any] = {"Env": ["PATH=/usr/bin"], "WorkingDir": "/"}


def why_not(folder: Path) -> str | None:
    """Why the image cannot be tested here; None where it can.

    Args:
        folder: for the small container's files.
    """
    if lacking := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"the image's test needs {', '.join(lacking)}"
    if os.geteuid() != 0:
        return "the image's test needs root, which may make namespaces and mount an image's files"
    try:
        if json.loads(buildah("info"))["store"]["GraphDriverName"] == "vfs":
            return "this machine's images are kept without overlays (driver vfs): gigabytes for each layer"
        _run_a_small_one(folder)
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        return f"this machine cannot run containers as runc does: {error}"
    if not base_exists():
        try:
            urllib.request.urlopen(f"{MIRROR}/dists/bookworm/InRelease", timeout=30).close()
        except (urllib.error.URLError, TimeoutError) as error:
            return f"the image's base is made from {MIRROR}, which does not answer: {error}"
    return None


def _run_a_small_one(folder: Path) -> None:
    """`true` of this machine in the head's pod: its user, limits, volumes and seccomp profile, in its own network."""
    pod = dict(groups(ray_service(documents("dev-cpu"))))["head"]["template"]["spec"]
    pod["volumes"].append({"name": "usr"})
    pod["containers"][0]["volumeMounts"].append({"name": "usr", "mountPath": "/usr", "readOnly": True})
    (folder / "keys").mkdir(parents=True)
    given = {"api-keys": folder / "keys", "usr": Path("/usr")}
    scratch = buildah("from", "scratch")
    try:
        files = Path(buildah("mount", scratch))
        for name in ("bin", "lib", "lib64"):
            (files / name).symlink_to(f"usr/{name}")
        with (
            network({"client": "10.77.0.254", "pod": ADDRESS}) as spaces,
            container("trial", (files, NOTHING), pod, spaces["pod"], ADDRESS, folder, ["/bin/true"], {}, given) as one,
        ):
            ended = one.process.wait(60)
            assert ended == 0, f"`true` ended with {ended}: {one.printed()[-1000:]}"
    finally:
        buildah("rm", scratch)
