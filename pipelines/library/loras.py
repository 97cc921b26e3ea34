"""The LoRAs of a library, and of its catalog for the library's models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from config.catalog import Catalog, LoraSpec, LoraWeights
from config.sources import FolderSource
from pipelines.library.files import LibraryFile
from pipelines.library.names import Names
from pipelines.library.shapes import UNetFacts, bases_of

ADAPTERS = ("lora", "dora", "loha", "lokr", "oft")


def with_loras(catalog: Catalog, files: Sequence[LibraryFile], unets: Mapping[str, UNetFacts]) -> Catalog:
    """The catalog with the adapters among `files`; what cannot be served joins its `unserved`.

    A name that the catalog lists but does not serve goes to a file of that name.
    """
    adapters = [file for file in files if file.report.kind in ADAPTERS]
    served = [lora for lora in catalog.loras if lora.unavailable is None]
    names = Names(name for lora in served for name in (lora.name, *lora.aliases))
    unserved = list(catalog.unserved)
    found: dict[str, LoraSpec] = {}
    for file in adapters:
        bases = () if file.problem else bases_of(file, unets)
        reason = file.problem or (None if bases else _no_base(file, unets)) or names.claim(file)
        if reason:
            unserved.append(file.unserved(reason))
            continue
        weights = LoraWeights(
            bases=bases, source=FolderSource(folder=file.file.parent), file=file.file.name, version=file.version
        )
        found[file.name.casefold()] = LoraSpec(
            name=file.name, aliases=file.override.aliases, weights=(weights,), trigger=file.override.trigger
        )
    taken = {name.casefold() for lora in found.values() for name in (lora.name, *lora.aliases)}
    kept = [
        lora
        for lora in catalog.loras
        if lora.unavailable is None or not taken & {name.casefold() for name in (lora.name, *lora.aliases)}
    ]
    return catalog.model_copy(update={"loras": (*kept, *found.values()), "unserved": tuple(unserved)})


def with_loras_for_library_unets(catalog: Catalog, counterparts: Mapping[str, str]) -> Catalog:
    """The catalog with its LoRAs extended to the library's UNets that have the shapes of a UNet they fit.

    Args:
        catalog: with the library's models.
        counterparts: UNet of the library -> UNet of the catalog.
    """

    def widened(weights: LoraWeights) -> LoraWeights:
        more = tuple(unet for unet, like in counterparts.items() if like in weights.bases)
        return weights.model_copy(update={"bases": (*weights.bases, *more)})

    loras = tuple(
        lora.model_copy(update={"weights": tuple(widened(weights) for weights in lora.weights)})
        for lora in catalog.loras
    )
    return catalog.model_copy(update={"loras": loras})


def _no_base(file: LibraryFile, unets: Mapping[str, UNetFacts]) -> str:
    report = file.report
    made_for = report.base or (f"a UNet whose text states are {report.context} wide" if report.context else "no UNet")
    here = sorted({facts.architecture for facts in unets.values() if facts.architecture is not None})
    return f"it was made for {made_for}, which no model served here is" + f" (they are {here})" * bool(here)
