"""Keeps a training run across machines: its averaged weights in half precision, which `--warm` goes on from.

    python -m training.checkpoint [--build build/training/cpu]

Writes training/checkpoints: the UNet's moving average and the text tower; the tokenizer and the autoencoder are those
of models/sd15. The optimizer's state is not kept: it is three times the weights, and builds up again in minutes.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import CLIPTextModel

from training.data import BUILD, ROOT
from training.export import LARGEST_FILE
from training.look import unet_of_build

FOLDER = ROOT / "training" / "checkpoints"
PARTS = {"text_encoder": "text", "unet": "unet-warm"}
"""Folder here -> folder in a build."""


def save(build: Path) -> None:
    """Write the present state of `build`."""
    for part, model in (
        ("unet", unet_of_build(build)),
        ("text_encoder", CLIPTextModel.from_pretrained(build / "text")),
    ):
        shutil.rmtree(FOLDER / part, ignore_errors=True)
        model.to(torch.float16).save_pretrained(FOLDER / part, max_shard_size=LARGEST_FILE)


def restore(build: Path) -> None:
    """Restore the saved state into an empty `build`, whose text stage is then done."""
    for part, name in PARTS.items():
        shutil.copytree(FOLDER / part, build / name)
    (build / "text.done").touch()


def main() -> None:
    """Write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=BUILD / "cpu")
    save(parser.parse_args().build)


if __name__ == "__main__":
    main()
