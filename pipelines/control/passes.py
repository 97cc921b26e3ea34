"""One pass of a ControlNet over some rows, as it comes or recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import ControlNetModel, ControlNetUnionModel

from pipelines.diffusers_compat import mask_rows
from pipelines.recordings import Capturer, Recorder, StaticRows, padded_rows
from pipelines.torch_compat import copy_each


@dataclass(frozen=True)
class ControlInputs:
    """What a ControlNet reads, on its device and in its format."""

    sample: torch.Tensor
    """`[rows, channels, height, width]`."""
    timesteps: torch.Tensor
    """`[rows]`."""
    prompt_embeds: torch.Tensor
    """`[rows, tokens, width]`."""
    maps: tuple[torch.Tensor, ...]
    """Embedded control maps, one for each mode, `[rows, channels, height, width]` in the latents' size."""
    scales: tuple[torch.Tensor, ...] = ()
    """What each map is multiplied by where there are several, `[rows]`."""
    mask: tuple[torch.Tensor, ...] = ()
    """Of a union ControlNet, whose attention goes over the rows: `[rows, rows or more]`, 0 between rows of one picture
    and minus infinity between rows of different pictures."""
    added: tuple[torch.Tensor, ...] = ()
    """`text_embeds` and `time_ids` for SDXL, as in a `StepBatch`."""

    @property
    def tensors(self) -> Sequence[torch.Tensor]:
        """All of them, in the order of the constructor's arguments."""
        return [self.sample, self.timesteps, self.prompt_embeds, *self.maps, *self.scales, *self.mask, *self.added]

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> ControlInputs:
        """The same with other tensors, in that order."""
        sample, timesteps, embeds, *rest = tensors
        parts = []
        for part in (self.maps, self.scales, self.mask, self.added):
            parts.append(tuple(rest[: len(part)]))
            rest = rest[len(part) :]
        return ControlInputs(sample, timesteps, embeds, *parts)


class _RowScales:
    """A number for each row, which multiplies tensors `[rows, ...]` where diffusers expects one number for all rows.

    `ControlNetUnionModel` only multiplies by it (`tests/upstream/test_diffusers.py`). By torch's protocol for operands
    that are no tensors: https://docs.pytorch.org/docs/stable/notes/extending.html
    """

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if function not in (torch.Tensor.mul, torch.Tensor.__rmul__) or len(tensors) != 1:
            return NotImplemented
        (tensor,), (scales,) = tensors, [arg for arg in args if isinstance(arg, cls)]
        return tensor * scales._values.view(-1, *(1,) * (tensor.ndim - 1))


class ControlNetPass:
    """One ControlNet in one mode, or a union ControlNet in several at once."""

    def __init__(self, model: ControlNetModel | ControlNetUnionModel, modes: tuple[int, ...]) -> None:
        """Of `model`, whose map embedder was taken; `modes` are the control types of a union ControlNet's maps."""
        self._model = model
        self._modes = modes

    def evaluate(self, inputs: ControlInputs) -> Sequence[torch.Tensor]:
        """The down residuals and the mid residual of every row."""
        names = ("text_embeds", "time_ids")
        arguments: dict[str, Any] = {
            "encoder_hidden_states": inputs.prompt_embeds,
            "added_cond_kwargs": dict(zip(names, inputs.added, strict=True)) if inputs.added else None,
            "return_dict": False,
        }
        if not self._modes:
            (arguments["controlnet_cond"],) = inputs.maps
        else:
            control_type = inputs.sample.new_zeros(len(inputs.sample), self._model.config.num_control_type)
            for mode in self._modes:
                control_type[:, mode].fill_(1)
            arguments |= {
                "controlnet_cond": list(inputs.maps),
                "control_type": control_type,
                "control_type_idx": list(self._modes),
            }
            (mask,) = inputs.mask
            mask_rows(self._model, mask[:, : len(inputs.sample)])
        if inputs.scales:
            arguments["conditioning_scale"] = [_RowScales(scales) for scales in inputs.scales]
        down, mid = self._model(inputs.sample, inputs.timesteps, **arguments)
        return (*down, mid)


class ControlKind(NamedTuple):
    """What selects a recorded pass of a ControlNet."""

    component: str
    modes: tuple[int, ...]
    rows: int
    """Padded."""
    latent_shape: tuple[int, ...]
    context_shape: tuple[int, ...]


class ControlNetGraphs:
    """The recorded passes of the ControlNets of one UNet."""

    def __init__(self, capturer: Capturer) -> None:
        self._capturer = capturer
        self.recorder: Recorder[_Recorded] = Recorder()

    def evaluate(
        self, component: str, modes: tuple[int, ...], network: ControlNetPass, inputs: ControlInputs
    ) -> Sequence[torch.Tensor]:
        """The residuals of every row, valid until the next call.

        They lie in tensors of their own, outside of what recordings share: a UNet that is replayed next reads them.
        """
        count = len(inputs.sample)
        rows = padded_rows(count)
        if rows is None:
            return network.evaluate(inputs)
        latent_shape, context_shape = tuple(inputs.sample.shape[1:]), tuple(inputs.prompt_embeds.shape[1:])
        kind = ControlKind(component, modes, rows, latent_shape, context_shape)
        recorded = None
        if self.recorder.due(kind):
            recorded = self.recorder.find(kind, None, lambda: _Recorded(self._capturer, network, inputs, rows))
        return network.evaluate(inputs) if recorded is None else recorded.run(inputs)


class _Recorded:
    """One pass of a ControlNet, recorded."""

    def __init__(self, capturer: Capturer, network: ControlNetPass, inputs: ControlInputs, rows: int) -> None:
        self._inputs = StaticRows(inputs.tensors, rows)
        self._inputs.fill(inputs.tensors)
        static = inputs.with_tensors(self._inputs.tensors)
        self._residuals = [torch.empty_like(tensor) for tensor in network.evaluate(static)]

        def write() -> None:
            copy_each(self._residuals, network.evaluate(static))

        (self._replay,) = capturer.capture([write], self._inputs.tensors, self._residuals)

    def run(self, inputs: ControlInputs) -> Sequence[torch.Tensor]:
        self._inputs.fill(inputs.tensors)
        self._replay()
        return [tensor[: len(inputs.sample)] for tensor in self._residuals]
