"""The cost of a long prompt, and of short ones that share its ticks: CPU seconds of UNet passes, printed as JSON.

python -m benchmarks.contexts [--rows 4] [--repeats 5]

Seconds of the process, not of the clock: other work on the machine changes them less. `apart` is a tick of the long
rows and one of the short ones; `together` is one tick in which the short rows' context is repeated. A masked context
is the alternative that was not taken: the same tick with a bias that hides the padding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel

from config.catalog import ROOT


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median CPU seconds of a call, after one."""
    taken = []
    for _ in range(repeats + 1):
        begin = time.process_time()
        work()
        taken.append(time.process_time() - begin)
    return statistics.median(taken[1:])


@torch.inference_mode()
def measure(rows: int, repeats: int) -> dict[str, float]:
    """Milliseconds of passes of the embedded SD1.5 UNet at 512 px."""
    unet = UNet2DConditionModel.from_pretrained(ROOT / "models" / "sd15" / "unet").float().eval()
    width, tokens, chunks = unet.config.cross_attention_dim, 64, 4

    def tick(count: int, context: int, hidden: int = 0) -> float:
        sample = torch.randn(count, unet.config.in_channels, 16, 16)
        embeds, mask = torch.randn(count, context, width), torch.ones(count, context)
        mask[: count // 2, context - hidden :] = 0
        told = {"encoder_attention_mask": mask} if hidden else {}
        return 1000 * seconds(lambda: unet(sample, torch.full((count,), 500), embeds, **told), repeats)

    return {
        "short": tick(rows, tokens),
        "long": tick(rows, tokens * chunks),
        "apart": tick(rows, tokens) + tick(rows, tokens * chunks),
        "together": tick(2 * rows, tokens * chunks),
        "masked": tick(2 * rows, tokens * chunks, hidden=tokens * (chunks - 1)),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps({name: round(value, 1) for name, value in measure(arguments.rows, arguments.repeats).items()}))


if __name__ == "__main__":
    main()
