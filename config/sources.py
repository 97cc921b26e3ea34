"""Where weights lie: the hub at one commit, a folder, a single checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

TVM_CACHE = Path(__file__).resolve().parents[1] / "build" / "tvm"
"""The default folder of compiled UNets."""


class Spec(BaseModel):
    """A frozen entry that refuses unknown keys: a typo in a catalog must not be silent."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class HubSource(Spec):
    """A repository on the Hugging Face hub at one commit."""

    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    revision: str = Field(pattern=r"^[0-9a-f]{7,40}$")
    variant: str | None = None
    """File name variant such as `fp16` (`model.fp16.safetensors`)."""


class FolderSource(Spec):
    """A diffusers folder; a relative path is relative to the repository root."""

    folder: Path


def _kind(source: Any) -> str | None:
    """Which source an entry is: the one key that only this kind has decides, so that one kind's errors are told."""
    given = source if isinstance(source, dict) else getattr(source, "__dict__", {})
    return next((kind for kind in ("repo", "folder", "checkpoint") if kind in given), None)


_BY_KIND = Discriminator(
    _kind,
    custom_error_type="source",
    custom_error_message="say where the weights lie: repo and revision, folder, or checkpoint",
)
PlainSource = Annotated[
    Annotated[HubSource, Tag("repo")] | Annotated[FolderSource, Tag("folder")],
    _BY_KIND,
]
"""A repository or a folder in diffusers' layout."""


class CheckpointSource(Spec):
    """A single `.safetensors` file: a whole checkpoint, or one model alone, in the original layout or diffusers'."""

    checkpoint: Path
    configuration: PlainSource | None = None
    """A diffusers folder, of which only the small files are read: `config.json` of each component, the tokenizers, the
    scheduler. By default the settings of the published model that the file is built like."""

    @model_validator(mode="after")
    def _safetensors_only(self) -> CheckpointSource:
        if self.checkpoint.suffix != ".safetensors":
            raise ValueError(f"checkpoint {self.checkpoint.name}: only .safetensors is loaded, a pickle can run code")
        return self


Source = Annotated[
    Annotated[HubSource, Tag("repo")]
    | Annotated[FolderSource, Tag("folder")]
    | Annotated[CheckpointSource, Tag("checkpoint")],
    _BY_KIND,
]
