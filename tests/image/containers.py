"""Containers as a kubelet would run them, by runc: an image's files, a pod of the manifests, a network namespace."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.image.building import buildah
from tests.support.manifests import Document, quantity

SECCOMP = Path("/usr/share/containers/seccomp.json")
"""The profile of container engines, `RuntimeDefault`, in their own format."""
CLONE_NEWNET = 0x40000000
USER = 1000


def run(*command: str) -> str:
    """What a command printed; what it complained of where it failed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def network(addresses: Mapping[str, str]) -> Iterator[dict[str, Path]]:
    """A network namespace for each name, with that IPv4 address; they reach each other and nothing else."""
    spaces = {name: f"sdgraph-{os.getpid()}-{name}" for name in addresses}
    first, *others = spaces.values()
    with ExitStack() as undo:
        for space in spaces.values():
            run("ip", "netns", "add", space)
            undo.callback(run, "ip", "netns", "delete", space)
            run("ip", "-n", space, "link", "set", "lo", "up")
        run("ip", "-n", first, "link", "add", "bridge", "type", "bridge")
        for number, space in enumerate(others):
            port = f"port{number}"
            run("ip", "-n", first, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
            run("ip", "-n", first, "link", "set", port, "master", "bridge", "up")
        for name, device in zip(spaces, ("bridge", *["eth0"] * len(others)), strict=True):
            run("ip", "-n", spaces[name], "address", "add", f"{addresses[name]}/24", "dev", device)
            run("ip", "-n", spaces[name], "link", "set", device, "up")
        for space in others:  # Ray asks which address would reach the world
            run("ip", "-n", space, "route", "add", "default", "via", addresses[next(iter(addresses))])
        yield {name: Path("/run/netns") / space for name, space in spaces.items()}


def enter(space: Path) -> None:
    """Move the calling thread into a network namespace."""
    with space.open() as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(space))


@contextmanager
def root_of(image: str) -> Iterator[Path]:
    """An image's files."""
    container = buildah("from", "--pull-never", image)
    try:
        yield Path(buildah("mount", container))
    finally:
        buildah("rm", container)


@dataclass
class Container:
    """A container that runs."""

    name: str
    process: subprocess.Popen[bytes]
    output: Path
    """What it prints: `kubectl logs`."""

    def printed(self) -> str:
        """All that it printed so far."""
        return self.output.read_text(errors="replace")

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in it, as an exec probe does."""
        return subprocess.run(["runc", "exec", self.name, *command], capture_output=True, text=True, check=False)

    def kill(self, number: signal.Signals) -> None:
        """Send its first process a signal."""
        run("runc", "kill", self.name, number.name)


@contextmanager
def container(
    name: str,
    image: tuple[Path, Mapping[str, Any]],
    pod: Document,
    space: Path,
    address: str,
    folder: Path,
    command: Sequence[str],
    environment: Mapping[str, str],
    mounts: Mapping[str, Path],
) -> Iterator[Container]:
    """Run a command in the first container of a pod.

    Args:
        name: of the container.
        image: its files and its configuration.
        pod: `spec` of the pod.
        space: its network namespace.
        address: its IPv4 address there.
        folder: for its writable volumes and its output.
        command: what runs.
        environment: variables beside the image's and the pod's.
        mounts: what lies in volumes that are neither empty nor in memory -> by the volume's name.
    """
    bundle = folder / name
    bundle.mkdir(parents=True)
    run("runc", "spec", "--bundle", str(bundle))
    file = bundle / "config.json"
    specification = json.loads(file.read_text())
    _fill(specification, image, pod, space, command, environment)
    specification["mounts"] += [_mount(pod, mount, bundle, mounts) for mount in pod["containers"][0]["volumeMounts"]]
    specification["mounts"] = [
        m for m in specification["mounts"] if (m["destination"], m.get("source")) != ("/dev/shm", "shm")
    ]
    # As the kubelet does; without a name server a lookup fails at once instead of after its time.
    for target, text in {"/etc/hosts": f"127.0.0.1 localhost\n{address} pod\n", "/etc/resolv.conf": ""}.items():
        source = bundle / Path(target).name
        source.write_text(text)
        source.chmod(0o644)
        mount = {"destination": target, "type": "bind", "source": str(source), "options": ["bind", "ro"]}
        specification["mounts"].append(mount)
    specification["linux"]["cgroupsPath"] = f"/sdgraph-{os.getpid()}-{name}"
    file.write_text(json.dumps(specification))
    output = bundle / "output"
    with output.open("wb") as log:
        running = f"sdgraph-{os.getpid()}-{name}"
        process = subprocess.Popen(
            ["runc", "run", "--bundle", str(bundle), running], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            yield Container(running, process, output)
        finally:
            subprocess.run(["runc", "kill", "--all", running, "KILL"], capture_output=True, check=False)
            process.wait(60)
            subprocess.run(["runc", "delete", "--force", running], capture_output=True, check=False)


def _fill(
    specification: dict[str, Any],
    image: tuple[Path, Mapping[str, Any]],
    pod: Document,
    space: Path,
    command: Sequence[str],
    environment: Mapping[str, str],
) -> None:
    """Turn runc's example into what the pod asks for."""
    files, configuration = image
    asked = pod["containers"][0]
    security = asked["securityContext"]
    assert (pod["securityContext"]["runAsUser"], security["capabilities"]) == (USER, {"drop": ["ALL"]})
    variables = dict(entry.split("=", 1) for entry in configuration["Env"])
    variables |= {entry["name"]: entry["value"] for entry in asked["env"] if "value" in entry} | dict(environment)
    specification["process"] |= {
        "terminal": False,
        "user": {
            "uid": USER,
            "gid": pod["securityContext"]["runAsGroup"],
            "additionalGids": [pod["securityContext"]["fsGroup"]],
        },
        "args": list(command),
        "env": [f"{name}={value}" for name, value in variables.items()],
        "cwd": configuration["WorkingDir"],
        "capabilities": {},
        "noNewPrivileges": not security["allowPrivilegeEscalation"],
        "rlimits": [],
    }
    specification["root"] = {"path": str(files), "readonly": security["readOnlyRootFilesystem"]}
    specification["hostname"] = "pod"
    for namespace in specification["linux"]["namespaces"]:
        if namespace["type"] == "network":
            namespace["path"] = str(space)
    limit, cpus = (quantity(asked["resources"]["limits"][name]) for name in ("memory", "cpu"))
    # A group of processes competes as one with each process beside it: ten of those a CPU may run here.
    specification["linux"]["resources"] |= {"memory": {"limit": int(limit)}, "cpu": {"shares": int(cpus * 10 * 1024)}}
    if SECCOMP.exists():
        specification["linux"]["seccomp"] = _seccomp()


def _mount(pod: Document, mount: Document, bundle: Path, given: Mapping[str, Path]) -> dict[str, Any]:
    (volume,) = [v for v in pod["volumes"] if v["name"] == mount["name"]]
    to = mount["mountPath"]
    options = ["nosuid", "nodev", "ro" if mount.get("readOnly") else "rw"]
    empty = volume.get("emptyDir", {})
    if empty.get("medium") == "Memory":
        size = int(quantity(empty["sizeLimit"]))
        return {
            "destination": to,
            "type": "tmpfs",
            "source": "tmpfs",
            "options": [*options, "mode=1777", f"size={size}"],
        }
    source = given.get(mount["name"], bundle / mount["name"])
    if "emptyDir" in volume:
        source.mkdir()
        source.chmod(0o777)
    return {"destination": to, "type": "bind", "source": str(source), "options": ["rbind", *options]}


def _seccomp() -> dict[str, Any]:
    """The engines' profile for a container without capabilities, in OCI's format."""
    profile = json.loads(SECCOMP.read_text())
    rules = []
    for rule in profile["syscalls"]:
        asks, without = rule.get("includes") or {}, rule.get("excludes") or {}
        if asks.get("caps") or "amd64" in without.get("arches", []) or "amd64" not in asks.get("arches", ["amd64"]):
            continue
        kept = {key: rule[key] for key in ("names", "action", "args", "errnoRet") if rule.get(key) is not None}
        rules.append(kept)
    return {
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile["defaultErrnoRet"],
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": rules,
    }
