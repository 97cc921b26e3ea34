"""What the weights of a prompt do to its embeddings, in the modes of AUTOMATIC1111 (`modules/sd_emphasis.py`)."""

from __future__ import annotations

import torch

from pipelines.errors import InvalidValueError
from pipelines.plan import Emphasis


def emphasise(states: torch.Tensor, weights: list[float], mode: Emphasis) -> torch.Tensor:
    """Multiply the embedding of each token by its weight; weights of 1 alone change nothing, not even rounding.

    Args:
        states: what a text encoder made of one chunk, `[1, tokens, width]`.
        weights: one a token, start, end and padding included.
        mode: `No norm` multiplies; `Original` then scales the chunk back to the mean it had, as A1111 always did;
            `Ignore` leaves it as it is.

    Raises:
        InvalidValueError: `Original` cannot scale back, because the weights brought the mean to 0.
    """
    if mode == "Ignore" or all(weight == 1 for weight in weights):
        return states
    before = states.float()
    after = before * torch.tensor(weights, device=states.device).view(1, -1, 1)
    if mode == "Original":
        after = after * (before.mean() / after.mean())
    emphasised = after.to(states.dtype)
    if not bool(emphasised.isfinite().all()):
        raise InvalidValueError(
            f"emphasis '{mode}': these weights make values that are not finite numbers. "
            "Only ['No norm', 'Ignore'] work with them, or other weights",
            "emphasis",
        )
    return emphasised
