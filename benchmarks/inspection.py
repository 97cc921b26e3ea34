"""Time and memory to identify a checkpoint of 7 GB, compared with libraries that read headers.

    python -m benchmarks.inspection [--repeats 5]

The file has SDXL's names and shapes and no bytes behind them, so it costs no room; each reader runs in a process of its
own, its imports counted. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from config.catalog import ROOT
from tests.support import published_shapes, sparse_files

READERS = {
    "pipelines.weights.inspect": (
        "from pathlib import Path\nfrom pipelines.weights.inspect import inspect, table\n"
        "print(table(list(inspect([Path(sys.argv[1])]))))"
    ),
    "safetensors' safe_open, names and shapes": (
        "from safetensors import safe_open\n"
        "with safe_open(sys.argv[1], 'np') as f: print(len({k: f.get_slice(k).get_shape() for k in f.keys()}))"
    ),
    "huggingface_hub's parse_local_safetensors_file_metadata": (
        "from huggingface_hub import parse_local_safetensors_file_metadata as parse\n"
        "print(len(parse(sys.argv[1]).tensors))"
    ),
}
# Not getrusage's figure, which a process inherits from the one that started it.
MEMORY = """
with open("/proc/self/status") as status: peak = next(line.split()[1] for line in status if line.startswith("VmHWM"))
print("KiB", peak, file=sys.stderr)"""


def measure(code: str, path: Path, repeats: int) -> dict[str, Any]:
    seconds, memory = [], 0
    for _ in range(repeats):
        begun = time.perf_counter()
        command = [sys.executable, "-c", f"import sys\n{code}{MEMORY}", str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - begun)
        memory = max(memory, int(done.stderr.rsplit("KiB", 1)[1]))
    return {"median_s": round(statistics.median(seconds), 2), "peak_mib": memory // 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        path = sparse_files.write(Path(folder) / "sdxl.safetensors", published_shapes.checkpoint("sdxl"))
        report = {reader: measure(code, path, repeats) for reader, code in READERS.items()}
        print(json.dumps({"file_gb": round(path.stat().st_size / 1e9, 2), "readers": report}, indent=2))


if __name__ == "__main__":
    main()
