"""Content credentials: pictures signed with the operator's certificate, so that anybody can check what they say.

Source: the C2PA specification 2.2; c2pa-python (the extra `c2pa`) does all of it.
"""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.pictures.images import EncodedImage, write_image
from pipelines.pictures.provenance import MACHINE_MADE, VOCABULARY, digital_source_type
from pipelines.plan import GenerationPlan
from pipelines.upscale import UpscalePlan

logger = logging.getLogger(__name__)

_SETTINGS = {
    # A picture sent to us may name a manifest anywhere on the network: nothing is fetched.
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_after_sign": True},
    "builder": {"thumbnail": {"enabled": False}},
}
_CURVES = {256: "es256", 384: "es384", 521: "es512"}


class SigningError(ValueError):
    """Certificate and key cannot sign; the message says why."""


class ContentSigner:
    """Signs finished files."""

    def __init__(self, certificates: Path, private_key: Path, timestamp_url: str | None = None) -> None:
        """Load a key and its certificates, and sign a picture with them to be sure.

        Args:
            certificates: PEM, the signer's own first, then those between it and the root.
            private_key: PEM, PKCS #8, without a password: EC (P-256, P-384, P-521), Ed25519, or RSA.
            timestamp_url: of a timestamp authority (RFC 3161), which is asked for every picture; None for none.

        Raises:
            SigningError: c2pa-python is not installed, a file cannot be read, or the certificate may not sign.
        """
        try:
            import c2pa
        except ImportError as error:
            raise SigningError("c2pa-python is not installed: pip install '.[c2pa]'") from error
        self._c2pa = c2pa
        try:
            key = private_key.read_bytes()
            info = c2pa.C2paSignerInfo(_algorithm(key), certificates.read_bytes(), key, timestamp_url)
            self._signer = c2pa.Signer.from_info(info)
            self._context = c2pa.Context(c2pa.Settings.from_dict(_SETTINGS))
            self.sign(write_image(Image.new("RGB", (8, 8)), "png"))
        except (c2pa.C2paError, OSError, ValueError) as error:
            raise SigningError(f"cannot sign with {certificates} and {private_key}: {error}") from error

    def sign(
        self, image: EncodedImage, plan: GenerationPlan | UpscalePlan | None = None, source: bytes | None = None
    ) -> EncodedImage:
        """The file with a signed manifest; `source`, the picture it was made of, becomes its parent ingredient."""
        made_by = VOCABULARY + digital_source_type(plan)
        manifest = {"claim_generator_info": [{"name": "sdgraph"}], "assertions": []}
        builder = self._c2pa.Builder(manifest, self._context)
        if source is not None and self._add_parent(builder, source):
            builder.set_intent(self._c2pa.C2paBuilderIntent.EDIT)
            builder.add_action({"action": "c2pa.edited", "digitalSourceType": made_by})
        else:
            kinds = self._c2pa.C2paDigitalSourceType
            alone = made_by == VOCABULARY + MACHINE_MADE
            kind = kinds.TRAINED_ALGORITHMIC_MEDIA if alone else kinds.COMPOSITE_WITH_TRAINED_ALGORITHMIC_MEDIA
            builder.set_intent(self._c2pa.C2paBuilderIntent.CREATE, kind)
        signed = io.BytesIO()
        builder.sign(self._signer, f"image/{image.format}", io.BytesIO(image.data), signed)
        return EncodedImage(signed.getvalue(), image.format)

    def _add_parent(self, builder: Any, source: bytes) -> bool:
        """Whether the picture could be named as the parent: C2PA's reader refuses files that others still decode."""
        ingredient = {"title": "the picture this one starts from", "relationship": "parentOf"}
        with Image.open(io.BytesIO(source)) as opened:
            mime = str(Image.MIME[str(opened.format)])
        try:
            builder.add_ingredient(ingredient, mime, io.BytesIO(source))
        except self._c2pa.C2paError as error:
            logger.warning("a picture's parent cannot be named in its manifest: %s", error)
            return False
        return True


def _algorithm(key: bytes) -> str:
    """C2PA's name of what a private key signs with."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    loaded = load_pem_private_key(key, password=None)
    match loaded:
        case ec.EllipticCurvePrivateKey() if loaded.key_size in _CURVES:
            return _CURVES[loaded.key_size]
        case ed25519.Ed25519PrivateKey():
            return "ed25519"
        case rsa.RSAPrivateKey():
            return "ps256"
    raise ValueError("the key is neither EC (P-256, P-384, P-521) nor Ed25519 nor RSA")
