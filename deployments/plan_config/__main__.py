"""A Serve config for a catalog and the cards at hand: deployments, shares of cards, autoscaling, scale to zero.

    python -m deployments.plan_config --catalog hub > serve_config.yaml          # the shipped one; then `make k8s`
    python -m deployments.plan_config --catalog hub --gpus 2x80,1x24             # two cards of 80 GB and one of 24
    python -m deployments.plan_config --catalog hub --gpus 1x24 --models SD1.5   # one machine, loopback, no keys

Shares are arithmetic (pipelines/footprint.py). Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from config.catalog import CatalogError
from config.choices import UnknownChoiceError
from deployments.plan_config.cards import CLUSTER, PlanError
from deployments.plan_config.serve_config import serve_config
from pipelines.errors import WeightsError


def main() -> None:
    """Print the config; what does not fit ends with the reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalog", default="hub", help="a folder under config/catalogs, or an absolute path")
    parser.add_argument("--library", nargs="*", default=[], type=Path, help="folders of checkpoints and LoRAs")
    parser.add_argument("--gpus", default=CLUSTER, help=f"number x GB of each kind of card; {CLUSTER} by default")
    parser.add_argument("--models", nargs="*", default=[], help="public names; every available model by default")
    options = parser.parse_args()
    try:
        print(serve_config(options.catalog, options.gpus, tuple(options.models), tuple(options.library)), end="")
    except (PlanError, CatalogError, UnknownChoiceError, WeightsError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
