"""Content credentials, with certificates made here."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.ingress.ingress import SigningFiles
from pipelines.pictures.images import check_image
from pipelines.pictures.provenance import COMPOSITE, MACHINE_MADE, VOCABULARY
from pipelines.pictures.signing import ContentSigner, SigningError
from tests.support.certificates import write_chain
from tests.support.http import encoded, photo, post
from tests.support.ingress import ClientFactory

c2pa = pytest.importorskip("c2pa", reason="the extra c2pa is not installed")


async def drawn(client: httpx.AsyncClient, **fields: Any) -> bytes:
    reply = await post(client, **fields)
    assert reply.status_code == 200, reply.text
    return base64.b64decode(reply.json()["images"][0]["image"])


def manifest(data: bytes, kind: str, anchor: str) -> dict[str, Any]:
    context = c2pa.Context(c2pa.Settings.from_dict({"trust": {"user_anchors": anchor}}))
    with c2pa.Reader(f"image/{kind}", io.BytesIO(data), context=context) as reader:
        assert reader.get_validation_state() == "Trusted"
        active: dict[str, Any] = reader.get_active_manifest()
    return active


def actions(active: dict[str, Any]) -> dict[str, str | None]:
    (assertion,) = (a for a in active["assertions"] if a["label"].startswith("c2pa.actions"))
    return {action["action"]: action.get("digitalSourceType") for action in assertion["data"]["actions"]}


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
async def test_pictures_are_signed_and_name_their_parents(connect: ClientFactory, tmp_path: Path, kind: str) -> None:
    chain, key, anchor = write_chain(tmp_path)
    async with connect(signing=SigningFiles(chain, key)) as client:
        first = await drawn(client, output_format=kind)
        assert actions(manifest(first, kind, anchor)) == {"c2pa.created": VOCABULARY + MACHINE_MADE}
        file = check_image(first, "image", 10**6)
        assert file.digital_source_type == MACHINE_MADE, "what XMP says stays"
        second = manifest(await drawn(client, output_format=kind, image=encoded(first), strength=0.7), kind, anchor)
        assert actions(second) == {"c2pa.opened": None, "c2pa.edited": VOCABULARY + MACHINE_MADE}
        (parent,) = second["ingredients"]
        assert (parent["relationship"], "active_manifest" in parent) == ("parentOf", True)
        of_photo = manifest(await drawn(client, output_format=kind, image=encoded(photo()), strength=0.7), kind, anchor)
        assert actions(of_photo)["c2pa.edited"] == VOCABULARY + COMPOSITE


async def test_a_picture_is_signed_even_if_its_parent_cannot_be_named(connect: ClientFactory, tmp_path: Path) -> None:
    """A JPEG without its end marker: it decodes, and C2PA's reader may refuse it."""
    chain, key, anchor = write_chain(tmp_path)
    async with connect(signing=SigningFiles(chain, key)) as client:
        cut = photo(kind="JPEG")[:-30]
        signed = await drawn(client, image=encoded(cut), strength=0.7, output_format="png")
    assert VOCABULARY + COMPOSITE in actions(manifest(signed, "png", anchor)).values()


def test_certificates_that_cannot_sign_are_refused_at_start(tmp_path: Path) -> None:
    chain, key, _ = write_chain(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    _, wrong, _ = write_chain(other)
    (tmp_path / "garbage").write_bytes(b"no key")
    for certificates, private in [(chain, wrong), (chain, tmp_path / "garbage"), (tmp_path / "none", key), (key, key)]:
        with pytest.raises(SigningError, match="cannot sign with"):
            ContentSigner(certificates, private)
