"""What is added to a model by name: LoRAs and textual inversions."""

from __future__ import annotations

from pydantic import Field

from config.sources import PlainSource, Spec


class LoraWeights(Spec):
    """One LoRA file and the UNets it was made for."""

    bases: tuple[str, ...] = Field(min_length=1)
    """Component ids of UNets."""
    source: PlainSource
    file: str = Field(pattern=r"^[^/]+\.safetensors$")
    version: str | None = None
    """Of a file in a library, which may be replaced while the graph runs: which one it was."""


class LoraSpec(Spec):
    """A LoRA by its public name. One name may have weights for several base UNets."""

    name: str
    aliases: tuple[str, ...] = ()
    weights: tuple[LoraWeights, ...] = ()
    trigger: str | None = None
    """Words its training captions used; for people to read."""
    unavailable: str | None = None

    @property
    def bases(self) -> tuple[str, ...]:
        """Component ids of the UNets it works on."""
        return tuple(base for weights in self.weights for base in weights.bases)


class EmbeddingSpec(Spec):
    """A textual inversion by its public name, which prompts say as `<name>`."""

    name: str = Field(pattern=r"^[^<>:()\[\]\\]+$")
    """Nothing in it that prompts have another use for."""
    weights: tuple[LoraWeights, ...] = ()
    """Its files, and the UNets whose text encoders each is for."""
    unavailable: str | None = None

    @property
    def bases(self) -> tuple[str, ...]:
        """Component ids of the UNets it works with."""
        return tuple(base for weights in self.weights for base in weights.bases)
