"""Access control over HTTP: keys, requests a minute, pixel-steps a day; with a real Redis too."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import traceback
from pathlib import Path

import httpx
import pytest
import redis

from deployments.access import keys as auth
from deployments.access import limits
from deployments.access.keys import read_key_hashes
from deployments.access.limits import KeyLimits, UsageLimiter
from deployments.app import AppArgs, build_app
from tests.support.http import SMALL, check
from tests.support.ingress import ClientFactory
from tests.support.keys import ALICE, BOB, line

PIXEL_STEPS = SMALL["steps"] * SMALL["width"] * SMALL["height"]


async def post(client: httpx.AsyncClient, headers: dict[str, str] = ALICE) -> httpx.Response:
    return await client.post("/v1/image/generation", json=SMALL, headers=headers)


async def test_without_a_valid_key_only_health_and_documents_answer(connect: ClientFactory, keys_file: Path) -> None:
    async with connect(keys_file=keys_file, base_url="http://192.0.2.1") as client:
        for value in (None, "Bearer wrong", "Basic secret", "x", "Bearer "):
            header = {} if value is None else {"authorization": value}
            reply = await post(client, header)
            check(reply, 401, 40101, None)
            assert reply.headers["www-authenticate"] == "Bearer"
            check(await client.get("/v1/models", headers=header), 401, 40101, None)
        for path in ("/healthz", "/readyz", "/docs", "/openapi.json"):
            assert (await client.get(path)).status_code == 200
        assert (await post(client)).status_code == 200


async def test_keys_come_before_the_body(connect: ClientFactory, keys_file: Path) -> None:
    async with connect(keys_file=keys_file) as client:
        check(await client.post("/v1/image/generation", content=b"not json"), 401, 40101, None)


async def test_a_key_put_into_the_file_counts_at_once(
    connect: ClientFactory, keys_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And a file that is broken meanwhile locks nobody out."""
    monkeypatch.setattr(auth, "REREAD_S", 0.0)
    new = {"authorization": "Bearer new"}
    async with connect(keys_file=keys_file) as client:
        assert (await client.get("/v1/models", headers=new)).status_code == 401
        keys_file.write_text(line("alice", "new"))
        assert (await client.get("/v1/models", headers=new)).status_code == 200
        assert (await client.get("/v1/models", headers=ALICE)).status_code == 401
        keys_file.write_text("alice new-key-in-the-clear\n")
        with caplog.at_level(logging.ERROR, "deployments"):
            assert (await client.get("/v1/models", headers=new)).status_code == 200
    assert "line 1" in caplog.text
    assert "in-the-clear" not in caplog.text


async def test_the_log_names_the_key(connect: ClientFactory, keys_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with connect(keys_file=keys_file) as client:
        with caplog.at_level(logging.INFO, "deployments"):
            await client.get("/v1/models", headers=BOB | {"x-request-id": "id-7"})
    (record,) = (r for r in caplog.records if "/v1/models" in r.getMessage())
    assert "key=bob" in record.getMessage()
    assert record.request_id == "id-7"  # type: ignore[attr-defined]
    assert "other" not in caplog.text


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "[::1]"])
async def test_without_keys_loopback_is_served(connect: ClientFactory, host: str) -> None:
    async with connect(base_url=f"http://{host}") as client:
        assert (await client.get("/v1/models")).status_code == 200


@pytest.mark.parametrize("host", ["192.0.2.1", "sdgraph", "[2001:db8::1]"])
async def test_without_keys_nobody_else_is(connect: ClientFactory, host: str) -> None:
    async with connect(base_url=f"http://{host}") as client:
        assert "only accepts loopback connections" in check(await client.get("/v1/models"), 401, 40101, None)
        assert (await client.get("/healthz")).status_code == 200


def test_a_graph_without_keys_must_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SDGRAPH_API_KEYS_FILE", raising=False)
    with pytest.raises(ValueError, match="auth: none"):
        build_app(AppArgs(catalog="tiny"))
    build_app(AppArgs(catalog="tiny", auth="none"))


@pytest.mark.parametrize(
    "text",
    [
        "alice {digest}\n",
        "\ufeffalice\t{digest}",
        "  alice   {digest}   # since May\r\n\r\n# bob left\r\n",
        "alice {digest}  -\n",
        "alice {upper} *-\n",
    ],
)
def test_key_files_as_editors_and_sha256sum_write_them(tmp_path: Path, text: str) -> None:
    digest = hashlib.sha256(b"secret").hexdigest()
    path = tmp_path / "keys"
    path.write_bytes(text.format(digest=digest, upper=digest.upper()).encode())
    assert read_key_hashes(path) == [("alice", digest)]


@pytest.mark.parametrize(
    ("text", "said"), [("", "holds no key"), ("alice secret\n", "line 1"), ("\nalice\n", "line 2")]
)
def test_files_without_valid_key_lines_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "api-keys"
    path.write_text(text)
    with pytest.raises(ValueError, match=said) as raised:
        read_key_hashes(path)
    assert "secret" not in str(raised.value)


def test_a_file_that_everybody_may_write_is_refused_and_one_that_everybody_may_read_is_named(
    keys_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys_file.chmod(0o600)
    read_key_hashes(keys_file)
    assert caplog.records == []
    keys_file.chmod(0o644)
    assert len(read_key_hashes(keys_file)) == 2
    assert f"chmod o-rwx {keys_file}" in caplog.text
    keys_file.chmod(0o602)
    with pytest.raises(ValueError, match=r"may write .* and so add a key: chmod o-rwx"):
        read_key_hashes(keys_file)


def test_a_folder_and_a_pipe_are_no_key_files(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(ValueError, match=f"{name} is not a file"):
            read_key_hashes(tmp_path / name)


def test_two_keys_of_one_name_but_no_key_of_two_names(tmp_path: Path) -> None:
    path = tmp_path / "api-keys"
    path.write_text(line("alice", "old") + line("alice", "new") + line("alice", "new"))
    assert [name for name, _ in read_key_hashes(path)] == ["alice"] * 3
    path.write_text(line("alice", "old") + line("bob", "old"))
    with pytest.raises(ValueError, match="line 2: the key of 'bob' is that of 'alice' too"):
        read_key_hashes(path)


async def test_ten_thousand_keys(connect: ClientFactory, tmp_path: Path) -> None:
    path = tmp_path / "api-keys"
    path.write_text("\r\n".join(line(f"user-{i}", f"key-{i}").strip() for i in range(10_000)))
    async with connect(keys_file=path) as client:
        for key, status in (("key-0", 200), ("key-9999", 200), ("key-10000", 401)):
            reply = await client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
            assert reply.status_code == status


async def test_a_key_file_that_becomes_invalid_leaves_the_previous_keys_in_force(
    connect: ClientFactory, keys_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auth, "REREAD_S", 0.0)
    new = {"authorization": "Bearer new"}
    async with connect(keys_file=keys_file) as client:
        keys_file.write_text(line("mallory", "new"))
        keys_file.chmod(0o666)
        assert (await client.get("/v1/models", headers=new)).status_code == 401
        assert (await client.get("/v1/models", headers=ALICE)).status_code == 200
        assert "may write" in caplog.text
        keys_file.unlink()
        keys_file.mkdir()
        assert (await client.get("/v1/models", headers=ALICE)).status_code == 200
        assert "is not a file" in caplog.text
        keys_file.rmdir()
        keys_file.write_text(line("mallory", "new"))
        assert (await client.get("/v1/models", headers=new)).status_code == 200


def test_a_graph_with_an_invalid_key_file_is_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SDGRAPH_API_KEYS_FILE", str(tmp_path))
    with pytest.raises(ValueError, match="is not a file"):
        build_app(AppArgs(catalog="tiny"))


@pytest.fixture(params=["memory", "redis"])
def store(request: pytest.FixtureRequest) -> str:
    if request.param == "memory":
        return "memory://"
    url: str = request.getfixturevalue("redis_url")
    with redis.Redis.from_url(url) as client:
        client.flushall()
    return url


async def test_requests_a_minute_of_each_key(connect: ClientFactory, keys_file: Path, store: str) -> None:
    async with connect(keys_file=keys_file, key_limits=KeyLimits(rate="2/minute", store=store)) as client:
        for _ in range(2):
            assert (await post(client)).status_code == 200
        reply = await post(client)
        check(reply, 429, 42901, None)
        assert 1 <= int(reply.headers["retry-after"]) <= 60
        assert (await client.get("/v1/models", headers=ALICE)).status_code == 200, "only work is limited"
        assert (await post(client, BOB)).status_code == 200


async def test_pixel_steps_a_day(connect: ClientFactory, keys_file: Path, store: str) -> None:
    """A picture too large for what is left costs nothing; a smaller one still fits; a bad request is free."""
    bounds = KeyLimits(pixel_steps_per_day=2 * PIXEL_STEPS, store=store)
    async with connect(keys_file=keys_file, key_limits=bounds) as client:
        bad = await client.post("/v1/image/generation", json=SMALL | {"sampler": "none"}, headers=ALICE)
        assert bad.status_code == 400
        assert (await post(client)).status_code == 200
        large = SMALL | {"steps": 2 * SMALL["steps"]}
        reply = await client.post("/v1/image/generation", json=large, headers=ALICE)
        message = check(reply, 429, 42901, None)
        assert f"takes {2 * PIXEL_STEPS}" in message
        assert 1 <= int(reply.headers["retry-after"]) <= 24 * 3600
        assert (await post(client)).status_code == 200
        assert (await post(client)).status_code == 429
        assert (await post(client, BOB)).status_code == 200


async def test_redis_is_shared_and_memory_is_not(connect: ClientFactory, keys_file: Path, redis_url: str) -> None:
    for store, expected in ((redis_url, 429), ("memory://", 200)):
        bounds = KeyLimits(rate="1/minute", store=store)
        async with (
            connect(keys_file=keys_file, key_limits=bounds) as one,
            connect(keys_file=keys_file, key_limits=bounds) as other,
        ):
            assert (await post(one, BOB)).status_code == 200
            assert (await post(other, BOB)).status_code == expected
        with redis.Redis.from_url(redis_url) as client:
            client.flushall()


async def test_an_unreachable_redis_refuses_no_request(
    connect: ClientFactory, keys_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each replica then counts for itself."""
    bounds = KeyLimits(rate="1/minute", store="redis://127.0.0.1:1")
    async with connect(keys_file=keys_file, key_limits=bounds) as client:
        assert (await post(client)).status_code == 200
        assert (await post(client)).status_code == 429
    assert "does not answer" in caplog.text


async def test_a_redis_that_hangs_delays_only_one_request(
    connect: ClientFactory, keys_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listener that accepts and never answers."""
    asked = 0

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await reader.read()
        writer.close()

    monkeypatch.setattr(limits, "STORE_TIMEOUT_S", 0.2)
    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        bounds = KeyLimits(rate="3/minute", pixel_steps_per_day=100 * PIXEL_STEPS, store=f"redis://127.0.0.1:{port}")
        async with connect(keys_file=keys_file, key_limits=bounds) as client:
            first = [(await post(client)).status_code for _ in range(4)]
            attempts = asked
            assert first == [200, 200, 200, 429]
            assert (await post(client)).status_code == 429
    assert 1 <= asked == attempts, "one request tried it, the others did not wait"


def test_a_password_is_not_repeated() -> None:
    bounds = KeyLimits(store="redsi://:hidden@redis:6379/1")
    assert "hidden" not in repr(bounds)
    with pytest.raises(ValueError, match="allowed are memory:// and redis://") as raised:
        UsageLimiter(bounds)
    assert "hidden" not in "".join(traceback.format_exception(raised.value))


async def test_a_store_or_a_rate_of_another_notation() -> None:
    for bounds in (KeyLimits(rate="often"), KeyLimits(store="somewhere")):
        with pytest.raises(ValueError, match=r"often|somewhere"):
            UsageLimiter(bounds)
