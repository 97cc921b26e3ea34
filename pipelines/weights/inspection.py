"""What a file of weights is, by the names and shapes of its tensors; metadata is a hint that shapes overrule.

Only the header of a file is read, never a tensor, and never a pickle.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from pipelines.weights.headers import MAX_HEADER_BYTES, Header, Tensor, read_header
from pipelines.weights.kinds.adapters import read_adapter
from pipelines.weights.kinds.folders import PIPELINE, read_pipeline
from pipelines.weights.kinds.models import read_model
from pipelines.weights.kinds.reports import Base, FileReport, Kind
from pipelines.weights.kinds.small import (
    FALLBACK_UNSERVED_KINDS,
    UNSERVED_KINDS,
    name_unserved_kind,
    read_embedding,
    read_upscaler,
)

__all__ = ["Base", "FileReport", "Kind", "inspect_file", "inspect_folder"]

Inspect = Callable[[Path, Path | None], FileReport]

SUFFIX = ".safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
LISTED = (SUFFIX, *PICKLES, ".sft", ".gguf")
"""Names of the files that are reported; everything else in a folder is ignored."""
_INDEX = re.compile(r"\.safetensors\.index(\.\w+)?\.json$")
_SHARD = re.compile(r"-\d{5}-of-\d{5}(\.\w+)?\.safetensors$")
_PICKLED = (
    "a pickle, which can run code when it is read; convert it to safetensors, or take the .safetensors that most "
    "publishers offer beside it"
)


def inspect_file(file: Path, root: Path | None = None) -> FileReport:
    """The report of a file. Never raises: a file that cannot be read is `unknown`, with the reason.

    Args:
        file: a `.safetensors` file, the index of one that is cut into several, or anything else.
        root: a folder which a link must not lead out of; None allows any link.
    """
    try:
        if root is not None and file.is_symlink() and not file.resolve().is_relative_to(root.resolve()):
            return FileReport(file, "unknown", reason="a link that leads out of its folder; copy the file itself")
        if file.suffix.lower() in PICKLES:
            return FileReport(file, "unknown", reason=_PICKLED)
        if (file / PIPELINE).is_file():
            return read_pipeline(file, _weights_in)
        if _INDEX.search(file.name):
            return _recognise(file, _read_index(file))
        if file.suffix.lower() != SUFFIX and not file.is_dir():
            return FileReport(file, "unknown", reason=f"no {SUFFIX} file")
        report = _recognise(file, read_header(file))
    except FileNotFoundError:
        return FileReport(file, "unknown", reason="a link to nothing" if file.is_symlink() else "no such file")
    except OSError as error:
        return FileReport(file, "unknown", reason=f"it cannot be read: {error.strerror}")
    except (ValueError, RuntimeError) as error:
        return FileReport(file, "unknown", reason=str(error))
    if _SHARD.search(file.name):
        return replace(report, kind="unknown", base=None, reason="one of several files; give their index or folder")
    return report


def _recognise(file: Path, header: Header) -> FileReport:
    if not header.tensors:
        return FileReport(file, "unknown", reason="it holds no tensors")
    report = (
        name_unserved_kind(file, header.tensors, UNSERVED_KINDS)
        or read_adapter(file, header)
        or read_model(file, header)
        or read_embedding(file, header)
        or read_upscaler(file, header)
        or name_unserved_kind(file, header.tensors, FALLBACK_UNSERVED_KINDS)
    )
    if report is None:
        first = next(iter(header.tensors))
        reason = f"no kind of file that is served has tensors of these names; the first is {first[:100]}"
        return FileReport(file, "unknown", reason=reason)
    return replace(report, dtype=_dtype(header.tensors))


def inspect_folder(root: Path, inspect: Inspect = inspect_file) -> Iterator[FileReport]:
    """What every file of weights below a folder is, in order of their names; `inspect` tells of each.

    A model in diffusers' layout is one report, as is an index with the files it names. Hidden files and pickles beside
    the same weights as safetensors are passed over, links that lead out of the folder refused.
    """
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        if (here / PIPELINE).is_file():
            yield inspect(here, None)
            folders.clear()
            continue
        shown = [name for name in names if not name.startswith(".")]
        links = [name for name in folders if (here / name).is_symlink()]
        misnamed = [name for name in folders if name.endswith(SUFFIX) and not (here / name / PIPELINE).is_file()]
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in {*links, *misnamed})
        for name in links:
            yield FileReport(here / name, "unknown", reason="a link to a folder, which is not followed")
        told: set[str] = set()
        for name in filter(_INDEX.search, shown):
            report = inspect(here / name, root)
            told |= _shards_named_by(here / name)
            yield report
        for name in sorted({*shown, *misnamed} - told):
            if Path(name).suffix.lower() in LISTED and not _has_twin(name, shown):
                yield inspect(here / name, root)


def _has_twin(name: str, names: list[str]) -> bool:
    """Whether a pickle lies beside the same weights as safetensors."""
    stem, suffix = os.path.splitext(name)
    twins = {f"{stem}{SUFFIX}", f"{stem.replace('pytorch_model', 'model')}{SUFFIX}"}
    return suffix.lower() in PICKLES and bool(twins & set(names))


def _read_index(index: Path) -> Header:
    """The tensors of all files that an index names, as if they were one."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(_shards_named_by(index)):
        try:
            tensors |= read_header(index.with_name(shard)).tensors
        except FileNotFoundError:
            raise ValueError(f"its index names {shard[:100]}, which is not there") from None
        except ValueError as error:
            raise ValueError(f"{shard[:100]}: {error}") from None
    return Header(tensors, {})


def _shards_named_by(index: Path) -> set[str]:
    """File names in an index, none if it cannot be read: never a path, which could lead anywhere."""
    try:
        if index.stat().st_size > MAX_HEADER_BYTES:
            return set()
        named = set(json.loads(index.read_text())["weight_map"].values())
        return {name for name in named if isinstance(name, str) and name == os.path.basename(name)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return set()


def _weights_in(folder: Path) -> FileReport:
    """The model in one folder of diffusers' layout: the plain file before a variant, one file before several."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    whole = [name for name in names if name.endswith(SUFFIX) and not _SHARD.search(name)]
    found = sorted(whole, key=len) or sorted(filter(_INDEX.search, names), key=len)
    if not found:
        pickled = any(name.endswith(PICKLES) for name in names)
        reason = "only pickles, which can run code" if pickled else "no weights"
        return FileReport(folder, "unknown", reason=reason)
    return inspect_file(folder / found[0])


def _dtype(tensors: Mapping[str, Tensor]) -> str:
    """The number format of most bytes."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.bytes
    return max(sizes, key=lambda dtype: sizes[dtype])
