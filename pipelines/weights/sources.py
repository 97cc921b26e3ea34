"""A catalog source -> a local folder: this repository's, the machine's, or the hub's at a pinned commit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from config.catalog import ROOT
from config.sources import FolderSource, HubSource
from pipelines.errors import WeightsError


def fetch(what: str, source: HubSource | FolderSource, patterns: Sequence[str]) -> Path:
    """The local folder of a source; from the hub only the files that match `patterns`, unless they are cached.

    Set `HF_HUB_OFFLINE=1` where the cache is filled in advance: the network is not used then.

    Args:
        what: names the thing in messages, such as `component unet-sd15`.
        source: where it lies.
        patterns: glob patterns of the files it needs.

    Raises:
        WeightsError: there is no such folder, or neither the cache nor the hub has it.
    """
    if isinstance(source, FolderSource):
        folder = source.folder if source.folder.is_absolute() else ROOT / source.folder
        if not folder.is_dir():
            raise WeightsError(f"{what}: folder {source.folder} does not exist; `make models` writes ours")
        return folder
    try:
        return Path(snapshot_download(source.repo, revision=source.revision, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{what}: cannot load {source}: {error}") from error
