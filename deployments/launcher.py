"""The graph of a Serve config as a child process on this machine: start, wait, stop without leftovers.

`make demo`, the Serve tests and the benchmarks all start it here, the way `make serve` does.

    python -m deployments.launcher demo [serve config]     # the README's request -> result.jpg
    python -m deployments.launcher serve [serve config] [--library folder]    # until Ctrl-C
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import yaml

from deployments import ray_compat, strict_config

ROOT = Path(__file__).resolve().parents[1]
LOCAL_CONFIG = ROOT / "config" / "serve.local.yaml"
README_REQUEST = {
    "model_name": "SDXL1.0-base",
    "prompt": "a sailboat on a blue background",
    "height": 1024,
    "width": 1024,
    "backend": "auto",
}

# Several processes with as many spinning OpenMP threads as there are cores destroy each other (benchmarks/RESULTS.md).
DEFAULTS = {"SDGRAPH_TORCH_THREADS": "1"}
ENVIRONMENT = {
    **ray_compat.ENVIRONMENT,
    "PYTHONPATH": str(ROOT),
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
}


class StartError(RuntimeError):
    """The graph did not come up."""


@contextmanager
def running_graph(
    config: Path,
    port: int = 8000,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 300,
    log: Path | None = None,
) -> Iterator[str]:
    """Run `serve run <config>` until the block ends.

    Args:
        config: a Serve config whose HTTP port is `port`, on loopback.
        port: where to ask for readiness.
        environment: further variables for the graph.
        timeout_s: how long the start may take.
        log: where the graph's output goes; this process's own by default.

    Yields:
        The base URL.

    Raises:
        StartError: the config is wrong, the port is in use, or the graph exited or was not ready in time.
    """
    _port(config)
    _check_port_is_free(port)
    # A cluster that the caller names has an address and a token of its own.
    alone = {} if environment and "RAY_ADDRESS" in environment else confinement()
    serve = Path(sys.executable).with_name("serve")
    output = log.open("w") if log else None
    child = subprocess.Popen(
        [str(serve), "run", str(config)],
        cwd=ROOT,
        env={**DEFAULTS, **os.environ, **ENVIRONMENT, **alone, **(environment or {})},
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(child, url, timeout_s)
        yield url
    finally:
        _stop(child)
        if output:
            output.close()


def laptop_config(folder: Path, port: int, application: str = "sdgraph", **args: object) -> Path:
    """A copy of the laptop graph's config in `folder`: port, application's name and `args` of its own."""
    config = yaml.safe_load(LOCAL_CONFIG.read_text())
    config["http_options"]["port"] = port
    config["applications"][0]["name"] = application
    config["applications"][0]["args"] = {"auth": "none", "grouping": "role"} | args
    path = folder / "graph.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def confinement() -> Mapping[str, str]:
    """Variables that bind Ray to loopback and require a token: the user's own if Ray finds one, otherwise a new one.

    Loopback alone is not enough: other users of the machine reach it, and Serve's replicas listen on all interfaces
    (SEC-5).
    """
    token = {} if ray_compat.has_token() else {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return {**ray_compat.LOOPBACK, "RAY_AUTH_MODE": "token", **token}


def _port(config: Path) -> int:
    """Port of a Serve config, which is looked through first."""
    try:
        options = strict_config.check(config).get("http_options") or {}
    except (OSError, ValueError) as error:
        raise StartError(str(error)) from error
    return int(options.get("port", 8000))


def _check_port_is_free(port: int) -> None:
    """A graph that runs there already would answer in the place of the one to be started."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise StartError(f"port {port} on 127.0.0.1 is in use; stop what listens there, or choose another port")


def _wait_until_ready(child: subprocess.Popen[bytes], url: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise StartError(f"`serve run` exited with {child.returncode} before the graph was ready")
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=2):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.25)
    raise StartError(f"the graph was not ready within {timeout_s:g} s")


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Interrupt `serve run`, which shuts Ray down, and end by their ids any processes it leaves."""
    family = psutil.Process(child.pid).children(recursive=True) if child.poll() is None else []
    child.send_signal(signal.SIGINT)
    try:
        child.wait(timeout=30)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    _, alive = psutil.wait_procs(family, timeout=15)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=5)


def request_picture(url: str, body: Mapping[str, object], timeout_s: float = 600) -> tuple[bytes, Mapping[str, str]]:
    """POST a generation request; returns the picture's bytes and the reply's headers."""
    request = urllib.request.Request(
        f"{url}/v1/image/generation", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        reply = json.load(response)
        return base64.b64decode(reply["images"][0]["image"]), dict(response.headers)


def _backend(headers: Mapping[str, str]) -> str:
    """What drew, and in which numbers where the reply says it."""
    precision = headers.get("x-precision")
    return headers["x-backend"] + (f" in {precision}" if precision else "")


def demo(config: Path, result: Path) -> None:
    """Start the graph of a config, send the README's request, write the picture, stop."""
    begin = time.monotonic()
    with running_graph(config) as url:
        print(f"graph ready after {time.monotonic() - begin:.0f} s", flush=True)
        begin = time.monotonic()
        picture, headers = request_picture(url, README_REQUEST)
        result.write_bytes(picture)
        print(
            f"{result}: {len(picture)} bytes in {time.monotonic() - begin:.1f} s on {_backend(headers)} "
            f"({headers['server-timing']})"
        )


def with_library(config: Path, library: Path, folder: Path = ROOT / "build") -> Path:
    """A copy of a Serve config, in `folder`, that serves what is in `library` too.

    Raises:
        StartError: there is no such library.
    """
    if not library.is_dir():
        raise StartError(f"library '{library}' is not a folder; create it and put .safetensors files into it")
    changed = yaml.safe_load(config.read_text())
    changed["applications"][0].setdefault("args", {})["library"] = str(library.resolve())
    folder.mkdir(exist_ok=True)
    path = folder / "serve.library.yaml"
    path.write_text(yaml.safe_dump(changed, sort_keys=False))
    return path


def serve(config: Path) -> None:
    """Become `serve run <config>`, unless it is wrong, or something listens on its port: Serve would share the port."""
    _check_port_is_free(_port(config))
    command = Path(sys.executable).with_name("serve")
    environment = {**os.environ, **ENVIRONMENT, **confinement()}
    os.execve(command, [str(command), "run", str(config)], environment)


def main(arguments: Sequence[str]) -> None:
    """`demo` or `serve`, and a Serve config; the laptop graph's by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["demo", "serve"])
    parser.add_argument("config", nargs="?", type=Path, default=LOCAL_CONFIG)
    parser.add_argument("--library", type=Path, help="folder of checkpoints and LoRAs to serve beside the catalog")
    options = parser.parse_args(arguments)
    try:
        config = with_library(options.config, options.library) if options.library else options.config
        if options.command == "demo":
            demo(config, ROOT / "result.jpg")
        else:
            serve(config)
    except StartError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
