"""Other people's clients, unchanged, against one running graph: each draws, and its pictures are looked at.

    make clients        # or: python -m tests.clients.run [openai] [promptfoo] ...

A client comes from its registry in the version that `CLIENTS` names, into a folder of its own under build/clients, and
runs a script as its own user would write one. The server asks for a key, so that each client's way to send it is used.

Not part of `make test`: it installs packages that this project does not depend on.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from deployments.launcher import laptop_config, running_graph
from tests.clients.installing import FOLDER, InstallError, installed
from tests.support.keys import line

KEY = "a-key-of-the-clients"
PORT = 8155
SCRIPTS = Path(__file__).with_name("scripts")
LONGEST_S = 600
FLATTEST = 10
"""Standard deviation of pixel values (0 to 255) that a picture with something on it exceeds."""


@dataclass(frozen=True)
class Client:
    """A client and the script that uses it: Python with packages of PyPI, or JavaScript with packages of npm."""

    script: str
    packages: tuple[str, ...]
    size: tuple[int, int] = (256, 256)
    """Of the pictures that the script leaves."""


CLIENTS = {
    "openai": Client("openai_sdk.py", ("openai==3.57.0", "pillow==13.0.0")),
    "litellm": Client("litellm_sdk.py", ("litellm==1.110.2",)),
    "llm-hyperbolic": Client("llm_hyperbolic.py", ("llm-hyperbolic==0.4.9", "requests==2.34.2")),
    "huggingface_hub-url": Client("huggingface_hub_url.py", ("huggingface_hub==2.4.0", "pillow==13.0.0")),
    "huggingface_hub": Client("huggingface_hub_provider.py", ("huggingface_hub==1.21.0", "pillow==13.0.0")),
    "webuiapi": Client("webuiapi_client.py", ("webuiapi==0.9.17",)),
    "open-webui": Client("open_webui_requests.py", ("aiohttp==3.14.5",)),
    "hyperbolic-ai-sdk": Client("ai_sdk.mjs", ("@hyperbolic/ai-sdk-provider@2.0.0", "ai@6.0.326", "zod@4.6.7")),
    "promptfoo": Client("promptfoo.mjs", ("promptfoo@0.121.20", "@libsql/linux-x64-gnu@0.5.29")),
    "sillytavern": Client("sillytavern.mjs", ("sillytavern@1.19.0",)),
}
"""Open WebUI's package asks for gigabytes: its requests are replayed with the HTTP library that it uses. What promptfoo
takes if it can get it (SDKs of other services) is more than a gigabyte too; of that it needs its database's library."""


class ClientError(Exception):
    """A client did not get what its user asked for."""


def main(names: list[str]) -> None:
    """Run every named client; those that fail do not keep others from running, but make the exit status 1."""
    unknown = set(names) - set(CLIENTS)
    if unknown:
        sys.exit(f"no such client: {sorted(unknown)}. There are {list(CLIENTS)}")
    failed: dict[str, Exception] = {}
    commands: dict[str, list[str | Path]] = {}
    for name in names:
        client = CLIENTS[name]
        try:
            commands[name] = [*installed(name, client.packages, SCRIPTS / client.script)]
        except InstallError as error:
            failed[name] = error
    if commands:
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            keys = scratch / "api-keys"
            keys.write_text(line("clients", KEY))
            environment = {"SDGRAPH_API_KEYS_FILE": str(keys), "SDGRAPH_RATE_LIMIT": ""}
            config = laptop_config(scratch, PORT, auth="keys")
            with running_graph(config, PORT, environment, log=FOLDER / "graph.log") as url:
                failed |= run(commands, url, scratch)
    for name, error in failed.items():
        print(f"{name}: FAILED: {error}", file=sys.stderr, flush=True)
    sys.exit(1 if failed else 0)


def run(commands: Mapping[str, list[str | Path]], url: str, scratch: Path) -> dict[str, Exception]:
    """Run the clients one after the other; returns what went wrong with whom."""
    failed: dict[str, Exception] = {}
    for name, command in commands.items():
        home = scratch / name
        home.mkdir()
        environment = {"HOME": str(home), "PATH": os.environ["PATH"], "TMPDIR": str(home)}
        begun = time.monotonic()
        try:
            done = subprocess.run([*command, url, KEY, home], check=False, cwd=home, env=environment, timeout=LONGEST_S)
            if done.returncode != 0:
                raise ClientError(f"{CLIENTS[name].script} ended with status {done.returncode}; what it said is above")
            told = looked_at(home, CLIENTS[name].size)
        except (ClientError, subprocess.TimeoutExpired) as error:
            failed[name] = error
        else:
            print(f"{name}: {told}, {time.monotonic() - begun:.0f} s", flush=True)
    return failed


def looked_at(folder: Path, size: tuple[int, int]) -> str:
    """What the pictures in a folder are.

    Raises:
        ClientError: there is none, or one is of another size or shows nothing.
    """
    told = []
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".png", ".jpg", ".webp")):
        try:
            image = Image.open(path).convert("RGB")
        except OSError as error:
            raise ClientError(f"{path.name} is no picture: {error}") from None
        if image.size != size:
            raise ClientError(f"{path.name} is {image.size[0]}x{image.size[1]}, not {size[0]}x{size[1]}")
        deviation = float(np.asarray(image).std())
        if deviation < FLATTEST:
            raise ClientError(f"{path.name} shows nothing: its values deviate by {deviation:.1f}")
        told.append(path.name)
    if not told:
        raise ClientError("it left no picture")
    return f"{size[0]}x{size[1]}: {', '.join(told)}"


if __name__ == "__main__":
    main(sys.argv[1:] or list(CLIENTS))
