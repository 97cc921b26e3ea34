"""Which files a catalog entry needs, and where they lie: one list, read by the loaders and by the download."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.catalog import ROOT, AnnotatorSpec, Catalog, ComponentSpec, LoraWeights
from config.sources import CheckpointSource, FolderSource, HubSource
from pipelines.errors import WeightsError
from pipelines.plan import EmbeddingUse, LoraUse
from pipelines.weights import checks
from pipelines.weights.architectures import settings
from pipelines.weights.checkpoints import channels_taken, schedule_marks
from pipelines.weights.sources import fetch
from pipelines.weights.versions import version_of

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
        """Variant in the weights' file names on the hub, such as `fp16`."""

    @property
    def on_hub(self) -> bool:
        """Whether its files may have to be fetched."""
        return self.files is not None and isinstance(self.files.source, HubSource)

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
    def files(self) -> Files | None:
        """Configuration, tokenizers, and the weights of one variant; of a checkpoint, its configuration, if given."""
        source = self.spec.source.configuration if isinstance(self.spec.source, CheckpointSource) else self.spec.source
        if source is None:
            return None
        if self.spec.file is not None:
            return Files(self.what, source, (self.spec.file,))
        stem = _STEMS[self.spec.kind]
        if self.variant:
            names = ["*.json", "merges.txt", f"{stem}.{self.variant}*.safetensors"]
        else:
            names = ["*.json", "merges.txt", f"{stem}.safetensors", f"{stem}-*.safetensors"]
        patterns = tuple(f"{folder}/{name}".lstrip("/") for folder in self.folders for name in names)
        return Files(self.what, source, patterns)

    @property
    def checkpoint(self) -> Path | None:
        """The single `.safetensors` file the weights are in, None for a folder."""
        if not isinstance(self.spec.source, CheckpointSource):
            return None
        path = self.spec.source.checkpoint
        return path if path.is_absolute() else ROOT / path

    @property
    def upscaler(self) -> Path:
        """The file of an upscaler; WeightsError where its folder or repository cannot be had."""
        return self.checkpoint or self.root / str(self.spec.file)

    @property
    def root(self) -> Path:
        """The local folder of the source, of a checkpoint that of its configuration; WeightsError if there is none."""
        if self.files is None:
            raise WeightsError(f"{self.what}: a checkpoint has no folder")
        return self.files.folder()

    def variant_in(self, subfolder: str) -> str | None:
        """Variant of the weights in one folder of the source: the hub's, or fp16 where nothing else lies there."""
        if not isinstance(self.spec.source, FolderSource):
            return self.variant
        folder, stem = self.root / subfolder, _STEMS[self.spec.kind]
        plain = [folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"]
        half = [folder / f"{stem}.fp16.safetensors", folder / f"{stem}.safetensors.index.fp16.json"]
        return "fp16" if any(p.exists() for p in half) and not any(p.exists() for p in plain) else None

    def check_weights(self, subfolder: str) -> str:
        """Component and file, for messages, of weights whose files are there and sound; raises WeightsError."""
        root = self.root
        path = checks.check_weights(self.what, root, subfolder, _STEMS[self.spec.kind], self.variant_in(subfolder))
        return f"{self.what}, file {path.relative_to(root)}"

    def check_checkpoint(self, path: Path) -> str:
        """The same of a single checkpoint."""
        if reason := checks.damage(path):
            raise WeightsError(f"{self.what}, file {path.name}: {reason}")
        return f"{self.what}, file {path.name}"

    @property
    def what(self) -> str:
        """Names the component in messages."""
        return f"component {self.spec.id}"

    @contextmanager
    def explained(self, where: str) -> Iterator[None]:
        """Turn what loaders raise into a WeightsError that begins with `where`, the component and file."""
        try:
            yield
        except WeightsError:
            raise
        except Exception as error:  # the libraries raise whatever they run into
            raise WeightsError(f"{where}: cannot be loaded: {error}") from error


def locate(spec: ComponentSpec) -> Path:
    """The local folder of a component's source, of a checkpoint its configuration's; raises WeightsError."""
    return ComponentFiles(spec).root


def read_config(spec: ComponentSpec, folder: str | None = None) -> dict[str, Any]:
    """A component's `config.json`, without its weights.

    Args:
        spec: the component.
        folder: folder inside the source; by default that of the weights. Of `scheduler` it is `scheduler_config.json`
            that is read, of a tokenizer `tokenizer_config.json`.

    Raises:
        WeightsError: there is no such file, or a checkpoint is built like no published model.
    """
    files = ComponentFiles(spec)
    part = files.folders[0] if folder is None else folder
    config: dict[str, Any]
    if files.checkpoint is not None and files.files is None:
        assert spec.family != "any", "upscalers have no configuration"
        config = settings(files.what, files.checkpoint, part or spec.kind, spec.family)
    else:
        kind = next((kind for kind in ("scheduler", "tokenizer") if part.startswith(kind)), None)
        path = files.root / part / (f"{kind}_config.json" if kind else "config.json")
        checks.check_file(files.what, files.root, path)
        config = json.loads(path.read_text())
        if files.checkpoint is not None and spec.kind == "unet" and part == files.folders[0]:
            files.check_checkpoint(files.checkpoint)
            config |= channels_taken(files.checkpoint)
    if part != "scheduler":
        return config
    if files.checkpoint is not None:
        files.check_checkpoint(files.checkpoint)
        config |= schedule_marks(files.checkpoint)
    return config | spec.scheduler.model_dump(exclude_none=True)


def lora_files(name: str, weights: LoraWeights) -> Files:
    """The file of a LoRA, by its public name."""
    return Files(f"lora {name}", weights.source, (weights.file,))


def lora_path(catalog: Catalog, use: LoraUse, base: str) -> Path:
    """The file of a LoRA for a base UNet: the catalog's, or the one in the library that the plan meant.

    Raises:
        WeightsError: it is not there, or not the one that was found when the plan was made.
    """
    if use.file is None:
        weights = catalog.lora_weights(use.name, base)
        return lora_files(use.name, weights).folder() / weights.file
    return _in_library(catalog, use.file, use.version, f"lora {use.name}")


def embedding_path(catalog: Catalog, use: EmbeddingUse, base: str) -> Path:
    """The same for a textual inversion."""
    if use.file is None:
        weights = catalog.embedding_weights(use.name, base)
        return embedding_files(use.name, weights).folder() / weights.file
    return _in_library(catalog, use.file, use.version, f"embedding {use.name}")


def _in_library(catalog: Catalog, file: str, version: str | None, what: str) -> Path:
    path = next((root / file for root in catalog.library if version_of(root / file) == version), None)
    if path is None:
        raise WeightsError(f"{what}, file {file}: it was removed or replaced a moment ago; try again")
    return path


def embedding_files(name: str, weights: LoraWeights) -> Files:
    """The file of a textual inversion, by its public name."""
    return Files(f"embedding {name}", weights.source, (weights.file,))


def annotator_files(spec: AnnotatorSpec) -> tuple[Files, ...]:
    """The files of an annotator: of its model, then of openpose's detector."""
    # An ONNX file may lie in a folder of its repository; the loader finds it there.
    patterns = ("*.json", "*.safetensors") if spec.file is None else (spec.file, f"*/{spec.file}")
    model = Files(f"annotator {spec.name}", spec.source, patterns)
    if spec.detector is None:
        return (model,)
    return model, Files(f"annotator {spec.name}, detector", spec.detector, patterns)
