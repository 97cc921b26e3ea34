"""The upscalers of a library: each by its stem."""

from __future__ import annotations

from collections.abc import Sequence

from config.catalog import Catalog, ComponentSpec, UpscalerSpec
from config.sources import CheckpointSource
from pipelines.library.files import LibraryFile
from pipelines.library.names import Names, slug

UPSCALER = "upscaler"
_CHANNELS = (3, 12, 48)
"""Input channels of a first layer: 3, or 12 or 48 where blocks of 2x2 or 4x4 pixels become channels."""


def with_upscalers(catalog: Catalog, files: Sequence[LibraryFile]) -> Catalog:
    """The catalog with the upscalers among `files`; what cannot be served joins its `unserved`."""
    choices = catalog.upscaler_choices()
    names = Names([*choices, *choices.aliases])
    components, upscalers, unserved = list(catalog.components), list(catalog.upscalers), list(catalog.unserved)
    for file in files:
        if file.report.kind != UPSCALER:
            continue
        channels = file.report.channels
        wrong = None if channels in _CHANNELS else f"it reads {channels} channels, and pictures here have 3"
        if reason := file.problem or wrong or names.claim(file):
            unserved.append(file.unserved(reason))
            continue
        component = ComponentSpec(
            id=f"{UPSCALER}-{slug(file.name, {c.id for c in components}, (UPSCALER,))}",
            kind=UPSCALER,
            source=CheckpointSource(checkpoint=file.file),
            dtype="float16",
        )
        components.append(component)
        upscalers.append(UpscalerSpec(name=file.name, aliases=file.override.aliases, component=component.id))
    changed = {"components": tuple(components), "upscalers": tuple(upscalers), "unserved": tuple(unserved)}
    return catalog.model_copy(update=changed)
