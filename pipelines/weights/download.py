"""Fetch everything a catalog names, so that replicas can run with HF_HUB_OFFLINE=1.

python -m pipelines.weights.download --catalog hub [--model SD1.5 ...]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from config.catalog import Catalog
from pipelines.weights.loading import locate
from pipelines.weights.sources import fetch


def download(catalog: Catalog) -> Iterator[tuple[str, Path]]:
    """What was fetched and where it lies: components, LoRAs and annotators of the models that are served.

    Raises:
        WeightsError: a source is missing.
    """
    served = catalog.served_components()
    for component in served:
        yield f"component {component.id}", locate(component)
    unets = {component.id for component in served}
    for lora in catalog.loras:
        for weights in lora.weights:
            if unets.intersection(weights.bases):
                yield f"lora {lora.name}", fetch(f"lora {lora.name}", weights.source, [weights.file])
    for spec in catalog.annotators:
        patterns = [spec.file] if spec.file else ["*.json", "*.safetensors"]
        for source in (spec.source, spec.detector):
            if source is not None:
                yield f"annotator {spec.name}", fetch(f"annotator {spec.name}", source, patterns)


def main() -> None:
    """Fetch and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalog", default="hub")
    parser.add_argument("--model", nargs="*", default=[], help="public names; every available model by default")
    options = parser.parse_args()
    catalog = Catalog.load(options.catalog)
    for what, folder in download(catalog.only(tuple(options.model)) if options.model else catalog):
        print(f"{what}: {folder}", flush=True)


if __name__ == "__main__":
    main()
