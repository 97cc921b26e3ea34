"""Packages of PyPI or npm in a folder of a client's own."""

from __future__ import annotations

import shutil
import subprocess
import venv
from pathlib import Path

from config.catalog import ROOT

FOLDER = ROOT / "build" / "clients"


class InstallError(Exception):
    """A client could not be installed."""


def installed(name: str, packages: tuple[str, ...], script: Path) -> list[Path | str]:
    """Install a client, unless these packages lie there already; returns the command that runs its script.

    Raises:
        InstallError: with what is missing and what to do.
    """
    home = FOLDER / name
    done = home / "installed"
    wanted = "\n".join(packages)
    if not done.exists() or done.read_text() != wanted:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        print(f"{name}: installing {', '.join(packages)}", flush=True)
        (_from_npm if script.suffix == ".mjs" else _from_pypi)(home, packages)
        done.write_text(wanted)
    if script.suffix == ".mjs":
        # Node looks for packages beside a script, not where it runs.
        copy = home / script.name
        shutil.copy(script, copy)
        return [_node(), copy]
    return [home / "bin" / "python", "-P", script]


def _from_pypi(home: Path, packages: tuple[str, ...]) -> None:
    venv.create(home, with_pip=True)
    _run([home / "bin" / "python", "-m", "pip", "install", "--quiet", *packages], home, "PyPI")


def _from_npm(home: Path, packages: tuple[str, ...]) -> None:
    _node()
    npm = shutil.which("npm")
    if npm is None:
        raise InstallError("npm is not here; install it beside Node.js")
    (home / "package.json").write_text('{"private": true}')
    # Programs of other people, run at the installation, fetch what these clients do without.
    options = ["--no-audit", "--no-fund", "--loglevel=error", "--ignore-scripts", "--omit=optional"]
    _run([npm, "install", "--save-exact", *options, *packages], home, "npm's registry")


def _node() -> str:
    node = shutil.which("node")
    if node is None:
        raise InstallError("node is not here; install Node.js 20.20 or later")
    return node


def _run(command: list[Path | str], home: Path, registry: str) -> None:
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        shutil.rmtree(home)
        said = (done.stderr or done.stdout).strip()[-2000:]
        raise InstallError(f"it could not be installed; is {registry} reachable? It said:\n{said}")
