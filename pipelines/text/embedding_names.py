"""Where prompts say `<name>` of a textual inversion. Pure text: the ingress decides which are meant."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from config.catalog import Catalog, EmbeddingSpec, ModelSpec
from config.choices import UnknownChoiceError
from pipelines.errors import InvalidValueError
from pipelines.plan import EmbeddingUse
from pipelines.text.prompts import Prompts

_SAID = re.compile(r"<([^<>:()\[\]\\]+)>")


def with_embeddings(prompts: Prompts, model: ModelSpec, catalog: Catalog) -> Prompts:
    """The texts with the names as the catalog writes them; whatever else stands in `<>` is text, as in diffusers.

    Raises:
        InvalidValueError: a text names one that is not served, or not with this model.
    """
    if not catalog.embeddings:
        return prompts
    choices = catalog.embedding_choices()
    specs = {spec.name: spec for spec in catalog.embeddings}
    fitting = [spec.name for spec in catalog.embeddings if spec.unavailable is None and model.unet in spec.bases]
    named: dict[str, EmbeddingSpec] = {}

    def read(param: str, text: str) -> str:
        def canonical(match: re.Match[str]) -> str:
            try:
                name = choices.resolve(match.group(1))
            except UnknownChoiceError:
                return match.group(0)
            if name not in fitting:
                reason = specs[name].unavailable or "made for other models"
                raise InvalidValueError(
                    f"{param}: the embedding '<{name}>' is not available with {model.name}: {reason}. "
                    f"Only {fitting} allowed now",
                    param,
                )
            named[name] = specs[name]
            return f"<{name}>"

        return _SAID.sub(canonical, text)

    def read_optional(param: str, text: str | None) -> str | None:
        return None if text is None else read(param, text)

    return replace(
        prompts,
        prompt=read("prompt", prompts.prompt),
        prompt_2=read_optional("prompt_2", prompts.prompt_2),
        negative_prompt=read_optional("negative_prompt", prompts.negative_prompt),
        negative_prompt_2=read_optional("negative_prompt_2", prompts.negative_prompt_2),
        embeddings=_by_base(catalog, named),
    )


def _by_base(catalog: Catalog, named: Mapping[str, EmbeddingSpec]) -> dict[str, tuple[EmbeddingUse, ...]]:
    """What each UNet has of them."""
    found: dict[str, tuple[EmbeddingUse, ...]] = {}
    for spec in named.values():
        for weights in spec.weights:
            use = EmbeddingUse(name=spec.name, file=catalog.library_path(weights), version=weights.version)
            for base in weights.bases:
                found[base] = (*found.get(base, ()), use)
    return found
