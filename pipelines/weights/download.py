"""Fetch everything a catalog names, so that replicas can run with HF_HUB_OFFLINE=1.

python -m pipelines.weights.download --catalog hub [--model SD1.5 ...]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from config.catalog import Catalog
from pipelines.errors import WeightsError
from pipelines.weights.files import ComponentFiles, Files, annotator_files, embedding_files, lora_files


def download(catalog: Catalog) -> Iterator[tuple[str, Path]]:
    """What was fetched and where it lies: components, LoRAs and annotators of the models that are served.

    Raises:
        WeightsError: a source is missing.
    """
    for files in needed_files(catalog):
        yield files.what, files.folder()


def needed_files(catalog: Catalog) -> Iterator[Files]:
    """What the loaders will ask for."""
    served = catalog.served_components()
    for component in served:
        if (files := ComponentFiles(component).files) is not None:
            yield files
    unets = {component.id for component in served}
    for entries, files_of in ((catalog.loras, lora_files), (catalog.embeddings, embedding_files)):
        for entry in entries:
            for weights in entry.weights:
                if unets.intersection(weights.bases):
                    yield files_of(entry.name, weights)
    for spec in catalog.annotators:
        yield from annotator_files(spec)


def main() -> None:
    """Fetch, and print where everything lies; what cannot be had is one line of error and exit status 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalog", default="hub")
    parser.add_argument("--model", nargs="*", default=[], help="public names; every available model by default")
    options = parser.parse_args()
    catalog = Catalog.load(options.catalog)
    try:
        for what, folder in download(catalog.only(tuple(options.model)) if options.model else catalog):
            print(f"{what}: {folder}", flush=True)
    except WeightsError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
