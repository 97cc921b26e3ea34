"""The page at `/`: files of `deployments/page`, read once, as a browser that keeps them wants them."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

from deployments.api.schemas import GenerationRequest

FOLDER = Path(__file__).parent.parent / "page"
VERSION = "@version"
"""What stands for the version in `index.html`."""
MEDIA_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".json": "application/json",
}
FOREVER = "public, max-age=31536000, immutable"
ASKED_AGAIN = "no-cache"
"""A browser may keep it, and asks whether it is still the same."""
HEADERS = {
    # Blobs are pictures that came in replies. Nothing of another site is loaded, and no other site frames the page.
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "vary": "accept-encoding",
}


@dataclass(frozen=True)
class PageFile:
    """A file of the page."""

    data: bytes
    packed: bytes
    """The same with gzip."""
    media_type: str

    @classmethod
    def create(cls, data: bytes, suffix: str) -> PageFile:
        """Compress it, to the same bytes in every replica."""
        return cls(data, gzip.compress(data, mtime=0), MEDIA_TYPES[suffix])

    def answer(self, request: Request, cache_control: str) -> Response:
        """The file; 304 where the browser has it, only headers where it asks for them."""
        gzipped = "gzip" in request.headers.get("accept-encoding", "")
        data = self.packed if gzipped else self.data
        etag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        headers = HEADERS | {"etag": etag, "cache-control": cache_control}
        known = request.headers.get("if-none-match", "")
        if etag in known or known == "*":
            return Response(status_code=304, headers=headers)
        if gzipped:
            headers["content-encoding"] = "gzip"
        headers["content-length"] = str(len(data))
        content = b"" if request.method == "HEAD" else data
        return Response(content, headers=headers, media_type=self.media_type)


def routes(folder: Path = FOLDER) -> APIRouter:
    """`GET /`, and what it loads under `/page/<version>/`: addresses that change with the files and can be kept."""
    read = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in MEDIA_TYPES}
    version = hashlib.sha256(b"".join(read.values())).hexdigest()[:12]
    read["index.html"] = read["index.html"].replace(VERSION.encode(), version.encode())
    files = {name: PageFile.create(data, Path(name).suffix) for name, data in read.items()}
    index = files.pop("index.html")
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        return index.answer(request, ASKED_AGAIN)

    @router.api_route("/page/request.json", methods=["GET", "HEAD"])
    async def schemas(request: Request) -> Response:
        """What the OpenAPI document says of a request: the whole document is ten times as large."""
        described = _with_references(request.app.openapi()["components"]["schemas"], GenerationRequest.__name__)
        return PageFile.create(json.dumps(described).encode(), ".json").answer(request, ASKED_AGAIN)

    @router.api_route("/page/{asked}/{name}", methods=["GET", "HEAD"])
    async def file(asked: str, name: str, request: Request) -> Response:
        if name not in files:
            raise HTTPException(404)
        # Of another version while replicas are replaced: not to be kept under that version's address.
        return files[name].answer(request, FOREVER if asked == version else ASKED_AGAIN)

    return router


def _with_references(schemas: dict[str, Any], name: str) -> dict[str, Any]:
    """A schema by its name, and those it refers to."""
    found: dict[str, Any] = {}
    wanted = [name]
    while wanted:
        name = wanted.pop()
        if name not in found:
            found[name] = schemas[name]
            wanted += re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(schemas[name]))
    return found
