"""Finished pictures in an object store, behind signed links that end by themselves.

Source of the calls: obstore, whose stores take their credentials from the environment that their own tools read
(`AWS_ACCESS_KEY_ID`, `GOOGLE_SERVICE_ACCOUNT`, `AZURE_STORAGE_ACCOUNT_KEY`, ...).
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from datetime import timedelta

from deployments.ingress.limits import LinkStore
from pipelines.pictures.images import EncodedImage

logger = logging.getLogger(__name__)

ALLOWED = "s3://bucket/folder, gs://bucket/folder, az://container/folder"
STORE_TIMEOUT_S = 10.0
"""Seconds for one picture; if a store takes longer, the log says so and the picture is sent inline."""


class PictureLinks:
    """Puts pictures into a store and says where they are. Nothing is deleted here: the store has rules for that."""

    def __init__(self, where: LinkStore) -> None:
        """Open the store; no request is sent to it yet.

        Raises:
            ValueError: obstore is not installed, or the address is of no store that can sign links.
        """
        try:
            import obstore
            from obstore.exceptions import BaseError
            from obstore.store import AzureStore, GCSStore, S3Store, from_url
        except ImportError as error:
            raise ValueError("SDGRAPH_PICTURE_STORE needs obstore: pip install '.[links]'") from error
        wait = timedelta(seconds=STORE_TIMEOUT_S)
        try:
            store = from_url(
                where.address,
                client_options={"timeout": wait, "allow_http": True},  # the operator's endpoint says which
                retry_config={"max_retries": 2, "retry_timeout": wait},
            )
        except (BaseError, ValueError) as error:
            raise ValueError(f"SDGRAPH_PICTURE_STORE cannot be used: {error}; allowed are {ALLOWED}") from error
        if not isinstance(store, AzureStore | GCSStore | S3Store):  # the others sign no links
            raise ValueError(f"SDGRAPH_PICTURE_STORE is a {type(store).__name__}; allowed are {ALLOWED}")
        self._store = store
        self._obstore = obstore
        self._error = BaseError
        self._lifetime = timedelta(seconds=where.lifetime_s)

    async def of(self, pictures: Sequence[EncodedImage]) -> list[str | None]:
        """A link to each picture; None for one that the store did not take."""
        return await asyncio.gather(*(self._link(picture) for picture in pictures))

    async def _link(self, picture: EncodedImage) -> str | None:
        name = f"{uuid.uuid4().hex}.{picture.format}"  # cannot be guessed, and says nothing of who asked
        try:
            async with asyncio.timeout(STORE_TIMEOUT_S):
                kind = {"Content-Type": f"image/{picture.format}"}
                await self._obstore.put_async(self._store, name, picture.data, attributes=kind)
                link: str = await self._obstore.sign_async(self._store, "GET", name, self._lifetime)
                return link
        except (self._error, TimeoutError) as error:
            logger.warning(
                "the picture store did not accept a picture, so it is sent inline: %s", str(error).partition("\n")[0]
            )
            return None
