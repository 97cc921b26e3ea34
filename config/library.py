"""The optional YAML file beside a file of a library, and the entry of a file that is not served."""

from __future__ import annotations

from pydantic import Field, field_validator

from config.components import SchedulerSettings, Size
from config.sources import Spec

MAX_NAME = 100
"""Characters of a public name."""


def name_problem(name: str) -> str | None:
    """Why something cannot be a public name, None if it can."""
    if not name.strip() or name != name.strip():
        return "a name is neither empty nor has it spaces at its ends"
    if len(name) > MAX_NAME:
        return f"a name has at most {MAX_NAME} characters, and this one {len(name)}"
    if any(character in "/\\" or not character.isprintable() for character in name):
        return "a name has neither slashes nor characters that cannot be printed"
    return None


class DefaultsOverride(Spec):
    """Values of absent request fields of one model; those not given are its family's."""

    width: int | None = Field(default=None, ge=8)
    height: int | None = Field(default=None, ge=8)
    steps: int | None = Field(default=None, ge=1, le=1000)
    cfg_scale: float | None = Field(default=None, ge=0, le=50)
    sampler: str | None = None
    strength: float | None = Field(default=None, ge=0, le=1)


class Override(Spec):
    """`NAME.yaml` beside a file `NAME.safetensors`: values that replace those that follow from the file."""

    name: str | None = None
    aliases: tuple[str, ...] = ()
    defaults: DefaultsOverride = DefaultsOverride()
    sizes: tuple[Size, ...] = ()
    """Checkpoints only: sizes the model draws best."""
    trigger: str | None = Field(default=None, max_length=1000)
    """LoRAs only: words its training captions used."""
    vae: str | None = None
    """Checkpoints only: file name of a VAE in the library, which takes the place of the checkpoint's own."""
    scheduler: SchedulerSettings = SchedulerSettings()
    """Checkpoints only."""

    @field_validator("name", "aliases")
    @classmethod
    def _can_be_names(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        for name in (value,) if isinstance(value, str) else value or ():
            if problem := name_problem(name):
                raise ValueError(f"'{name[:100]}': {problem}")
        return value


class UnservedFile(Spec):
    """A file of a library that is not served, and the reason."""

    name: str
    kind: str
    """As `pipelines.weights.inspect` says it."""
    file: str
    """Its path in the library."""
    reason: str
    version: str = ""
    """Changes when the file does."""
    is_new: bool = False
    """It was written a moment ago, and may be served when it has stayed as it is for a moment."""
