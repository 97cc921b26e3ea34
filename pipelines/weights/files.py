"""Which files a catalog entry needs, and where they lie: one list, read by the loaders and by the download."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.catalog import ROOT, AnnotatorSpec, ComponentSpec, LoraWeights
from config.sources import CheckpointSource, FolderSource, HubSource
from pipelines.errors import WeightsError
from pipelines.weights.sources import fetch

_STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "controlnet": "diffusion_pytorch_model",
    "text_encoder": "model",
}


@dataclass(frozen=True)
class Files:
    """The files of one source that something needs."""

    what: str
    """Names it in messages, such as `annotator depth`."""
    source: HubSource | FolderSource
    patterns: tuple[str, ...]
    """Glob patterns, as `huggingface_hub` matches them: `*` crosses folders."""

    def folder(self) -> Path:
        """The local folder of the source; from the hub only these files. Raises WeightsError."""
        return fetch(self.what, self.source, self.patterns)


class ComponentFiles:
    """The files of one component in diffusers' layout."""

    def __init__(self, spec: ComponentSpec) -> None:
        self.spec = spec
        hub = spec.source if isinstance(spec.source, HubSource) else None
        self.variant = None if hub is None else hub.variant
        """Variant in the weights' file names, such as `fp16`."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Text encoders only: what ends the names of each encoder's folders, in order."""
        return ("", "_2") if self.spec.family == "sdxl" else ("",)

    @property
    def folders(self) -> tuple[str, ...]:
        """Folders inside the source; the weights are in the first, and "" is the root."""
        if self.spec.kind == "text_encoder":
            return tuple(f"{part}{suffix}" for suffix in self.suffixes for part in ("text_encoder", "tokenizer"))
        weights = self.spec.kind if self.spec.subfolder is None else self.spec.subfolder
        return (weights, "scheduler") if self.spec.kind == "unet" else (weights,)

    @property
    def files(self) -> Files:
        """Configuration, tokenizers, and the weights of one variant; of a checkpoint, its configuration folder."""
        source = self.spec.source.configuration if isinstance(self.spec.source, CheckpointSource) else self.spec.source
        stem = _STEMS[self.spec.kind]
        if self.variant:
            names = ["*.json", "merges.txt", f"{stem}.{self.variant}*.safetensors"]
        else:
            names = ["*.json", "merges.txt", f"{stem}.safetensors", f"{stem}-*.safetensors"]
        patterns = tuple(f"{folder}/{name}".lstrip("/") for folder in self.folders for name in names)
        return Files(f"component {self.spec.id}", source, patterns)

    @property
    def checkpoint(self) -> Path | None:
        """The single `.safetensors` file the weights are in, None for a folder."""
        if not isinstance(self.spec.source, CheckpointSource):
            return None
        path = self.spec.source.checkpoint
        return path if path.is_absolute() else ROOT / path

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn what loaders raise into a WeightsError that names the component."""
        try:
            yield
        except WeightsError:
            raise
        except (OSError, ValueError, KeyError) as error:
            raise WeightsError(f"component {self.spec.id}: cannot load {self.spec.source}: {error}") from error


def locate(spec: ComponentSpec) -> Path:
    """The local folder of a component's source, of a checkpoint its configuration's; raises WeightsError."""
    return ComponentFiles(spec).files.folder()


def read_config(spec: ComponentSpec, folder: str | None = None) -> dict[str, Any]:
    """A component's `config.json`, without its weights; with `folder="scheduler"`, its `scheduler_config.json`.

    Args:
        spec: the component.
        folder: folder inside the source; by default that of the weights.

    Raises:
        WeightsError: there is no such file.
    """
    files = ComponentFiles(spec)
    name = "scheduler_config.json" if folder == "scheduler" else "config.json"
    path = locate(spec) / (files.folders[0] if folder is None else folder) / name
    with files.explained():
        config: dict[str, Any] = json.loads(path.read_text())
    return config


def lora_files(name: str, weights: LoraWeights) -> Files:
    """The file of a LoRA, by its public name."""
    return Files(f"lora {name}", weights.source, (weights.file,))


def annotator_files(spec: AnnotatorSpec) -> tuple[Files, ...]:
    """The files of an annotator: of its model, then of openpose's detector."""
    # An ONNX file may lie in a folder of its repository; the loader finds it there.
    patterns = ("*.json", "*.safetensors") if spec.file is None else (spec.file, f"*/{spec.file}")
    model = Files(f"annotator {spec.name}", spec.source, patterns)
    if spec.detector is None:
        return (model,)
    return model, Files(f"annotator {spec.name}, detector", spec.detector, patterns)
