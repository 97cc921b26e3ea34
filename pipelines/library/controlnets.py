"""The ControlNets of a library: each a control of the models whose UNet it steers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from config.catalog import Catalog, ComponentSpec, ControlNetSpec
from config.sources import CheckpointSource, PlainSource
from pipelines.library.files import LibraryFile
from pipelines.library.names import Names, slug
from pipelines.library.shapes import Shape, UNetFacts, weights_of
from pipelines.weights.headers import Tensor, read_header

CONTROLNET = "controlnet"


def with_controlnets(catalog: Catalog, files: Sequence[LibraryFile]) -> Catalog:
    """The catalog with the ControlNets among `files`; what cannot be served joins its `unserved`.

    One that is built like a published model's is for the UNets of that; any other one for the UNet that a ControlNet of
    the catalog with the same shapes steers.
    """
    names = Names(control.name for control in catalog.controlnets)
    components, controls, unserved = list(catalog.components), list(catalog.controlnets), list(catalog.unserved)
    for file in files:
        if file.report.kind != CONTROLNET:
            continue
        unet, configuration = (None, None) if file.problem else _steered(file, catalog)
        reason = file.problem or _union(file) or (None if unet else _no_base(file)) or names.claim(file)
        if reason or unet is None:
            unserved.append(file.unserved(str(reason)))
            continue
        component = ComponentSpec(
            id=f"controlnet-{slug(file.name, {c.id for c in components}, ('controlnet',))}",
            kind="controlnet",
            family=unet.family,
            base=unet.id,
            source=CheckpointSource(checkpoint=file.file, configuration=configuration),
            subfolder="",
            dtype=unet.dtype,
            architecture=unet.architecture,
        )
        components.append(component)
        models = tuple(m.name for m in catalog.models if m.unet == unet.id)
        controls.append(ControlNetSpec(name=file.name, models=models, component=component.id))
    changed = {"components": tuple(components), "controlnets": tuple(controls), "unserved": tuple(unserved)}
    return catalog.model_copy(update=changed)


def _steered(file: LibraryFile, catalog: Catalog) -> tuple[ComponentSpec | None, PlainSource | None]:
    """The UNet that a ControlNet steers, and the configuration that fits it where that is no published one's."""
    unets = [catalog.component(m.unet) for m in catalog.available_models() if catalog.controls_of(m.name)]
    if file.report.base is not None:
        alike = (unet for unet in unets if UNetFacts.of_component(unet).architecture == file.report.base)
        if (found := next(alike, None)) is not None:
            return found, None
    try:
        own = _shapes(read_header(file.file).tensors.values())
    except (OSError, ValueError):
        return None, None
    for net in catalog.components:
        if net.kind == CONTROLNET and net.base in {unet.id for unet in unets} and not net.union:
            tensors = (tensor for path in weights_of(net) for tensor in read_header(path).tensors.values())
            if _shapes(tensors) == own and not isinstance(net.source, CheckpointSource):
                return catalog.component(str(net.base)), net.source
    return None, None


def _shapes(tensors: Iterable[Tensor]) -> Counter[Shape]:
    return Counter(tensor.shape for tensor in tensors)


def _union(file: LibraryFile) -> str | None:
    if file.report.control_types is None:
        return None
    return "a union ControlNet, whose modes no file tells; name its controls in a catalog's controlnets.yaml"


def _no_base(file: LibraryFile) -> str:
    return f"{file.report.reason}; no model served here that takes a ControlNet is built so"
