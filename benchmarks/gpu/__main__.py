"""Measures a GPU in less than nine minutes, on a machine without network.

    python -m benchmarks.gpu [--seconds 520] [--file facts.jsonl] [--dry-run] [SECTION ...]

One JSON line a fact. Random weights of the published configurations (config/architectures), half precision; the tests'
tiny models for pictures. Sections run in this order, each if as much time is left as it may take; what fails is a fact
too, and the next section runs. `--dry-run` rehearses on a CPU with toy sizes. No Ray, no server.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import diffusers
import torch
import transformers

from benchmarks.gpu.facts import Facts
from benchmarks.gpu.pictures import parity, vae
from benchmarks.gpu.unets import measure_compiled, measure_unet, out_of_memory

RESIDUALS = 27_000_000
"""Numbers of a ControlNet's residuals of one row, SDXL at 1024 px: 54 MB in half precision."""


def machine(facts: Facts) -> None:
    """Versions, and what small and large work costs here."""
    facts.tell(
        "versions",
        python=sys.version.split()[0],
        torch=torch.__version__,
        diffusers=diffusers.__version__,
        transformers=transformers.__version__,
        device="cpu, toy sizes" if facts.dry else torch.cuda.get_device_name(),
    )
    side = 64 if facts.dry else 8192
    square = torch.randn(side, side, device=facts.device, dtype=facts.dtype)
    small, host = torch.zeros(8, device=facts.device), torch.zeros(8)
    large = torch.zeros(1000 if facts.dry else RESIDUALS, dtype=facts.dtype, device=facts.device)
    paged = large.cpu()
    pinned = paged if facts.dry else paged.pin_memory()
    facts.tell(
        "machine",
        matmul_tflops=round(2 * side**3 / facts.ms(lambda: square @ square) / 1e9, 1),
        launch_us=facts.host_us(lambda: small.add_(1)),
        small_copy_to_device_us=facts.host_us(lambda: host.to(facts.device)),
        item_us=facts.host_us(lambda: small[0].item()),
        residuals_to_host_pageable_ms=facts.ms(lambda: large.cpu()),
        residuals_to_device_pageable_ms=facts.ms(lambda: paged.to(facts.device)),
        residuals_to_device_pinned_ms=facts.ms(lambda: pinned.to(facts.device, non_blocking=True)),
    )


def tests(facts: Facts) -> None:
    """`tests/gpu`, in a process of its own; other versions than the tested ones may warn."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-c", os.devnull, "--rootdir", "."]
    command += ["-p", "no:cacheprovider", "-W", "default", "--tb=short", "--durations=5"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300 if facts.dry else facts.left - 5, check=False
    )
    facts.tell("tests/gpu", status=done.returncode, output=done.stdout[-2500:])


SECTIONS: dict[str, tuple[float, Callable[[Facts], None]]] = {
    "machine": (10, machine),
    "sd15": (60, partial(measure_unet, name="sd15")),
    "sdxl": (90, partial(measure_unet, name="sdxl")),
    "tests": (90, tests),
    "parity": (60, parity),
    "vae": (15, vae),
    "out_of_memory": (20, out_of_memory),
    "sd15_compiled": (70, partial(measure_compiled, name="sd15")),
    "sdxl_compiled": (100, partial(measure_compiled, name="sdxl")),
}
"""Name -> seconds that must be left, and what it does."""


def main() -> None:
    """Run the sections that there is time for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {list(SECTIONS)}; all by default")
    parser.add_argument("--seconds", type=float, default=520, help="for everything")
    parser.add_argument("--file", type=Path, help="also append the lines here, each at once")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on a CPU with toy sizes")
    options = parser.parse_args()
    if unknown := set(options.sections) - SECTIONS.keys():
        parser.error(f"unknown sections {sorted(unknown)}; there are {list(SECTIONS)}")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --dry-run rehearses without one")
    warnings.simplefilter("ignore")
    os.environ.setdefault("TQDM_DISABLE", "1")
    if options.dry_run:
        torch.set_num_threads(1)
    facts = Facts(options.seconds, options.file, options.dry_run)
    for name in options.sections or SECTIONS:
        needs, run = SECTIONS[name]
        if facts.left < needs and not options.dry_run:
            facts.tell("skipped", section=name, needs_s=needs, left_s=round(facts.left))
            continue
        begin = time.monotonic()
        try:
            run(facts)
        except Exception as error:  # one section's fault must not cost the others
            facts.tell("failed", section=name, error=repr(error)[:400])
            traceback.print_exc(limit=-4)
        facts.clean()
        facts.tell("section", section=name, seconds=round(time.monotonic() - begin, 1))


if __name__ == "__main__":
    main()
