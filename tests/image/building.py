"""The image, built on a base that debootstrap makes. Layers are kept: a second build takes seconds."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from config.catalog import ROOT

BASE = "localhost/sdgraph-test/base:bookworm"
IMAGE = "localhost/sdgraph-test/dev"
PACKAGES = "python3.11,python3.11-venv,python3,python3-distutils,ca-certificates"
FOLDERS = ("config", "pipelines", "deployments", "models")
CARD_PACKAGES = ("cuda-", "nvidia-", "triton")
PROXIES = ("http_proxy", "https_proxy", "no_proxy")
MIRROR = "http://deb.debian.org/debian"


def base_exists() -> bool:
    """Whether an earlier build has left the base."""
    return _id(BASE) != ""


def build(folder: Path) -> str:
    """Name of the image of the target `dev`, whose context is made in `folder`, on the repository's file system."""
    folder.mkdir(parents=True, exist_ok=True)
    if not base_exists():
        _make_base(folder / "base")
    before = _id(IMAGE)
    context = _context(folder / "context")
    settings = folder / "pip.conf"
    mounts = _pip_settings(settings)
    arguments = [f"--build-arg={name}={os.environ[name]}" for name in PROXIES if name in os.environ]
    arguments += [f"--volume={path}:{path}:ro" for path in mounts] + [f"--volume={settings}:/etc/pip.conf:ro"]
    buildah(
        *("bud", "--isolation=chroot", "--layers", "--format=docker", "--target=dev", f"--tag={IMAGE}"),
        *(f"--build-arg=BASE={BASE}", *arguments, str(context)),
    )
    if before not in ("", _id(IMAGE)):  # and the layers that no image has any more
        buildah("rmi", before)
    return IMAGE


def _id(image: str) -> str:
    """Id of the image that has this name; empty without one."""
    return buildah("images", "--quiet", "--filter", f"reference={image}")


def buildah(*arguments: str) -> str:
    """What a buildah command printed; what it complained of where it failed."""
    done = subprocess.run(["buildah", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"buildah {arguments[0]}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout.strip()


def _make_base(root: Path) -> None:
    """Debian's Python 3.11, for the image that the Dockerfile's users take from a registry."""
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(root), MIRROR]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    (root / "usr" / "bin" / "python").symlink_to("python3")
    container = buildah("from", "scratch")
    buildah("add", container, str(root), "/")
    buildah("commit", "--rm", container, BASE)
    shutil.rmtree(root)


def _context(folder: Path) -> Path:
    """What the Dockerfile copies, hard links, with the lock of this machine's kind."""
    shutil.rmtree(folder, ignore_errors=True)
    left_out = shutil.ignore_patterns("__pycache__", "tiny")
    for name in FOLDERS:
        ignored = left_out if name == "models" else shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, copy_function=os.link, ignore=ignored)
    for name in ("Dockerfile", ".dockerignore"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "requirements.txt").write_text(_lock(folder.parent / "wheels"))
    return folder


def _lock(folder: Path) -> str:
    """`requirements.txt`; where the tests run on torch's CPU build, with that instead of CUDA's gigabytes.

    Its hash is that of the file that pip finds here: the lock has none of it.
    """
    text = (ROOT / "requirements.txt").read_text()
    if not torch.__version__.endswith("+cpu"):
        return text
    torch_of_here = f"torch=={torch.__version__}"
    _pip("download", "--quiet", "--no-deps", "--dest", str(folder), torch_of_here)
    (wheel,) = folder.glob("torch-*.whl")
    (digest,) = re.findall(r"sha256:\w{64}", _pip("hash", str(wheel)))
    kept = [
        entry
        for entry in re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)
        if not entry.startswith((*CARD_PACKAGES, "torch=="))
    ]
    shutil.rmtree(folder)
    return f"{''.join(kept)}{torch_of_here} --hash={digest}\n"


def _pip(*arguments: str) -> str:
    return subprocess.run([sys.executable, "-m", "pip", *arguments], check=True, capture_output=True, text=True).stdout


def _pip_settings(file: Path) -> list[str]:
    """Write this machine's pip configuration as one file; the paths in it, which the build must see.

    Constraints are left out: every version of the lock is exact.
    """
    values: dict[str, str] = {}
    lines = [line.partition("=") for line in _pip("config", "list").splitlines()]
    for name, _, value in sorted(lines, reverse=True):  # `global.` first, `:env:.` wins
        key = name.rpartition(".")[2]
        values[key] = str(ast.literal_eval(value))
    values.pop("constraint", None)
    file.write_text(
        "".join(["[global]\n", *(f"{key} = {value.replace(chr(10), ' ')}\n" for key, value in values.items())])
    )
    words = " ".join(values.values()).split()
    paths = [Path(word) for word in words if word.startswith("/")]
    # An index in files names them relative to itself: they lie beside it.
    paths += [Path(word.removeprefix("file://")).parent for word in words if word.startswith("file:///")]
    return sorted({str(path) for path in paths if path.exists()})
