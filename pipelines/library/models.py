"""The models of a library: checkpoints, and UNet files whose other parts come from the catalog."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config.catalog import Architecture, Catalog, ComponentSpec, ModelDefaults, ModelSpec, Size
from config.sources import CheckpointSource, FolderSource, PlainSource
from pipelines.errors import InvalidValueError
from pipelines.library.controlnets import CONTROLNET
from pipelines.library.equality import Digests, Shared
from pipelines.library.files import LibraryFile
from pipelines.library.names import Names
from pipelines.library.names import slug as slug_of
from pipelines.library.shapes import CONTEXTS, UNetFacts, weights_of
from pipelines.library.upscalers import UPSCALER
from pipelines.sampling.samplers import SAMPLER_CHOICES, check_sampler
from pipelines.weights.kinds.models import LATENT_CHANNELS

MODELS = ("checkpoint", "unet")


def _sizes(text: str) -> tuple[Size, ...]:
    return tuple(Size.model_validate(size) for size in text.split())


_SDXL_SIZES = _sizes("1024x1024 1152x896 896x1152 1216x832 832x1216 1344x768 768x1344 1536x640 640x1536")
SIZES: Mapping[Architecture, tuple[Size, ...]] = {
    "sd15": _sizes("512x512 512x768 768x512 768x768"),
    "sd2": _sizes("768x768 512x512"),
    "sdxl": _SDXL_SIZES,
    "ssd": _SDXL_SIZES,
}
"""Sizes that the published models draw best; a fine-tune's default is the first."""


class _Unserved(Exception):  # noqa: N818, no error: what is said of a file
    """Why no model is made of a file."""


@dataclass(frozen=True)
class _Peer:
    """The first model of the catalog whose UNet has the shapes of a file's."""

    model: ModelSpec
    unet: ComponentSpec


@dataclass
class LibraryModels:
    """A catalog with the models of a library.

    Attributes:
        catalog: extended.
        counterparts: UNet of the library -> the UNet of the catalog that has the same shapes.
    """

    catalog: Catalog
    counterparts: dict[str, str] = field(default_factory=dict)


def with_models(catalog: Catalog, files: Sequence[LibraryFile], digests: Digests | None = None) -> LibraryModels:
    """The catalog with the models among `files`; files that serve no model are added to its `unserved`.

    Text encoders and VAE that equal the catalog's, or another file's, are its components; where a file has none they
    are those of the catalog's first model of its kind.
    """
    return _Extension(catalog, files, digests or Digests()).run()


class _Extension:
    """One extension of one catalog."""

    def __init__(self, catalog: Catalog, files: Sequence[LibraryFile], digests: Digests) -> None:
        self._catalog = catalog
        self._files = files
        self._digests = digests
        self._components = list(catalog.components)
        self._models = list(catalog.models)
        self._facts = {m.unet: UNetFacts.of_component(catalog.component(m.unet)) for m in catalog.models}

    def run(self) -> LibraryModels:
        names = Names(
            [
                *(name for model in self._models for name in (model.name, *model.aliases)),
                *self._catalog.model_names.aliases,
            ]
        )
        unserved = list(self._catalog.unserved)
        counterparts: dict[str, str] = {}
        for file in self._files:
            if file.report.kind not in MODELS:
                continue
            try:
                if file.problem:
                    raise _Unserved(file.problem)
                like = self._check(file)
                if taken := names.claim(file):
                    raise _Unserved(taken)
                self._add(file, like, counterparts)
            except _Unserved as reason:
                unserved.append(file.unserved(str(reason)))
        fields = {name: getattr(self._catalog, name) for name in type(self._catalog).model_fields}
        fields |= {"components": tuple(self._components), "models": tuple(self._models), "unserved": tuple(unserved)}
        return LibraryModels(Catalog(**fields), counterparts)

    def _check(self, file: LibraryFile) -> _Peer | None:
        """The catalog's model that a file is built like; None for a published architecture that the catalog lacks."""
        report = file.report
        if report.base == "sdxl-refiner":
            raise _Unserved("a refiner continues another model's pictures; name it as `refiner` of a catalog's model")
        if report.file.name.endswith(".json"):
            raise _Unserved("a model in several files; put them into a folder in diffusers' layout")
        facts = _facts_of(file)
        for model in self._catalog.available_models():
            if not model.requires_controlnet and self._facts[model.unet].same(facts):
                peer = _Peer(model, self._catalog.component(model.unet))
                self._check_channels(facts, peer)
                return peer
        self._check_channels(facts, None)
        if report.base is None or report.context != CONTEXTS.get(report.base):
            raise _Unserved(f"{report.reason}; it is built like no published model, and like none of the catalog's")
        return None

    def _latents(self, peer: _Peer | None) -> int:
        """Channels of the latents of the catalog's model."""
        if peer is None:
            return LATENT_CHANNELS
        channels = self._facts[peer.unet.id].channels
        known = self._facts[peer.unet.id].first is not None
        return (channels - 1) // 2 if peer.unet.inpainting and known else channels

    def _check_channels(self, facts: UNetFacts, peer: _Peer | None) -> None:
        """A UNet takes latents, or with them a mask and the masked picture."""
        latents, channels = self._latents(peer), facts.channels
        if channels in (latents, 2 * latents + 1):
            return
        if channels == 2 * latents:
            raise _Unserved(
                f"a model that edits pictures by instructions, whose UNet takes {channels} channels; it is not served"
            )
        raise _Unserved(f"its UNet takes {channels} channels, and latents have {latents}")

    def _add(self, file: LibraryFile, peer: _Peer | None, known: dict[str, str]) -> None:
        """The components and the model of a file."""
        report = file.report
        base: Architecture | None = report.base if peer is None else _facts_of(file).architecture
        family = peer.unet.family if peer else ("sdxl" if base in ("sdxl", "ssd") else "sd")
        slug = slug_of(file.name, {c.id for c in self._components}, ("unet", "vae", "text-encoder"))
        source = _source(file, None if base else _configuration(peer))
        zeros = peer.unet.force_zeros_for_empty_prompt if peer else family == "sdxl"
        unet = ComponentSpec(
            id=f"unet-{slug}",
            kind="unet",
            family=family,
            source=source,
            dtype=peer.unet.dtype if peer else "float16",
            architecture=base,
            text_encoders=peer.unet.text_encoders if peer else ((0, 1) if family == "sdxl" else (0,)),
            inpainting=_facts_of(file).channels != self._latents(peer),
            force_zeros_for_empty_prompt=_zeros(file, zeros),
            scheduler=file.override.scheduler,
        )
        text_encoder = self._shared(file, "text_encoder", unet, peer, slug)
        vae = self._shared(self._vae_file(file, self._latents(peer)) or file, "vae", unet, peer, slug)
        model = self._model(file, peer, unet, text_encoder, vae)
        self._components += [unet, *(c for c in (text_encoder, vae) if c not in self._components)]
        self._models.append(model)
        if peer is not None:
            known[unet.id] = peer.unet.id

    def _model(
        self,
        file: LibraryFile,
        peer: _Peer | None,
        unet: ComponentSpec,
        text_encoder: ComponentSpec,
        vae: ComponentSpec,
    ) -> ModelSpec:
        """The model of a file.

        Its values are those of its `.yaml`, else those of its architecture, else those of the catalog's model of the
        same shapes.
        """
        published = unet.architecture and SIZES[unet.architecture]
        sizes = file.override.sizes or published or (peer.model.sizes if peer else ())
        edm = file.report.prediction == "edm"
        try:
            model = ModelSpec(
                name=file.name,
                aliases=file.override.aliases,
                family=unet.family,
                text_encoder=text_encoder.id,
                unet=unet.id,
                vae=vae.id,
                # A refiner goes on with the latents of the VAE that it was trained with.
                refiner=peer.model.refiner if peer and vae.id == peer.model.vae else None,
                defaults=_defaults(None if published or peer is None else peer.model.defaults, sizes[0], edm, file),
                size_multiple=peer.model.size_multiple if peer else 8,
                sizes=sizes,
                edm=edm,
            )
            for size in (*model.sizes, model.default_size):
                if size.width % model.size_multiple or size.height % model.size_multiple:
                    raise ValueError(f"size {size} is not a multiple of {model.size_multiple}")
            check_sampler(model.defaults.sampler, model.defaults.steps, edm)
        except (ValueError, InvalidValueError) as error:
            raise _Unserved(f"{Path(file.path).stem}.yaml: {error}") from error
        return model

    def _shared(
        self, file: LibraryFile, part: Shared, unet: ComponentSpec, peer: _Peer | None, slug: str
    ) -> ComponentSpec:
        """The text encoders or the VAE of a model: an equal component there is, the file's own, or the catalog's."""
        lent = None if peer is None else self._catalog.component(getattr(peer.model, part))
        if part not in file.report.parts:
            if lent is None:
                named = part.replace("_", " ")
                raise _Unserved(
                    f"it has no {named} of its own, and the catalog serves no {unet.architecture} to lend one"
                )
            return lent
        if part == "text_encoder" and len(unet.text_encoders) == 2 and "text_encoder_2" not in file.report.parts:
            raise _Unserved("it has the first of SDXL's two text encoders alone")
        own = ComponentSpec(
            id=f"{part.replace('_', '-')}-{slug}",
            kind=part,
            family=unet.family,
            source=_source(file, None if unet.architecture or lent is None else _configuration_of(lent)),
            subfolder=lent.subfolder if lent and not unet.architecture else None,
            dtype=lent.dtype if lent and not unet.architecture else "float16",
            architecture=unet.architecture,
        )
        return self._equal(own) or own

    def _equal(self, own: ComponentSpec) -> ComponentSpec | None:
        """A component with the same weights, the catalog's first."""
        part: Shared = "vae" if own.kind == "vae" else "text_encoder"
        digest = self._digests.of(weights_of(own), part)
        alike = (other for other in self._components if (other.kind, other.family) == (own.kind, own.family))
        return next((o for o in alike if digest and self._digests.of(weights_of(o), part) == digest), None)

    def _vae_file(self, file: LibraryFile, latents: int) -> LibraryFile | None:
        """The VAE that a file's `.yaml` asks for."""
        wanted = file.override.vae
        if wanted is None:
            return None
        vaes = [f for f in self._files if f.report.kind == "vae" and not f.problem]
        found = next((f for f in vaes if wanted.casefold() in (f.file.name.casefold(), f.file.stem.casefold())), None)
        if found is None:
            names = [f.file.name for f in vaes]
            raise _Unserved(
                f"{Path(file.path).stem}.yaml: vae '{wanted}' is not in the library, whose VAEs are {names}"
            )
        if found.report.channels != latents:
            raise _Unserved(f"its latents have {latents} channels, those of vae '{wanted}' {found.report.channels}")
        return found


def _facts_of(file: LibraryFile) -> UNetFacts:
    """What the UNet of a file is."""
    spec = ComponentSpec(id="unet", kind="unet", family="sd", source=_plain_source(file))
    try:
        return UNetFacts.of_component(spec)
    except (OSError, ValueError) as error:
        raise _Unserved(str(error)) from error


def _plain_source(file: LibraryFile) -> CheckpointSource | FolderSource:
    return FolderSource(folder=file.file) if file.file.is_dir() else CheckpointSource(checkpoint=file.file)


def _source(file: LibraryFile, configuration: PlainSource | None) -> CheckpointSource | FolderSource:
    if file.file.is_dir():
        _refuse_links_out(file)
        return FolderSource(folder=file.file)
    return CheckpointSource(checkpoint=file.file, configuration=configuration)


def _refuse_links_out(file: LibraryFile) -> None:
    for path in sorted(file.file.rglob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(file.root):
            raise _Unserved(
                f"{path.relative_to(file.root)} is a link that leads out of the library; copy the file itself"
            )


def _configuration(peer: _Peer | None) -> PlainSource | None:
    return None if peer is None else _configuration_of(peer.unet)


def _configuration_of(spec: ComponentSpec) -> PlainSource | None:
    """The folder whose configuration fits what is built like a component."""
    return spec.source.configuration if isinstance(spec.source, CheckpointSource) else spec.source


def _zeros(file: LibraryFile, otherwise: bool) -> bool:
    """Whether an absent negative prompt is a zero embedding: a folder in diffusers' layout says it itself."""
    if not file.file.is_dir():
        return otherwise
    try:
        said = json.loads((file.file / "model_index.json").read_text()).get("force_zeros_for_empty_prompt", otherwise)
    except (OSError, ValueError, AttributeError):
        return otherwise
    return said is True


def _defaults(others: ModelDefaults | None, size: Size, edm: bool, file: LibraryFile) -> ModelDefaults:
    """The defaults of a model's request fields."""
    said: dict[str, Any] = file.override.defaults.model_dump(exclude_none=True)
    begin: dict[str, Any] = others.model_dump() if others else {"width": size.width, "height": size.height}
    if edm:
        begin["sampler"] = "EDM_Euler"
    defaults = ModelDefaults(**begin | said)
    return defaults.model_copy(update={"sampler": SAMPLER_CHOICES.resolve(defaults.sampler)})


def new_models(catalog: Catalog, files: Sequence[LibraryFile]) -> Iterator[LibraryFile]:
    """Files that need a new deployment: models that were added or replaced after the graph was built."""
    told = {(entry.file, entry.version) for entry in catalog.unserved if not entry.is_new}
    served: set[Path] = set()
    for component in catalog.components:
        if isinstance(component.source, CheckpointSource):
            served.add(component.source.checkpoint)
        elif isinstance(component.source, FolderSource):
            served.add(component.source.folder)
    for file in files:
        if (
            file.report.kind in (*MODELS, CONTROLNET, UPSCALER)
            and file.file not in served
            and (file.path, file.version) not in told
        ):
            yield file
