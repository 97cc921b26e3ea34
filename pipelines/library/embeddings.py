"""The textual inversions of a library."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from config.catalog import Catalog, EmbeddingSpec, LoraWeights
from config.sources import FolderSource
from pipelines.library.files import LibraryFile
from pipelines.library.names import Names
from pipelines.library.shapes import UNetFacts
from pipelines.weights.headers import read_header

EMBEDDING = "embedding"
_IN_PROMPTS = re.compile(r"[<>:()\[\]\\]")


def with_embeddings(catalog: Catalog, files: Sequence[LibraryFile], unets: Mapping[str, UNetFacts]) -> Catalog:
    """The catalog with the textual inversions among `files`; what cannot be served joins its `unserved`."""
    names = Names(entry.name for entry in catalog.embeddings if entry.unavailable is None)
    unserved = list(catalog.unserved)
    found: dict[str, EmbeddingSpec] = {}
    for file in files:
        if file.report.kind != EMBEDDING:
            continue
        bases = () if file.problem else _bases(file, unets)
        reason = file.problem or _name_problem(file.name) or (None if bases else _no_base(file)) or names.claim(file)
        if reason:
            unserved.append(file.unserved(reason))
            continue
        source = FolderSource(folder=file.file.parent)
        weights = LoraWeights(bases=bases, source=source, file=file.file.name, version=file.version)
        found[file.name.casefold()] = EmbeddingSpec(name=file.name, weights=(weights,))
    kept = [e for e in catalog.embeddings if e.unavailable is None or e.name.casefold() not in found]
    return catalog.model_copy(update={"embeddings": (*kept, *found.values()), "unserved": tuple(unserved)})


def _bases(file: LibraryFile, unets: Mapping[str, UNetFacts]) -> tuple[str, ...]:
    """UNets that read text as wide as the vectors are: of one text encoder, or of both side by side."""
    try:
        width = sum(tensor.shape[-1] for tensor in read_header(file.file).tensors.values())
    except (OSError, ValueError):
        return ()
    return tuple(unet for unet, facts in unets.items() if facts.text_width == width)


def _name_problem(name: str) -> str | None:
    if _IN_PROMPTS.search(name):
        return "prompts have another use for one of `<>:()[]\\`; say another `name` in a .yaml of its stem beside it"
    return None


def _no_base(file: LibraryFile) -> str:
    return f"{file.report.reason}; no model served here reads text so wide"
