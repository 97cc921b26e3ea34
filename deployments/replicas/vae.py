"""The VAE deployment: picture bytes -> latents, latents -> encoded picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from config.catalog import Catalog
from deployments.replicas.base import Runtime, Wakeable, Worker
from deployments.telemetry.stages import Traced, stopwatch
from pipelines.pictures.images import EncodedImage, read_image, write_image
from pipelines.plan import GenerationPlan

if TYPE_CHECKING:
    from pipelines.sampling.latents import Latents


class VAEDeployment(Wakeable):
    """Hosts one VAE, or all of them when components are grouped by role. JPEGs are made here: tensors stop here."""

    def __init__(self, components: Sequence[str], catalog: Catalog, runtime: Runtime) -> None:
        from pipelines.assembly import load_vae  # torch is a replica's affair: building the graph goes without

        device = runtime.apply()
        self._vaes = {c: load_vae(catalog, c, device) for c in components}
        self._worker = Worker()

    async def encode(self, plan: GenerationPlan, image: bytes) -> Traced[Latents]:
        """Latents of the picture an img2img request starts from."""
        with stopwatch("vae_encode", plan.vae) as watch:
            latents = await self._worker.stage(watch, self._encode, plan, image)
        return watch.trace(latents)

    async def decode(self, plan: GenerationPlan, latents: Traced[Latents]) -> Traced[EncodedImage]:
        """The finished file, with the plan inside."""
        with stopwatch("vae_decode", plan.vae) as watch:
            image = await self._worker.stage(watch, self._decode, plan, latents.value)
        return watch.trace(image, latents)

    async def preview(self, plan: GenerationPlan, latents: Latents) -> bytes:
        """A small JPEG of a picture in the making."""
        return await self._worker.run(self._preview, plan, latents)

    def _preview(self, plan: GenerationPlan, latents: Latents) -> bytes:
        return write_image(self._vaes[plan.vae].preview(latents), "jpeg", "").data

    def _encode(self, plan: GenerationPlan, data: bytes) -> Latents:
        return self._vaes[plan.vae].encode(read_image(data, "image", plan.width, plan.height), plan.seed)

    def _decode(self, plan: GenerationPlan, latents: Latents) -> EncodedImage:
        return write_image(self._vaes[plan.vae].decode(latents), plan.output_format, plan.model_dump_json())
