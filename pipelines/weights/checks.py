"""Checks of weights on disk; the errors name component, file and tensor.

diffusers and transformers leave a missing tensor at its random start and a tokenizer without vocabulary empty: pictures
come out wrong without a word. Here such a component does not load.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipelines.errors import WeightsError
from pipelines.weights.headers import check_start, read_header

HARMLESS = re.compile(r"position_ids$|^logit_scale$|^model_ema\.|^vision_model\.|^(text|visual)_projection\.")
"""Tensors that published text encoders carry and a CLIP text model has no use for: transformers ignores `position_ids`
and `logit_scale` itself, the others make a file a whole CLIP, and `model_ema` is a trainer's average."""


def damage(path: Path) -> str | None:
    """Why a file of weights or configuration cannot be read, None if nothing is wrong with its form."""
    if not path.is_file():
        return "no such file"
    try:
        if path.suffix == ".safetensors":
            read_header(path)
        else:
            check_start(path)
            if path.suffix == ".json":
                json.loads(path.read_text())
    except json.JSONDecodeError as error:
        return f"it is truncated or damaged: {error}"
    except (OSError, ValueError, RecursionError) as error:
        return str(error)
    return None


def check_file(what: str, root: Path, file: Path) -> None:
    """Raise WeightsError if a file below `root` is missing or damaged; `what` is its component's name."""
    if reason := damage(file):
        raise WeightsError(f"{what}, file {file.relative_to(root)}: {reason}")


def check_weights(what: str, root: Path, subfolder: str, stem: str, variant: str | None) -> Path:
    """The weights of a folder in diffusers' layout: one file, or an index of several, all of them sound.

    Returns:
        The file that names them in messages.
    """
    folder = root / subfolder
    ending = f".{variant}" if variant else ""
    check_file(what, root, folder / "config.json")
    whole = folder / f"{stem}{ending}.safetensors"
    index = folder / f"{stem}.safetensors.index{ending}.json"
    if whole.is_file() or not index.is_file():
        check_file(what, root, whole)
        return whole
    check_file(what, root, index)
    for shard in sorted(set(json.loads(index.read_text())["weight_map"].values())):
        check_file(what, root, folder / shard)
    return index


def check_tokenizer(what: str, root: Path, subfolder: str) -> None:
    """Raise WeightsError unless a CLIP tokenizer's configuration and vocabulary are there."""
    folder = root / subfolder
    check_file(what, root, folder / "tokenizer_config.json")
    # Either is enough: the fast tokenizer's one file, or the two of the original.
    names = ["tokenizer.json"] if (folder / "tokenizer.json").exists() else ["vocab.json", "merges.txt"]
    for name in names:
        check_file(what, root, folder / name)


def check_loaded(where: str, info: Mapping[str, Iterable[Any]], text: bool = False) -> None:
    """Raise WeightsError unless a model's tensors are exactly those of its files.

    Args:
        where: component and file.
        info: what `from_pretrained(..., output_loading_info=True)` says besides the model.
        text: a CLIP text model, whose files may hold more than it needs.
    """
    for name in sorted(info["missing_keys"]):
        raise WeightsError(f"{where}: tensor {name} is missing")
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise WeightsError(f"{where}: tensor {name} is {list(found)}, the configuration wants {list(wanted)}")
    for name in sorted(info["unexpected_keys"]):
        if not (text and HARMLESS.search(name)):
            raise WeightsError(f"{where}: tensor {name} belongs to no layer of this configuration")


def check_finite(where: str, model: Any) -> None:
    """Raise WeightsError if a parameter of a loaded model holds values that are not finite numbers."""
    for name, parameter in model.named_parameters():
        # A pass over the numbers without room for another tensor of their size; both ends carry what is not a number.
        if parameter.numel() and not all(bool(end.isfinite()) for end in parameter.detach().aminmax()):
            raise WeightsError(f"{where}: tensor {name} has values that are not finite numbers")
