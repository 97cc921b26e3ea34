"""A catalog extended by folders of files: models when a graph is built, LoRAs and embeddings at any time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from config.catalog import Catalog
from config.library import UnservedFile
from pipelines.library.controlnets import CONTROLNET, with_controlnets
from pipelines.library.embeddings import EMBEDDING, with_embeddings
from pipelines.library.equality import Digests
from pipelines.library.files import LibraryFile, LibraryFolders
from pipelines.library.loras import ADAPTERS, with_loras, with_loras_for_library_unets
from pipelines.library.models import MODELS, new_models, with_models
from pipelines.library.shapes import plain_unets
from pipelines.library.upscalers import UPSCALER, with_upscalers

MOST_REMEMBERED = 10_000
"""Removed files that are remembered: folders that are filled and emptied for ever must not fill memory."""
USED_BY_NAME = {"vae": "a checkpoint uses it that names it as `vae` in the .yaml of its stem"}
"""Kinds of files that are not listed on their own."""
_LATE = "it came, or was changed, after the graph was deployed; deploy it again to serve it"
_NOT_HERE = "files of this kind are not served from a library; a catalog can name it"


def extend(catalog: Catalog, folders: Sequence[Path], digests: Digests | None = None) -> Catalog:
    """The catalog with the models of a library; what else is there is found by `Library`, while the graph runs.

    Raises:
        CatalogError: a folder is not there.
    """
    files = LibraryFolders(folders)
    found = files.settled()
    extended = with_models(with_upscalers(with_controlnets(catalog, found), found), found, digests)
    return with_loras_for_library_unets(extended.catalog, extended.counterparts).model_copy(
        update={"library": files.folders}
    )


class Library:
    """The library of a running graph, read again on each call of `read`. One thread at a time may use it."""

    def __init__(self, built: Catalog) -> None:
        """Begin with the catalog that the graph was built with."""
        self._built = built
        self._folders = LibraryFolders(built.library)
        self._unets = plain_unets(built)
        self._served: dict[str, UnservedFile] = {}

    def read(self) -> Catalog:
        """The catalog as it is now."""
        files = self._folders.scan()
        here = {file.path for file in files}
        late = {file.path: file for file in new_models(self._built, files)}
        unserved = [entry for entry in self._built.unserved if entry.file in here and entry.file not in late]
        unserved += [file.unserved(file.problem or _LATE) for file in late.values()]
        found_now, deployed = (*ADAPTERS, EMBEDDING), (*MODELS, CONTROLNET, UPSCALER)
        unserved += [f.unserved(_reason(f)) for f in files if f.report.kind not in (*deployed, *found_now)]
        unserved += [entry for path, entry in self._served.items() if path not in here]
        read = with_loras(self._built.model_copy(update={"unserved": tuple(unserved)}), files, self._unets)
        read = with_embeddings(read, files, self._unets)
        refused = {entry.file for entry in read.unserved}
        for file in files:
            if file.report.kind in found_now and file.path not in refused and len(self._served) < MOST_REMEMBERED:
                self._served[file.path] = file.unserved("it was removed while the graph ran")
        return read


def _reason(file: LibraryFile) -> str:
    return file.problem or USED_BY_NAME.get(file.report.kind, _NOT_HERE)
