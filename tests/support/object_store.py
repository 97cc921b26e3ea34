"""An S3 of the tests' own: it keeps what is put and gives it to those whose link is signed and still good.

Source of the check: "Authenticating Requests: Using Query Parameters" (Signature Version 4) of the S3 API's reference.
"""

from __future__ import annotations

import hashlib
import hmac
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, quote, urlsplit

KEY_ID, SECRET, REGION = "tester", "secret", "eu-test-1"


class ObjectStore(ThreadingHTTPServer):
    """Listens on loopback."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, tuple[bytes, str]] = {}
        """Path -> bytes and content type."""
        self.ahead = timedelta(0)
        """How far the store's clock is ahead of the clients'."""

    @property
    def url(self) -> str:
        """Its endpoint."""
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What an S3 client reads to find it and to be let in."""
        names = {"ENDPOINT_URL": self.url, "ACCESS_KEY_ID": KEY_ID, "SECRET_ACCESS_KEY": SECRET, "REGION": REGION}
        return {f"AWS_{name}": value for name, value in names.items()}

    def refusal(self, path: str, host: str) -> str | None:
        """Why a link is not good; None for one that is."""
        split = urlsplit(path)
        query = dict(parse_qsl(split.query))
        given = query.pop("X-Amz-Signature", "")
        if hmac.compare_digest(given, _signature(split.path, query, host)):
            made = datetime.strptime(query["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
            expires = made + timedelta(seconds=int(query["X-Amz-Expires"]))
            return None if datetime.now(UTC) + self.ahead < expires else "expired"
        return "not signed by a key of this store"


class _Handler(BaseHTTPRequestHandler):
    server: ObjectStore

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["content-length"]))
        self.server.objects[self.path] = data, self.headers["content-type"]
        self._answer(200, b"", "text/plain")

    def do_GET(self) -> None:
        if (why := self.server.refusal(self.path, self.headers["host"])) is not None:
            self._answer(403, why.encode(), "text/plain")
        else:
            self._answer(200, *self.server.objects[urlsplit(self.path).path])

    def _answer(self, status: int, data: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), "ETag": '"one"'}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def _signature(path: str, query: dict[str, str], host: str) -> str:
    scope = query.get("X-Amz-Credential", "").partition("/")[2]
    pairs = "&".join(f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in sorted(query.items()))
    request = "\n".join(["GET", path, pairs, f"host:{host}", "", "host", "UNSIGNED-PAYLOAD"])
    digest = hashlib.sha256(request.encode()).hexdigest()
    text = "\n".join(["AWS4-HMAC-SHA256", query.get("X-Amz-Date", ""), scope, digest])
    key = f"AWS4{SECRET}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    return hmac.digest(key, text.encode(), "sha256").hex()


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """One that runs until the block ends."""
    with ObjectStore() as store:
        thread = threading.Thread(target=store.serve_forever)
        thread.start()
        try:
            yield store
        finally:
            store.shutdown()
            thread.join()
