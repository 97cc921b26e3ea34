"""The files of a library: found by walking its folders, identified by their headers, remembered until they change."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import ValidationError

from config.catalog import CatalogError, in_a_line
from config.library import Override, UnservedFile, name_problem
from pipelines.weights.inspection import FileReport, inspect_file, inspect_folder
from pipelines.weights.versions import version_of

T = TypeVar("T")

SETTLE_S = 0.5
"""Seconds a file must have been as it is: one that is being copied grows, and its time changes, all the while."""
MOST_WAITING_S = 3.0
"""Most seconds that `settled` waits for files that are being copied."""
MAX_OVERRIDE_BYTES = 2**16
_INDEX_ENDING = ".safetensors.index.json"


@dataclass(frozen=True)
class LibraryFile:
    """A file of weights in a library, or a model in diffusers' layout.

    Attributes:
        root: the library's folder.
        path: below it, with slashes.
        version: changes when the file does.
        report: what it is.
        override: what stands beside it in `NAME.yaml`.
        problem: why it cannot be used whatever it is; None if it can.
        is_new: whether that is because it was written a moment ago.
    """

    root: Path
    path: str
    version: str
    report: FileReport
    override: Override
    problem: str | None
    is_new: bool = False

    @property
    def file(self) -> Path:
        """Where it lies."""
        return self.root / self.path

    @property
    def name(self) -> str:
        """Its public name: the one beside it, or its stem."""
        return self.override.name or _stem(self.file)

    def unserved(self, reason: str) -> UnservedFile:
        """Its entry in the lists of unserved files."""
        return UnservedFile(
            name=self.name[:200],
            kind=self.report.kind,
            file=self.path,
            reason=reason,
            version=self.version,
            is_new=self.is_new,
        )


class LibraryFolders:
    """Folders that are walked again and again; only what changed since the last time is read again."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Know the folders.

        Raises:
            CatalogError: one of them is none.
        """
        for folder in folders:
            if not folder.is_dir():
                raise CatalogError(
                    f"library '{folder}' is not a folder; give one or several that contain .safetensors files"
                )
        self.folders = tuple(folder.resolve() for folder in folders)
        self._reports: dict[Path, tuple[str, FileReport]] = {}
        self._overrides: dict[Path, tuple[str, Override | str]] = {}
        self._since: dict[Path, tuple[str, float]] = {}

    def scan(self) -> tuple[LibraryFile, ...]:
        """Every file of weights, in order of the folders and then of names. One thread at a time."""
        found = [self._file(root, report) for root in self.folders for report in inspect_folder(root, self._inspect)]
        known = {file.file for file in found}
        for remembered in (self._reports, self._since):
            for gone in remembered.keys() - known:
                del remembered[gone]
        return tuple(found)

    def settled(self) -> tuple[LibraryFile, ...]:
        """The same, once no file in them was written a moment ago, or `MOST_WAITING_S` have passed."""
        end = time.monotonic() + MOST_WAITING_S
        files = self.scan()
        while any(file.is_new for file in files) and time.monotonic() < end:
            time.sleep(SETTLE_S)
            files = self.scan()
        return files

    def _inspect(self, file: Path, root: Path | None = None) -> FileReport:
        version = version_of(file)
        return _remembered(self._reports, file, version, lambda: inspect_file(file, root))

    def _file(self, root: Path, report: FileReport) -> LibraryFile:
        version = version_of(report.file)
        override = self._override(report.file)
        problem = override if isinstance(override, str) else None
        if report.kind == "unknown":
            problem = report.reason
        path = report.file.relative_to(root).as_posix()
        file = LibraryFile(
            root, path, version, report, override if isinstance(override, Override) else Override(), problem
        )
        settled = self._settled(report.file, version)
        if problem is None and not settled:
            problem = "it was written a moment ago, and may still be copied; ask again in a second"
        return replace(file, problem=problem or name_problem(file.name), is_new=not settled)

    def _override(self, file: Path) -> Override | str:
        """What stands in `NAME.yaml` beside a file, or what is wrong with it."""
        path = file.with_name(f"{_stem(file)}.yaml")
        version = version_of(path)
        if not version:
            return Override()
        return _remembered(self._overrides, path, version, lambda: _read_override(path))

    def _settled(self, file: Path, version: str) -> bool:
        """Whether a file has been as it is for long enough, by its own time or as it was seen here."""
        now = time.monotonic()
        seen, since = self._since.setdefault(file, (version, now))
        if seen != version:
            self._since[file] = version, now
            since = now
        try:
            age = time.time() - file.stat().st_mtime
        except OSError:
            return False
        return age > SETTLE_S or now - since >= SETTLE_S


def _remembered(memory: dict[Path, tuple[str, T]], file: Path, version: str, read: Callable[[], T]) -> T:
    """What was read of a file, unless it has changed."""
    if (known := memory.get(file)) is not None and known[0] == version:
        return known[1]
    memory[file] = version, read()
    return memory[file][1]


def _stem(file: Path) -> str:
    return file.name.removesuffix(_INDEX_ENDING).removesuffix(".safetensors")


def _read_override(path: Path) -> Override | str:
    try:
        if path.stat().st_size > MAX_OVERRIDE_BYTES:
            return f"{path.name}: it is longer than {MAX_OVERRIDE_BYTES:,} bytes"
        said = yaml.safe_load(path.read_text())
        return Override.model_validate({} if said is None else said)
    except ValidationError as error:
        return f"{path.name}: {in_a_line(error)}"
    except yaml.YAMLError as error:
        return f"{path.name}: it is no YAML: {' '.join(str(error).split())[:300]}"
    except (OSError, ValueError, RecursionError) as error:
        return f"{path.name}: it cannot be read: {error}"
