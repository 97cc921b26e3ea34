"""The LoRAs of a request: from `loras` and from tags in its prompt, by the names of the catalog."""

from __future__ import annotations

import math
from collections.abc import Sequence

from config.catalog import Catalog, ModelSpec
from config.choices import Choices, UnknownChoiceError
from pipelines.errors import InvalidValueError
from pipelines.plan import GenerationParams, LoraUse, PartWeights
from pipelines.text.syntax import LoraTag


def mixture_of(
    params: GenerationParams, tags: Sequence[LoraTag], model: ModelSpec, catalog: Catalog
) -> tuple[LoraUse, ...]:
    """The mixture, in the request's order; a weight of 0 is none. The refiner never gets one: it is another UNet.

    A LoRA that tags in the prompt name, once or more, beside `loras` or not, gets the sum of its weights.
    """
    fitting = [entry.name for entry in catalog.loras if entry.unavailable is None and model.unet in entry.bases]
    choices = catalog.lora_choices()
    weights: dict[str, tuple[float, float, float]] = {}
    for wanted, given in params.loras.items():
        name = _fitting_lora(wanted, choices, fitting, model, catalog)
        if name in weights:
            raise InvalidValueError(f"loras: '{name}' is given twice", "loras")
        weights[name] = _weights(name, given, model)
    for tag in tags:
        name = _fitting_lora(tag.name, choices, fitting, model, catalog)
        unet, first, second = weights.get(name, (0.0, 0.0, 0.0))
        weights[name] = unet + tag.unet, first + tag.text_encoder, second + tag.text_encoder
    return tuple(_use(catalog, model, name, *own) for name, own in weights.items() if any(own))


def _weights(name: str, given: float | PartWeights, model: ModelSpec) -> tuple[float, float, float]:
    """Of the UNet and of both text encoders."""
    if not isinstance(given, PartWeights):
        if not math.isfinite(given):
            raise InvalidValueError(f"loras: the weight {given} of '{name}' is not a finite number", "loras")
        return given, given, given
    if given.text_encoder_2 is not None and model.family != "sdxl":
        raise InvalidValueError(f"loras: '{name}' has a weight for text_encoder_2; {model.name} has one", "loras")
    text_encoder = 1.0 if given.text_encoder is None else given.text_encoder
    second = text_encoder if given.text_encoder_2 is None else given.text_encoder_2
    return 1.0 if given.unet is None else given.unet, text_encoder, second


def _use(
    catalog: Catalog, model: ModelSpec, name: str, unet: float, text_encoder: float, text_encoder_2: float
) -> LoraUse:
    """One LoRA of the plan; one weight for all parts if they are equal, so that equal requests make equal plans."""
    weights = catalog.lora_weights(name, model.unet)
    use = LoraUse(name=name, weight=unet, file=catalog.library_path(weights), version=weights.version)
    if text_encoder == text_encoder_2 == unet:
        return use
    second = None if text_encoder == text_encoder_2 else text_encoder_2
    return use.model_copy(update={"text_encoder": text_encoder, "text_encoder_2": second})


def _fitting_lora(wanted: str, choices: Choices, fitting: list[str], model: ModelSpec, catalog: Catalog) -> str:
    """The canonical name of a LoRA that fits the model."""
    try:
        name = choices.resolve(wanted)
    except UnknownChoiceError as error:
        message = str(UnknownChoiceError("loras", wanted, fitting, error.suggestion))
        if (reason := catalog.why_unserved(wanted)) is not None:
            message = f"loras '{wanted.strip()[:100]}' is not available: {reason}. Only {fitting} allowed now"
        raise InvalidValueError(message, "loras") from None
    if name not in fitting:
        reason = next(entry for entry in catalog.loras if entry.name == name).unavailable or "made for other models"
        raise InvalidValueError(
            f"loras '{name}' is not available with {model.name}: {reason}. Only {fitting} allowed now", "loras"
        )
    return name
