"""Models as A1111's clients name checkpoints: `name [hash]`."""

from __future__ import annotations

import functools
import hashlib
import re

from config.catalog import Catalog, ModelSpec
from config.choices import UnknownChoiceError
from config.components import ComponentSpec
from pipelines.errors import UnavailableModelError

_HASH = re.compile(r"\s*\[([0-9a-fA-F]{6,64})\]$")
_SUFFIX = re.compile(r"\.(safetensors|ckpt)$", re.IGNORECASE)
PARAM = "sd_model_checkpoint"


def short_hash(model: ModelSpec, catalog: Catalog) -> str:
    """Ten hexadecimal digits that change with where the model's weights come from.

    Not A1111's, which hashes one file: a model here is several, and nobody reads gigabytes to list it.
    """
    return _hash(*(catalog.component(part) for part in (model.text_encoder, model.unet, model.vae)))


@functools.lru_cache(maxsize=1024)
def _hash(*parts: ComponentSpec) -> str:
    places = "".join(f"{part.source!r} {part.subfolder} {part.scheduler!r}\n" for part in parts)
    return hashlib.sha256(places.encode()).hexdigest()[:10]


def title(model: ModelSpec, catalog: Catalog) -> str:
    """What clients show, and send back."""
    return f"{model.name} [{short_hash(model, catalog)}]"


def checkpoint(name: str, catalog: Catalog, param: str = PARAM) -> ModelSpec:
    """The model of a title, a name, an alias, a file's name or a hash.

    Raises:
        UnavailableModelError: there is none, or it is not served.
    """
    served = catalog.available_models()
    bare = _SUFFIX.sub("", _HASH.sub("", name.strip()))
    try:
        model = catalog.model(catalog.model_choices().resolve(bare))
    except UnknownChoiceError as error:
        wanted = name.strip().strip("[]").casefold()
        by_hash = [model for model in served if short_hash(model, catalog) == wanted]
        if by_hash:
            return by_hash[0]
        message = str(UnknownChoiceError(param, name, [m.name for m in served], error.suggestion))
        if (reason := catalog.why_unserved(bare)) is not None:
            message = f"{param} '{bare[:100]}' is not available: {reason}. Only {[m.name for m in served]} allowed now"
        raise UnavailableModelError(message, param) from None
    if model.unavailable is not None:
        raise UnavailableModelError(
            f"{param} '{model.name}' is not available: {model.unavailable}. "
            f"Only {[m.name for m in served]} allowed now",
            param,
        )
    return model
