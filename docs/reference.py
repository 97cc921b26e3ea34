"""Writes the tables of the documentation that follow from the code.

    python docs/reference.py            # writes them; `make docs` does so first
    python docs/reference.py --check    # ends with 1 if a page is out of date; `tests/docs` asks the same

A page holds a table between `<!-- table: name -->` and `<!-- end of table -->`; what stands there is replaced.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from math import ceil
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

from pydantic import BaseModel  # noqa: E402
from pydantic.fields import FieldInfo  # noqa: E402
from pydantic_core import PydanticUndefined  # noqa: E402

from config.catalog import Catalog  # noqa: E402
from config.settings import Settings  # noqa: E402
from deployments.api.schemas import GenerationRequest  # noqa: E402
from deployments.app import AppArgs, hosted_components  # noqa: E402
from pipelines.sampling.samplers import SAMPLERS  # noqa: E402

_BLOCK = re.compile(r"<!-- table: (?P<name>[\w-]+) -->\n.*?<!-- end of table -->", re.DOTALL)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), ["---"] * len(list(head)), *map(list, rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def settings() -> str:
    """Environment variables."""
    fields = Settings.model_fields.items()
    rows = ([f"`SDGRAPH_{name.upper()}`", _default(field), _words(field)] for name, field in fields)
    return table(["variable", "default", "meaning"], rows)


def args() -> str:
    """`args` of a Serve config, those of nested models by their path."""
    return table(["argument", "default", "meaning"], _fields(AppArgs))


def request_fields() -> str:
    """Fields of a request in Hyperbolic's dialect, with their other spellings and limits."""
    rows = []
    for name, field in GenerationRequest.model_fields.items():
        names = [name, *(alias for alias in _aliases(field) if alias != name)]
        rows.append([", ".join(f"`{spelling}`" for spelling in names), _kind(name), _words(field)])
    return table(["field", "type and limits", "meaning"], rows)


def samplers() -> str:
    """Every sampler."""
    rows = (
        [f"`{name}`", f"`{spec.scheduler}`", f"{spec.min_steps} to {spec.max_steps}", "yes" if spec.edm else ""]
        for name, spec in SAMPLERS.items()
    )
    return table(["`sampler`", "diffusers scheduler", "steps", "EDM models only"], rows)


def models() -> str:
    """The models of the hub's catalog and what they do where a request does not say."""
    rows = []
    for model in Catalog.load("hub").models:
        default, size = model.defaults, model.default_size
        rows.append(
            [
                f"`{model.name}`",
                model.family,
                f"{size.width}x{size.height}",
                f"{default.steps}, {default.cfg_scale:g}, `{default.sampler}`",
                "yes" if model.refiner else "",
            ]
        )
    return table(["`model_name`", "family", "size", "steps, guidance, sampler", "refiner"], rows)


def graph() -> str:
    """Deployments of the hub's catalog, and the way of a picture through them, as mermaid draws it."""
    args, catalog = AppArgs(catalog="hub"), Catalog.load("hub")
    home = {part.id: name for name, parts in hosted_components(args, catalog).items() for part in parts}
    edges: dict[str, None] = {}
    for model in catalog.available_models():
        unet, vae = home[model.unet], home[model.vae]
        edges[f"{home[model.text_encoder]} --> {unet}"] = None
        edges[f"{unet} --> {vae}"] = None
        if model.refiner:
            edges[f"{unet} --> {home[model.refiner]}"] = None
            edges[f"{home[model.refiner]} --> {vae}"] = None
        for net in catalog.controlnets_of(model.unet):
            edges[f"{home[net]} <-.-> {unet}"] = None
    starts = sorted({edge.split(" --> ")[0] for edge in edges} - {edge.split(" --> ")[-1] for edge in edges})
    edges |= {f"ingress --> {name}": None for name in starts if " " not in name}
    lines = ["client([client]) --> proxy[Serve's proxy] --> ingress", *edges]
    return "```mermaid\ngraph LR\n" + "\n".join(f"  {line}" for line in lines) + "\n```"


def batching_plot() -> str:
    """Throughput and latency by the rows of a tick, from the table of benchmarks/RESULTS.md."""
    results = (DOCS.parent / "benchmarks/RESULTS.md").read_text()
    rows = _numbers(results, "rows in a tick")
    milliseconds = _numbers(results, "milliseconds")
    throughput = [round(1000 * count / time) for count, time in zip(rows, milliseconds, strict=True)]
    return "\n\n".join(
        _plot(title, "rows in a tick", rows, unit, values)
        for title, unit, values in (
            ("Throughput: UNet rows a second", "rows a second", throughput),
            ("Latency: milliseconds of a tick", "milliseconds", milliseconds),
        )
    )


def _numbers(text: str, row: str) -> list[float]:
    """The numbers of the first row of a Markdown table that begins so. ValueError if there is none."""
    found = re.search(rf"^\| {re.escape(row)} \|(.*)\|$", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"benchmarks/RESULTS.md has no row '{row}'")
    return [float(cell) for cell in found[1].split("|")]


_PLOT_COLOUR = '%%{init: {"themeVariables": {"xyChart": {"plotColorPalette": "#4a7fd1"}}}}%%'


def _plot(title: str, x: str, xs: list[float], y: str, ys: list[float]) -> str:
    labels = ", ".join(f'"{value:g}"' for value in xs)
    top = 20 * ceil(max(ys) / 20)  # bars must begin at 0, which mermaid's own axis does not
    lines = [
        f'title "{title}"',
        f'x-axis "{x}" [{labels}]',
        f'y-axis "{y}" 0 --> {top}',
        f"bar {[float(v) for v in ys]}",
    ]
    return f"```mermaid\n{_PLOT_COLOUR}\nxychart-beta\n" + "\n".join(f"  {line}" for line in lines) + "\n```"


TABLES: Mapping[str, Callable[[], str]] = {
    "settings": settings,
    "args": args,
    "request-fields": request_fields,
    "samplers": samplers,
    "models": models,
    "graph": graph,
    "batching-plot": batching_plot,
}


def filled(text: str) -> str:
    """A page with its tables written anew. KeyError for a table that nobody makes."""

    def block(found: re.Match[str]) -> str:
        name = found["name"]
        return f"<!-- table: {name} -->\n{TABLES[name]()}\n<!-- end of table -->"

    return _BLOCK.sub(block, text)


def _fields(model: type[BaseModel], path: str = "") -> list[list[str]]:
    rows = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            rows += _fields(field.annotation, f"{path}{name}.")
        else:
            rows.append([f"`{path}{name}`", _default(field), _words(field)])
    return rows


def _words(field: FieldInfo) -> str:
    if not field.description:
        raise ValueError(f"a field has no docstring or description: {field!r}")
    return " ".join(field.description.split())


def _default(field: FieldInfo) -> str:
    if field.default in (None, (), "", PydanticUndefined):
        return "none"
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    if isinstance(field.default, Path):
        return f"`{field.default.relative_to(DOCS.parent)}`"
    return f"`{field.default}`"


def _aliases(field: FieldInfo) -> list[str]:
    choices = getattr(field.validation_alias, "choices", [])
    return [str(choice) for choice in choices]


_SCHEMA: dict[str, Any] = {}


def _kind(name: str) -> str:
    """Type and limits of a request field, as JSON schema has them."""
    if not _SCHEMA:
        _SCHEMA.update(GenerationRequest.model_json_schema(by_alias=False))
    schema = _SCHEMA["properties"][name]
    kinds = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]
    return ", or ".join(dict.fromkeys(_kind_of(kind) for kind in kinds))


def _kind_of(kind: dict[str, Any]) -> str:
    if "enum" in kind:
        return ", ".join(f"`{value}`" for value in kind["enum"])
    if "$ref" in kind:
        return "object"
    limits = []
    if "minimum" in kind:
        limits.append(f"from {kind['minimum']:g}" if isinstance(kind["minimum"], float) else f"from {kind['minimum']}")
    if "maximum" in kind:
        limits.append(f"to {kind['maximum']:g}" if isinstance(kind["maximum"], float) else f"to {kind['maximum']}")
    if "exclusiveMaximum" in kind:
        limits.append(f"below {kind['exclusiveMaximum']}")
    if "maxLength" in kind:
        limits.append(f"at most {kind['maxLength']} characters")
    return " ".join([kind.get("type", "object"), *limits])


def main() -> None:
    """Write the pages' tables, or say which are out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a page would change")
    check = parser.parse_args().check
    stale = [page for page in sorted(DOCS.rglob("*.md")) if filled(page.read_text()) != page.read_text()]
    for page in stale:
        if check:
            print(f"{page.relative_to(DOCS.parent)} is out of date: run `python docs/reference.py`")
        else:
            page.write_text(filled(page.read_text()))
    sys.exit(bool(stale and check))


if __name__ == "__main__":
    main()
