"""How networks are accelerated on GPUs; needs neither torch nor ray."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Acceleration(BaseModel):
    """`acceleration` in the `args` of a Serve config. On a CPU none of it happens."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    graphs: bool = True
    """Record UNet and ControlNet passes of common shapes as CUDA graphs and replay them."""
    channels_last: bool = False
    """Keep the weights of convolutions in NHWC order: faster for SD1.5, slower for SDXL on the card that was tried."""
    compiled_blocks: bool = False
    """Compile the UNet's repeated blocks with torch.compile: faster ticks, but a start that takes minutes longer."""
