"""The VAE deployment: it encodes picture files to latents, and decodes latents to picture files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from config.catalog import Catalog
from deployments.graph import Sealed
from deployments.replicas.base import Replica, Runtime
from deployments.replicas.sealing import unseal
from deployments.telemetry.stages import Timed, stopwatch
from pipelines.pictures.enlarging import enlarged
from pipelines.pictures.images import EncodedImage, write_image
from pipelines.pictures.masks import canvas_of, read_start
from pipelines.plan import GenerationPlan, OutputFormat, StagePlan

if TYPE_CHECKING:
    from PIL.Image import Image

    from pipelines.pictures.upscaling import Pixels
    from pipelines.sampling.latents import Latents
    from pipelines.transfers import Fetching

FILE_THREADS = 2
"""Number of threads that read and write picture files, and wait for results of the device."""


class VAEDeployment(Replica):
    """Hosts one VAE, or all of them when components are grouped by role. It writes the picture's file.

    The model's thread only queues work on the device; other threads read and write files.
    """

    def __init__(self, *, components: Sequence[str], catalog: Catalog, runtime: Runtime) -> None:
        super().__init__(runtime)
        from pipelines.assembly import load_vae

        self._vaes = {c: load_vae(catalog, c, self._device) for c in components}
        self._files = self._worker.beside("files", FILE_THREADS)

    async def encode(self, *, plan: GenerationPlan, image: bytes | None, mask: bytes | None) -> Timed[Latents]:
        """Encode a picture to the latents that the first stage begins from; the mask says which part of it is drawn."""
        with stopwatch("vae_encode", plan.vae) as watch:
            opened, canvas = await self._files.run(read_start, plan, image, mask)
            begin = self._vaes[plan.vae].begin_start
            fetching = await self._worker.run(begin, plan, opened, canvas, started=watch.start_work)
            latents = await self._files.run(fetching.result)
        return watch.timed(latents)

    async def enlarge(
        self, *, component: str, stage: StagePlan, latents: Timed[Latents] | Sealed[Timed[Latents]]
    ) -> Timed[Latents]:
        """Decode `latents`, resize the picture to the size of a second pass's `stage`, and encode it again."""
        opened, vae = unseal(latents), self._vaes[component]
        with stopwatch("vae_enlarge", component) as watch:
            decoding = await self._worker.run(vae.begin_decoding, opened.value, started=watch.start_work)
            image = await self._files.run(lambda: enlarged(decoding.result(), stage))
            encoding = await self._worker.run(vae.begin_encoding, image, stage.seed)
            values = await self._files.run(encoding.result)
        return watch.timed(values, opened)

    async def pixels(self, *, component: str, latents: Timed[Latents] | Sealed[Timed[Latents]]) -> Timed[Pixels]:
        """Decode `latents` to the pixels that an upscaler enlarges."""
        from pipelines.pictures.upscaling import Pixels

        opened = unseal(latents)
        with stopwatch("vae_decode", component) as watch:
            begin = self._vaes[component].begin_decoding
            fetching = await self._worker.run(begin, opened.value, started=watch.start_work)
            image = await self._files.run(fetching.result)
        return watch.timed(Pixels.of(image), opened)

    async def encode_pixels(self, *, component: str, stage: StagePlan, pixels: Timed[Pixels]) -> Timed[Latents]:
        """Encode pixels, which have the size of `stage`, to latents."""
        with stopwatch("vae_encode", component) as watch:
            begin = self._vaes[component].begin_encoding
            fetching = await self._worker.run(begin, pixels.value.image(), stage.seed, started=watch.start_work)
            latents = await self._files.run(fetching.result)
        return watch.timed(latents, pixels)

    async def decode(
        self,
        *,
        plan: GenerationPlan,
        latents: Timed[Latents] | Sealed[Timed[Latents]],
        image: bytes | None,
        mask: bytes | None,
    ) -> Timed[EncodedImage]:
        """Decode `latents` to the finished file, marked as made by a machine and with the plan in it.

        With a mask, the result replaces that part of the picture that was sent.
        """
        opened = unseal(latents)
        with stopwatch("vae_decode", plan.vae) as watch:
            begin = self._vaes[plan.vae].begin_decoding
            fetching = await self._worker.run(begin, opened.value, started=watch.start_work)
            written = await self._files.run(_write, fetching, plan, image, mask)
        return watch.timed(written, opened)

    async def preview(self, *, plan: GenerationPlan, latents: Sealed[Latents], file_format: OutputFormat) -> bytes:
        """Make a small picture file from the latents of an unfinished picture."""
        fetching = await self._worker.run(self._vaes[plan.vae].begin_preview, unseal(latents))
        return await self._files.run(_write_preview, fetching, file_format)


def _write(fetching: Fetching[Image], plan: GenerationPlan, image: bytes | None, mask: bytes | None) -> EncodedImage:
    drawn, canvas = fetching.result(), canvas_of(plan, image, mask)
    return write_image(canvas.lay_in(drawn) if canvas else drawn, plan.output_format, plan, plan.output_quality)


def _write_preview(fetching: Fetching[Image], file_format: OutputFormat) -> bytes:
    return write_image(fetching.result(), file_format).data
