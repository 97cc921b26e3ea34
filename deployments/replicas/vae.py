"""The VAE deployment: picture bytes -> latents, latents -> encoded picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from config.catalog import Catalog
from deployments.graph import Sealed
from deployments.replicas.base import Replica, Runtime
from deployments.replicas.sealing import unseal
from deployments.telemetry.stages import Timed, stopwatch
from pipelines.pictures.images import EncodedImage, read_image, write_image
from pipelines.plan import GenerationPlan

if TYPE_CHECKING:
    from pipelines.sampling.latents import Latents


class VAEDeployment(Replica):
    """Hosts one VAE, or all of them when components are grouped by role. Files are made here: tensors stop here."""

    def __init__(self, *, components: Sequence[str], catalog: Catalog, runtime: Runtime) -> None:
        super().__init__(runtime)
        from pipelines.assembly import load_vae

        self._vaes = {c: load_vae(catalog, c, self._device) for c in components}

    async def encode(self, *, plan: GenerationPlan, image: bytes) -> Timed[Latents]:
        """Latents of the picture an img2img request starts from."""
        with stopwatch("vae_encode", plan.vae) as watch:
            latents = await self._worker.run(self._encode, plan, image, started=watch.start_work)
        return watch.timed(latents)

    async def decode(
        self, *, plan: GenerationPlan, latents: Timed[Latents] | Sealed[Timed[Latents]]
    ) -> Timed[EncodedImage]:
        """The finished file, marked and with the plan inside."""
        opened = unseal(latents)
        with stopwatch("vae_decode", plan.vae) as watch:
            image = await self._worker.run(self._decode, plan, opened.value, started=watch.start_work)
        return watch.timed(image, opened)

    async def preview(self, *, plan: GenerationPlan, latents: Sealed[Latents]) -> bytes:
        """A small JPEG of a picture in the making."""
        return await self._worker.run(self._preview, plan, unseal(latents))

    def _preview(self, plan: GenerationPlan, latents: Latents) -> bytes:
        return write_image(self._vaes[plan.vae].preview(latents), "jpeg").data

    def _encode(self, plan: GenerationPlan, data: bytes) -> Latents:
        return self._vaes[plan.vae].encode(read_image(data, "image", plan.width, plan.height), plan.seed)

    def _decode(self, plan: GenerationPlan, latents: Latents) -> EncodedImage:
        return write_image(self._vaes[plan.vae].decode(latents), plan.output_format, plan, plan.output_quality)
