"""Say what files of weights are, from their headers alone.

python -m pipelines.weights.inspect FILE... [--json]

A folder is walked. Everything is reported, also what cannot be used, with the reason; the exit status is 0 unless a
FILE does not exist.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.weights.inspection import FileReport, inspect_file, inspect_folder
from pipelines.weights.kinds.folders import PIPELINE


def inspect(paths: list[Path]) -> Iterator[FileReport]:
    """A report of every file, folders walked."""
    for path in paths:
        if path.is_dir() and path.suffix != ".safetensors" and not (path / PIPELINE).is_file():
            yield from inspect_folder(path)
        else:
            yield inspect_file(path)


def as_json(report: FileReport) -> dict[str, Any]:
    """A report for programs: `file`, `kind`, `base` and `reason` first, paths as text."""
    return asdict(report) | {"file": str(report.file)}


def table(reports: list[FileReport]) -> str:
    """Reports for people: a line each, and indented below it what one should know besides."""
    rows = [("FILE", "KIND", "BASE", "WHY")]
    for report in reports:
        kind = report.kind if report.control_types is None else f"union {report.kind}"
        rows.append((_printable(str(report.file)), kind, report.base or "-", _printable(_told(report))))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join((*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3])) for row in rows
    )


def _told(report: FileReport) -> str:
    facts = [report.reason]
    if report.prediction in ("v_prediction", "edm"):
        facts.append(f"predicts {report.prediction}")
    if report.zero_terminal_snr:
        facts.append("zero terminal SNR")
    if report.rank is not None:
        facts.append(f"rank {report.rank}")
    return "; ".join([*facts, *report.notes])


def _printable(text: str) -> str:
    """File names may hold anything, also what would move a terminal's cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def main() -> None:
    """Inspect, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    options = parser.parse_args()
    reports = list(inspect(options.files))
    print(json.dumps([as_json(report) for report in reports], indent=1) if options.json else table(reports))
    missing = [path for path in options.files if not path.exists()]
    sys.exit(f"no such file: {_printable(str(missing[0]))}" if missing else 0)


if __name__ == "__main__":
    main()
